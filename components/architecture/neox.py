"""GPT-NeoX and Pythia: two norms in parallel."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import PLAIN, activation, hidden_width, is_parallel, sizes_of
from components.architecture.layouts import layout_of, network, raise_refused, self_attention, softmax
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, by_head, layers, linear, norm_rules, tables
from toolkit.architectures import Layout, Model, Part, Permuted, architecture


@architecture
class GPTNeoX:
    """GPT-NeoX and Pythia: LayerNorm before each sublayer or two norms in parallel, RoPE on a share of the channels, a
    plain network with biases, no grouped heads."""

    model_type = "gpt_neox"

    def config(self, model: Model) -> dict[str, Any]:
        sizes = sizes_of(model)
        del sizes["num_key_value_heads"]
        return {
            **sizes,
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, PLAIN),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "attention_bias": model.knob("mixer", "bias", False),
            "use_parallel_residual": is_parallel(model),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = rope(config, config.hidden_size // config.num_attention_heads, refused, partial=True)
        ffn = network(PLAIN, config.hidden_act, True, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        block = Part("Parallel", {"two_norms": True}) if config.use_parallel_residual else Part("PreNorm")
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": True})
        return layout_of(config, block, self_attention(config.attention_bias), position, softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "gpt_neox.embed_in", "lm_head") + norm_rules("norm", "gpt_neox.final_layer_norm", True)
        mixer_norm = "norm" if config.use_parallel_residual else "mixer_norm"
        together = (Permuted(by_head(config.num_attention_heads, config.hidden_size)),)
        for ours, theirs in layers(config, "gpt_neox.layers"):
            bias = config.attention_bias
            rules += linear(f"{ours}.mixer.qkv", f"{theirs}.attention.query_key_value", bias, changes=together)
            rules += linear(f"{ours}.mixer.out", f"{theirs}.attention.dense", bias)
            rules += linear(f"{ours}.ffn.up", f"{theirs}.mlp.dense_h_to_4h", True)
            rules += linear(f"{ours}.ffn.down", f"{theirs}.mlp.dense_4h_to_h", True)
            rules += norm_rules(f"{ours}.{mixer_norm}", f"{theirs}.input_layernorm", True)
            rules += norm_rules(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", True)
        return rules
