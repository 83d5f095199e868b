"""Mixtral: Llama with mixtures of experts."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import hidden_width, sizes_of
from components.architecture.layouts import (
    head_dim_knob,
    layout_of,
    raise_refused,
    rms_norm,
    self_attention,
    softmax,
    unequal,
)
from components.architecture.rotation import rope, rope_parameters
from components.architecture.rules import Rules, layers, norm_rules, projections, tables, two_norms
from toolkit.architectures import Layout, Model, Part, Rule, architecture


@architecture
class Mixtral:
    """Llama without biases whose networks are mixtures of SwiGLU experts, perhaps with a window."""

    model_type = "mixtral"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": hidden_width(model),
            "hidden_act": "silu",
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "num_local_experts": model.knob("ffn", "experts", 8),
            "num_experts_per_tok": model.knob("ffn", "top_k", 2),
            "router_aux_loss_coef": model.knob("ffn", "balance", 0.01),
            "sliding_window": model.knob("attention", "window"),
            "rope_parameters": rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = unequal(config, hidden_act="silu")
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        position = rope(config, head_dim, refused)
        raise_refused(self.model_type, refused)
        experts = {"experts": config.num_local_experts, "top_k": config.num_experts_per_tok}
        further = {"hidden": config.intermediate_size, "balance": config.router_aux_loss_coef}
        ffn = (Part("MixtureOfExperts", experts, further),)
        attention, mixer = softmax(config.sliding_window), self_attention(False, head_dim=head_dim_knob(config))
        return layout_of(config, Part("PreNorm"), mixer, position, attention, rms_norm(config), ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "model.embed_tokens", "lm_head") + norm_rules("norm", "model.norm", False)
        for ours, theirs in layers(config, "model.layers"):
            rules += projections(config, ours, f"{theirs}.self_attn", False)
            rules += two_norms(ours, theirs, False)
            rules.append(Rule(f"{ours}.ffn.router.weight", f"{theirs}.mlp.gate.weight"))
            for expert in range(config.num_local_experts):
                for layer, stack in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                    name = f"{ours}.ffn.experts.{expert}.{layer}.weight"
                    rules.append(Rule(name, f"{theirs}.mlp.experts.{stack}", their_index=expert))
        return rules
