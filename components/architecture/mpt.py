"""MPT: ALiBi, no biases."""

from __future__ import annotations

from typing import Any

from components.architecture.layouts import layout_of, raise_refused, self_attention, softmax, unequal
from components.architecture.rules import Rules, layers, linear, norm_rules, tables
from toolkit.architectures import Layout, Model, Part, architecture


@architecture
class Mpt:
    """LayerNorm without bias before each sublayer, ALiBi, an exact GELU of width 4C, no biases, no
    grouped heads."""

    model_type = "mpt"

    def config(self, model: Model) -> dict[str, Any]:
        sizes = model.sizes
        return {
            "vocab_size": sizes.vocab_size,
            "max_seq_len": sizes.max_len,
            "d_model": sizes.dim,
            "n_layers": sizes.n_layer,
            "n_heads": sizes.n_head,
            "layer_norm_epsilon": model.knob("norm", "eps", 1e-5),
            "tie_word_embeddings": sizes.tie_embeddings,
        }

    def layout(self, config: Any) -> Layout:
        attention = config.attn_config
        refused = unequal(config, no_bias=True, logit_scale=None)
        refused += unequal(attention, alibi=True, alibi_bias_max=8, clip_qkv=None, qk_ln=False, prefix_lm=False)
        default_scale = (config.d_model / config.n_heads) ** -0.5
        if attention.softmax_scale not in (None, default_scale):
            refused.append(f"attn_config.softmax_scale = {attention.softmax_scale}: it must be None")
        raise_refused(self.model_type, refused)
        ffn = (Part("GELU", {"bias": False, "tanh": False}, {"hidden": None}),)
        norm = Part("LayerNorm", {"eps": config.layer_norm_epsilon, "bias": False})
        mixer = self_attention(False)
        return layout_of(config, Part("PreNorm"), mixer, (Part("ALiBi"),), softmax(bias=True), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "transformer.wte", "lm_head") + norm_rules("norm", "transformer.norm_f", False)
        for ours, theirs in layers(config, "transformer.blocks"):
            rules += norm_rules(f"{ours}.mixer_norm", f"{theirs}.norm_1", False)
            rules += norm_rules(f"{ours}.ffn_norm", f"{theirs}.norm_2", False)
            rules += linear(f"{ours}.mixer.qkv", f"{theirs}.attn.Wqkv", False)
            rules += linear(f"{ours}.mixer.out", f"{theirs}.attn.out_proj", False)
            rules += linear(f"{ours}.ffn.up", f"{theirs}.ffn.up_proj", False)
            rules += linear(f"{ours}.ffn.down", f"{theirs}.ffn.down_proj", False)
        return rules
