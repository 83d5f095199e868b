"""Which architectures llama.cpp computes as ours, and the keys and tensors with which a GGUF file says so.

What llama.cpp reads from a file and computes for an architecture: src/llama-model.cpp and src/models/ of
https://github.com/ggml-org/llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.exchange.gguf import package

Value = bool | int | float | str
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # no file can change these for our architectures
ROPES = ("default", "linear", "yarn")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
SILU = ("silu", "swish")


@dataclass(frozen=True)
class Covered:
    """An architecture of transformers that llama.cpp computes.

    ``name``: the architecture in GGUF. ``activations``: those that llama.cpp has for it. ``refuse``: a line for each
    entry of a config that it can't compute."""

    name: str
    activations: tuple[str, ...]
    refuse: Callable[[Any], list[str]]


def refusals(config: Any) -> list[str]:
    """Why llama.cpp does not compute a config of transformers, a line each; [] if it does."""
    covered = COVERED.get(config.model_type)
    if covered is None:
        return [f"the architecture {config.model_type} is not covered; covered are {', '.join(COVERED)}"]
    lines = covered.refuse(config)
    activation = _activation(config)
    if activation not in covered.activations:
        lines.append(f"its activation is {activation!r}, but llama.cpp computes {covered.activations[0]!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPES:
        lines.append(f"its rotation is of the type {kind!r}; written are {', '.join(ROPES)}")
    if kind == "yarn":
        lines += [
            f"YaRN's {name} is {rope[name]:g}, but llama.cpp computes {value:g}"
            for name, value in YARN.items()
            if (rope.get(name) or value) != value
        ]
    return lines


def has_gelu(config: Any) -> bool:
    """Whether the activation of a covered config is a GELU."""
    return COVERED[config.model_type].activations == TANH_GELU


def keys(config: Any) -> dict[str, Value]:
    """The keys of a file, without those of the tokenizer. Whole numbers are uint32 there, others float32."""
    names = package.require().Keys
    arch = COVERED[config.model_type].name
    heads = config.num_attention_heads
    values: dict[str, Value] = {
        names.LLM.VOCAB_SIZE: config.vocab_size,
        names.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        names.LLM.EMBEDDING_LENGTH: config.hidden_size,
        names.LLM.BLOCK_COUNT: config.num_hidden_layers,
        names.LLM.FEED_FORWARD_LENGTH: _width(config),
        names.Attention.HEAD_COUNT: heads,
        names.Attention.HEAD_COUNT_KV: getattr(config, "num_key_value_heads", None) or heads,
    }
    if hasattr(config, "rms_norm_eps"):
        values[names.Attention.LAYERNORM_RMS_EPS] = config.rms_norm_eps
    else:
        eps = config.layer_norm_epsilon if config.model_type == "gpt2" else config.layer_norm_eps
        values[names.Attention.LAYERNORM_EPS] = eps
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    values |= {names.Attention.KEY_LENGTH: head_dim, names.Attention.VALUE_LENGTH: head_dim}
    if config.model_type == "stablelm":
        values[names.LLM.USE_PARALLEL_RESIDUAL] = config.use_parallel_residual
    if config.model_type == "gemma2":
        values |= {
            names.Attention.SLIDING_WINDOW: config.sliding_window,
            names.LLM.ATTN_LOGIT_SOFTCAPPING: config.attn_logit_softcapping,
            names.LLM.FINAL_LOGIT_SOFTCAPPING: config.final_logit_softcapping,
        }
    values |= _rope_keys(config, head_dim)
    return {name.format(arch=arch): value for name, value in values.items()}


def _rope_keys(config: Any, head_dim: int) -> dict[str, Value]:
    """The keys of the rotation; {} for learned positions."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    names = package.require().Keys.Rope
    values: dict[str, Value] = {
        names.DIMENSION_COUNT: int(head_dim * (rope.get("partial_rotary_factor") or 1.0)),
        names.FREQ_BASE: float(rope["rope_theta"]),
    }
    kind = rope.get("rope_type", "default")
    if kind != "default":
        values |= {names.SCALING_TYPE: kind, names.SCALING_FACTOR: float(rope["factor"])}
    if kind == "yarn":
        values[names.SCALING_ORIG_CTX_LEN] = rope["original_max_position_embeddings"]
    return values


def to_gguf(config: Any, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by their names there, made of those of transformers: ``place`` of each, and the output
    matrix also where it is tied, for an architecture that needs it."""
    tensors = {}
    for name, tensor in theirs.items():
        tensors[gguf_name(config, name)] = place(config, name, tensor)
    if config.model_type == "stablelm":
        tensors.setdefault("output.weight", tensors["token_embd.weight"])
    return tensors


def gguf_name(config: Any, name: str) -> str:
    """What a tensor of transformers is called in a file."""
    gguf = package.require()
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == COVERED[config.model_type].name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"the package gguf has no name for the tensor {name} of {config.model_type}")
    return found


def place(config: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of transformers as llama.cpp wants it."""
    kind = config.model_type
    if kind == "gpt2" and name.endswith(".weight") and (".attn.c_" in name or ".mlp.c_" in name):
        return tensor.T.contiguous()  # Conv1D holds (I, O)
    if kind == "gemma2" and name.endswith("norm.weight"):
        return tensor + 1  # transformers holds gain - 1
    if COVERED[kind].name == "llama" and ".q_proj." in name:
        return neighbours(tensor, config.num_attention_heads)
    if COVERED[kind].name == "llama" and ".k_proj." in name:
        return neighbours(tensor, config.num_key_value_heads)
    return tensor


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: 0, D/2, 1, D/2 + 1, ... For GGUF's llama, llama.cpp rotates channels 2i and
    2i + 1; transformers rotates i and i + D/2. (H D, ...) -> (H D, ...)."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def is_half(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a file gets the half type: matrices, but not the table of learned positions, which llama.cpp
    adds in float32."""
    return tensor.ndim > 1 and name != "position_embd.weight"


def rounded(config: Any, theirs: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of transformers with the values that a file of type ``dtype`` holds, in float32."""
    kind = getattr(torch, dtype)
    return {
        name: tensor.to(kind).float() if is_half(gguf_name(config, name), tensor) else tensor
        for name, tensor in theirs.items()
    }


# ---- what llama.cpp can't compute ------------------------------------------------------------------------------------


def _width(config: Any) -> int:
    """The channels inside a feed-forward network."""
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.hidden_size
    return int(config.intermediate_size)


def _activation(config: Any) -> str:
    names = ("hidden_activation", "activation_function", "hidden_act")
    return next(str(value) for name in names if (value := getattr(config, name, None)) is not None)


def _nothing(config: Any) -> list[str]:
    return []


def _no_windows(config: Any) -> list[str]:
    """Windows that hide something: llama.cpp lets every layer see all positions."""
    windows = [config.sliding_window]
    if getattr(config, "layer_types", None):
        windows = [config.sliding_window for kind in config.layer_types if kind == "sliding_attention"]
    narrow = [window for window in windows if window is not None and window < config.max_position_embeddings]
    if not narrow:
        return []
    return [
        f"some layers see {narrow[0]} of {config.max_position_embeddings} positions, but llama.cpp computes no window "
        f"for {config.model_type}"
    ]


def _qwen3(config: Any) -> list[str]:
    lines = _no_windows(config)
    return lines + (["attention has biases, but llama.cpp has no bias of its output"] if config.attention_bias else [])


def _gemma2(config: Any) -> list[str]:
    lines = []
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is None:
            lines.append(f"{name} is None, but llama.cpp always caps")
    if not config.tie_word_embeddings:
        lines.append("the output matrix is not the embedding table, but llama.cpp ties them")
    if config.attention_bias:
        lines.append("attention has biases, but llama.cpp has no bias of its output")
    turns = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(config.num_hidden_layers)]
    if list(config.layer_types) != turns:
        lines.append("llama.cpp computes a window in layers 0, 2, 4, ... and none in layers 1, 3, 5, ...")
    if config.num_hidden_layers == 46 and config.head_dim != config.hidden_size // config.num_attention_heads:
        lines.append("it has 46 layers, and llama.cpp takes that for Gemma 2 27B, which scales its scores otherwise")
    return lines


COVERED: dict[str, Covered] = {  # by the type in transformers
    "llama": Covered("llama", SILU, _nothing),
    "mistral": Covered("llama", SILU, _no_windows),
    "qwen2": Covered("qwen2", SILU, _no_windows),
    "qwen3": Covered("qwen3", SILU, _qwen3),
    "stablelm": Covered("stablelm", SILU, _nothing),
    "gpt2": Covered("gpt2", TANH_GELU, _nothing),
    "gemma2": Covered("gemma2", TANH_GELU, _gemma2),
}
