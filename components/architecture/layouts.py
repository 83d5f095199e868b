"""Parts and layouts that a config of transformers stands for, as several architectures share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from toolkit.architectures import Layout, Part, Sizes, same_layers


def layout_of(
    config: Any,
    block: Part,
    mixer: Part,
    position: Sequence[Part],
    attention: Sequence[Part],
    norm: Part,
    ffn: Sequence[Part],
) -> Layout:
    """The layout of a config in which every layer has the same parts."""
    sizes = Sizes(
        vocab_size=config.vocab_size,
        max_len=getattr(config, "max_seq_len", None) or config.max_position_embeddings,
        dim=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_kv_head=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        tie_embeddings=config.tie_word_embeddings,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        embed_scale=config.hidden_size**0.5 if config.model_type == "gemma2" else 1.0,
    )
    layers = same_layers(
        sizes.n_layer, block=[block], mixer=[mixer], position=position, attention=attention, norm=[norm], ffn=ffn
    )
    return Layout(sizes, layers, (norm,))


def with_windows(layout: Layout, config: Any, softcap: float | None = None) -> Layout:
    """The layout with a window in those layers that have the type "sliding_attention"."""
    layers = tuple(
        layer | {"attention": softmax(config.sliding_window, softcap)} if kind == "sliding_attention" else layer
        for layer, kind in zip(layout.layers, config.layer_types, strict=True)
    )
    return replace(layout, layers=layers)


def softmax(window: int | None = None, softcap: float | None = None, bias: bool = False) -> tuple[Part, ...]:
    """The kernels that compute softmax attention; ``bias``: only those that take a score bias."""
    flex = Part("FlexAttention", {"window": window, "softcap": softcap})
    if window is not None and softcap is not None:
        return (flex,)
    if window is not None:
        return (Part("SlidingWindow", {"window": window}), flex)
    if softcap is not None:
        return (Part("SoftcapAttention", {"softcap": softcap}), flex)
    plain = (Part("SDPA"), Part("MathAttention"), flex)
    return plain if bias else (Part("FlashAttention"), *plain)


def self_attention(bias: bool, qk_norm: Part | None = None, head_dim: int | None = None) -> Part:
    """``head_dim``: None if it is C / H. Of ours, its value shows in the shapes of the tensors."""
    knobs: dict[str, object] = {"bias": bias, "qk_norm": qk_norm, "gate": False}
    if qk_norm is not None:
        knobs["qk_norm_after_rotation"] = False
    return Part("SelfAttention", knobs, {"head_dim": head_dim})


def rms_norm(config: Any) -> Part:
    """RMSNorm with a learned gain."""
    return Part("RMSNorm", {"eps": config.rms_norm_eps, "gain": True, "gain_minus_one": False})


def head_dim_knob(config: Any) -> int | None:
    """The channels of a head; None if they are C / H, as usual."""
    usual = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or usual
    return None if head_dim == usual else head_dim


def network(table: dict[str, Part], activation: str, bias: bool, hidden: int, refused: list[str]) -> tuple[Part, ...]:
    """The feed-forward network with an activation; adds a line to ``refused`` for one that no part has."""
    part = table.get(activation)
    if part is None:
        refused.append(f"the activation {activation!r}: it must be one of {', '.join(table)}")
        return ()
    return (Part(part.name, {"bias": bias, **part.knobs}, {"hidden": hidden}),)


def unequal(config: Any, **required: object) -> list[str]:
    """A line for each entry of a config that does not have the only value that our parts compute."""
    return [
        f"{name} = {getattr(config, name)!r}: it must be {value!r}"
        for name, value in required.items()
        if getattr(config, name) != value
    ]


def raise_refused(model_type: str, refused: list[str]) -> None:
    """Raise ValueError with the lines about what our parts can't express, if there are any."""
    if refused:
        raise ValueError("\n".join(f"{model_type}: {line}" for line in refused))
