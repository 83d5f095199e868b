"""StarCoder 2: LayerNorm, RoPE, a plain network."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import PLAIN, activation, hidden_width, sizes_of
from components.architecture.layouts import layout_of, network, raise_refused, self_attention, softmax
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, layers, linear, norm_rules, projections, tables, two_norms
from toolkit.architectures import Layout, Model, Part, architecture


@architecture
class Starcoder2:
    """LayerNorm before each sublayer, RoPE, a plain network, biases on all matrices or on none, perhaps a window."""

    model_type = "starcoder2"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, PLAIN),
            "norm_epsilon": model.knob("norm", "eps", 1e-5),
            "use_bias": model.knob("mixer", "bias", False),
            "sliding_window": model.knob("attention", "window"),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = rope(config, config.hidden_size // config.num_attention_heads, refused)
        ffn = network(PLAIN, config.hidden_act, config.use_bias, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.norm_epsilon, "bias": True})
        attention, mixer = softmax(config.sliding_window), self_attention(config.use_bias)
        return layout_of(config, Part("PreNorm"), mixer, position, attention, norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", True)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", config.use_bias)
            rules += linear(f"{ours}.ffn.up", f"{theirs}.mlp.c_fc", config.use_bias)
            rules += linear(f"{ours}.ffn.down", f"{theirs}.mlp.c_proj", config.use_bias)
            rules += two_norms(ours, theirs, True)
        return rules
