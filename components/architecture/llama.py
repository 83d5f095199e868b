"""Llama and its kin: RMSNorm before each sublayer, RoPE, SwiGLU."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import GATED, activation, hidden_width, sizes_of, windows_of
from components.architecture.layouts import (
    head_dim_knob,
    layout_of,
    network,
    raise_refused,
    rms_norm,
    self_attention,
    softmax,
    with_windows,
)
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, gated_network, layers, norm_rules, projections, tables, two_norms
from toolkit.architectures import Layout, Model, Part, architecture


@architecture
class Llama:
    """RMSNorm before each sublayer, RoPE (plain, linear, YaRN, Llama 3), SwiGLU."""

    model_type = "llama"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "attention_bias": model.knob("mixer", "bias", False),
            "mlp_bias": model.knob("ffn", "bias", False),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = rope(config, config.head_dim, refused)
        ffn = network(GATED, config.hidden_act, config.mlp_bias, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        mixer = self_attention(config.attention_bias, head_dim=head_dim_knob(config))
        return layout_of(config, Part("PreNorm"), mixer, position, softmax(), rms_norm(config), ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", config.attention_bias)
            rules += gated_network(config, ours, f"{theirs}.mlp", config.mlp_bias)
            rules += two_norms(ours, theirs, False)
        return rules


@architecture
class Mistral:
    """Llama without biases, in which every layer may see a window of the last positions."""

    model_type = "mistral"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "sliding_window": model.knob("attention", "window"),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = rope(config, config.head_dim, refused)
        ffn = network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        attention = softmax(config.sliding_window)
        mixer = self_attention(False, head_dim=head_dim_knob(config))
        return layout_of(config, Part("PreNorm"), mixer, position, attention, rms_norm(config), ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", False)
            rules += gated_network(config, ours, f"{theirs}.mlp", False)
            rules += two_norms(ours, theirs, False)
        return rules


@architecture
class Qwen2:
    """Llama with biases on q, k and v alone, in which some layers may see a window of the last positions."""

    model_type = "qwen2"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "rope_parameters": rope_parameters(model),
            **windows_of(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = rope(config, config.hidden_size // config.num_attention_heads, refused)
        ffn = network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        layout = layout_of(config, Part("PreNorm"), self_attention(True), position, softmax(), rms_norm(config), ffn)
        return with_windows(layout, config)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", True, out_bias=False)
            rules += gated_network(config, ours, f"{theirs}.mlp", False)
            rules += two_norms(ours, theirs, False)
        return rules


@architecture
class Qwen3:
    """Llama with an RMSNorm on each head of q and k, in which some layers may see a window of the last positions."""

    model_type = "qwen3"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": hidden_width(model),
            "hidden_act": activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "attention_bias": model.knob("mixer", "bias", False),
            "rope_parameters": rope_parameters(model),
            **windows_of(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = rope(config, config.head_dim, refused)
        ffn = network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        raise_refused(self.model_type, refused)
        norm = rms_norm(config)
        mixer = self_attention(config.attention_bias, qk_norm=norm, head_dim=head_dim_knob(config))
        return with_windows(layout_of(config, Part("PreNorm"), mixer, position, softmax(), norm, ffn), config)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", config.attention_bias)
            rules += norm_rules(f"{ours}.mixer.q_norm", f"{theirs}.self_attn.q_norm", False)
            rules += norm_rules(f"{ours}.mixer.k_norm", f"{theirs}.self_attn.k_norm", False)
            rules += gated_network(config, ours, f"{theirs}.mlp", False)
            rules += two_norms(ours, theirs, False)
        return rules
