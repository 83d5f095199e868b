"""Phi: one norm for both sublayers in parallel, biases everywhere."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import PLAIN, activation, hidden_width, sizes_of
from components.architecture.layouts import layout_of, network, raise_refused, self_attention, softmax, unequal
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, layers, linear, norm_rules, projections, tables
from toolkit.architectures import Constant, Layout, Model, Part, architecture


@architecture
class Phi:
    """One LayerNorm for both sublayers in parallel, RoPE on a share of the channels, a plain network, biases
    everywhere; the output matrix has a bias of 0."""

    model_type = "phi"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, PLAIN),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = unequal(config, qk_layernorm=False)
        position = rope(config, config.hidden_size // config.num_attention_heads, refused, partial=True)
        ffn = network(PLAIN, config.hidden_act, True, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": True})
        block = Part("Parallel", {"two_norms": False})
        return layout_of(config, block, self_attention(True), position, softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.final_layernorm", True)
        rules.append(Constant("theirs", "lm_head.bias"))
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", True, out="dense")
            rules += linear(f"{ours}.ffn.up", f"{theirs}.mlp.fc1", True)
            rules += linear(f"{ours}.ffn.down", f"{theirs}.mlp.fc2", True)
            rules += norm_rules(f"{ours}.norm", f"{theirs}.input_layernorm", True)
        return rules
