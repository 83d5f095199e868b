"""StableLM: LayerNorm, RoPE on a share of the channels, SwiGLU."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import GATED, activation, hidden_width, is_parallel, sizes_of
from components.architecture.layouts import layout_of, network, raise_refused, self_attention, softmax, unequal
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, gated_network, layers, norm_rules, projections, tables, two_norms
from toolkit.architectures import Layout, Model, Part, architecture


@architecture
class StableLm:
    """LayerNorm before each sublayer or one for both, RoPE on a share of the channels, SwiGLU: our default."""

    model_type = "stablelm"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, GATED),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "use_qkv_bias": model.knob("mixer", "bias", False),
            "qk_layernorm": False,
            "use_parallel_residual": is_parallel(model),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        head_dim = config.hidden_size // config.num_attention_heads
        refused = unequal(config, qk_layernorm=False)
        position = rope(config, head_dim, refused, partial=True)
        ffn = network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": True})
        block = Part("Parallel", {"two_norms": False}) if config.use_parallel_residual else Part("PreNorm")
        raise_refused(self.model_type, refused)
        mixer = self_attention(config.use_qkv_bias)
        return layout_of(config, block, mixer, position, softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", True)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", config.use_qkv_bias, out_bias=False)
            rules += gated_network(config, ours, f"{theirs}.mlp", False)
            if config.use_parallel_residual:
                rules += norm_rules(f"{ours}.norm", f"{theirs}.input_layernorm", True)
            else:
                rules += two_norms(ours, theirs, True)
        return rules
