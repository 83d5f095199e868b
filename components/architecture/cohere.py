"""Cohere: one norm for both sublayers in parallel, rotation of neighbouring channels."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import GATED, activation, hidden_width, sizes_of
from components.architecture.layouts import layout_of, network, raise_refused, self_attention, softmax, unequal
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, gated_network, layers, norm_rules, projections, tables
from toolkit.architectures import Layout, Model, Part, architecture


@architecture
class Cohere:
    """One LayerNorm without bias for both sublayers in parallel, RoPE, SwiGLU. Theirs rotates neighbouring channels."""

    model_type = "cohere"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, GATED),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "logit_scale": 1.0,
            "attention_bias": model.knob("mixer", "bias", False),
            "use_qk_norm": False,
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = unequal(config, use_qk_norm=False, logit_scale=1.0)
        position = rope(config, config.hidden_size // config.num_attention_heads, refused)
        ffn = network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": False})
        block, mixer = Part("Parallel", {"two_norms": False}), self_attention(config.attention_bias)
        return layout_of(config, block, mixer, position, softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", config.attention_bias, neighbours=True)
            rules += gated_network(config, ours, f"{theirs}.mlp", False)
            rules += norm_rules(f"{ours}.norm", f"{theirs}.input_layernorm", False)
        return rules
