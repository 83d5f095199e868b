"""GPT-2: learned positions."""

from __future__ import annotations

from typing import Any

from components.architecture.entries import PLAIN, activation, hidden_width
from components.architecture.layouts import layout_of, network, raise_refused, self_attention, softmax, unequal
from components.architecture.rules import Rules, layers, linear, norm_rules, tables
from toolkit.architectures import Layout, Model, Part, Rule, Transposed, architecture


@architecture
class GPT2:
    """LayerNorm before each sublayer, learned positions, a plain network, biases everywhere, no grouped heads."""

    model_type = "gpt2"

    def config(self, model: Model) -> dict[str, Any]:
        sizes = model.sizes
        return {
            "vocab_size": sizes.vocab_size,
            "n_positions": sizes.max_len,
            "n_embd": sizes.dim,
            "n_layer": sizes.n_layer,
            "n_head": sizes.n_head,
            "n_inner": hidden_width(model),
            "activation_function": activation(model, PLAIN),
            "layer_norm_epsilon": model.knob("norm", "eps", 1e-5),
            "tie_word_embeddings": sizes.tie_embeddings,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def layout(self, config: Any) -> Layout:
        refused = unequal(
            config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
        )
        hidden = config.n_inner or 4 * config.n_embd
        ffn = network(PLAIN, config.activation_function, True, hidden, refused)
        raise_refused(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_epsilon, "bias": True})
        return layout_of(config, Part("PreNorm"), self_attention(True), (Part("Learned"),), softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = tables(config, "transformer.wte", "lm_head") + norm_rules("norm", "transformer.ln_f", True)
        rules += [Rule("positions.0.table.weight", "transformer.wpe.weight")]
        for ours, theirs in layers(config, "transformer.h"):
            rules += norm_rules(f"{ours}.mixer_norm", f"{theirs}.ln_1", True)
            rules += norm_rules(f"{ours}.ffn_norm", f"{theirs}.ln_2", True)
            for layer, module in (
                ("mixer.qkv", "attn.c_attn"),
                ("mixer.out", "attn.c_proj"),
                ("ffn.up", "mlp.c_fc"),
                ("ffn.down", "mlp.c_proj"),
            ):
                rules += linear(f"{ours}.{layer}", f"{theirs}.{module}", True, changes=(Transposed(),))
        return rules
