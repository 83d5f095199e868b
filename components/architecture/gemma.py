"""Gemma 2: norms around each sublayer, scaled embeddings, soft caps."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import GATED, activation, hidden_width, sizes_of
from components.architecture.layouts import (
    head_dim_knob,
    layout_of,
    network,
    raise_refused,
    self_attention,
    softmax,
    unequal,
    with_windows,
)
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, gated_network, layers, norm_rules, projections, tables
from toolkit.architectures import Layout, Model, Part, architecture


@architecture
class Gemma2:
    """RMSNorm (gain - 1 is learned) around each sublayer, GEGLU, embeddings times sqrt(C), soft caps, some windows."""

    model_type = "gemma2"

    def config(self, model: Model) -> dict[str, Any]:
        windows = [layer["attention"].knobs.get("window") for layer in model.layers]
        return {
            **sizes_of(model),
            "head_dim": model.head_dim,
            "query_pre_attn_scalar": model.head_dim,
            "intermediate_size": hidden_width(model),
            "hidden_activation": activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "attention_bias": model.knob("mixer", "bias", False),
            "sliding_window": next(filter(None, windows), None),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
            "attn_logit_softcapping": model.knob("attention", "softcap"),
            "final_logit_softcapping": model.sizes.logit_softcap,
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = unequal(config, query_pre_attn_scalar=config.head_dim)
        if config.use_bidirectional_attention:
            refused.append("use_bidirectional_attention: attention must be causal")
        position = rope(config, config.head_dim, refused)
        ffn = network(GATED, config.hidden_activation, False, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        cap = config.attn_logit_softcapping
        norm = Part("RMSNorm", {"eps": config.rms_norm_eps, "gain": True, "gain_minus_one": True})
        mixer = self_attention(config.attention_bias, head_dim=head_dim_knob(config))
        return with_windows(
            layout_of(config, Part("Sandwich"), mixer, position, softmax(softcap=cap), norm, ffn), config, cap
        )

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", config.attention_bias)
            rules += gated_network(config, ours, f"{theirs}.mlp", False)
            for norm, their_norm in (
                ("mixer_norm", "input_layernorm"),
                ("mixer_out_norm", "post_attention_layernorm"),
                ("ffn_norm", "pre_feedforward_layernorm"),
                ("ffn_out_norm", "post_feedforward_layernorm"),
            ):
                rules += norm_rules(f"{ours}.{norm}", f"{theirs}.{their_norm}", False)
        return rules
