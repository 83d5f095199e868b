"""Architectures of transformers, in parts of the shelf: what each config stands for, and where its tensors are.

Names of tensors: ours are those of GPT and of the parts in this folder; theirs are those of a model in memory, which
the library may rename when it writes a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.architectures import (
    Change,
    Constant,
    Knobs,
    Layout,
    Model,
    Part,
    Permuted,
    Rule,
    Sizes,
    Transposed,
    architecture,
    same_layers,
)

Rules = list[Rule | Constant]
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")  # one function under many names
PLAIN = {  # activation in transformers: the network with two matrices
    "gelu": Part("GELU", {"tanh": False}),
    **dict.fromkeys(TANH_GELU, Part("GELU", {"tanh": True})),
    "relu": Part("ReLU"),
    "silu": Part("SiLU"),
    "swish": Part("SiLU"),
    "relu2": Part("SquaredReLU"),
}
GATED = {  # activation in transformers: the network with three matrices
    "silu": Part("SwiGLU"),
    "swish": Part("SwiGLU"),
    "gelu": Part("GEGLU", {"tanh": False}),
    **dict.fromkeys(TANH_GELU, Part("GEGLU", {"tanh": True})),
    "relu": Part("ReGLU"),
    "sigmoid": Part("GLU"),
    "linear": Part("Bilinear"),
}


@architecture
class StableLm:
    """LayerNorm before each sublayer or one for both, RoPE on a share of the channels, SwiGLU: our default."""

    model_type = "stablelm"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, GATED),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "use_qkv_bias": model.knob("mixer", "bias", False),
            "qk_layernorm": False,
            "use_parallel_residual": _is_parallel(model),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        head_dim = config.hidden_size // config.num_attention_heads
        refused = _unequal(config, qk_layernorm=False)
        position = _rope(config, head_dim, refused, partial=True)
        ffn = _network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": True})
        block = Part("Parallel", {"two_norms": False}) if config.use_parallel_residual else Part("PreNorm")
        _raise(self.model_type, refused)
        mixer = _self_attention(config.use_qkv_bias)
        return _layout(config, block, mixer, position, _softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", True)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", config.use_qkv_bias, out_bias=False)
            rules += _gated_network(config, ours, f"{theirs}.mlp", False)
            if config.use_parallel_residual:
                rules += _norm(f"{ours}.norm", f"{theirs}.input_layernorm", True)
            else:
                rules += _two_norms(ours, theirs, True)
        return rules


@architecture
class Llama:
    """RMSNorm before each sublayer, RoPE (plain, linear, YaRN), SwiGLU."""

    model_type = "llama"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "attention_bias": model.knob("mixer", "bias", False),
            "mlp_bias": model.knob("ffn", "bias", False),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = _rope(config, config.head_dim, refused)
        ffn = _network(GATED, config.hidden_act, config.mlp_bias, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        mixer = _self_attention(config.attention_bias, head_dim=_wide(config))
        return _layout(config, Part("PreNorm"), mixer, position, _softmax(), _rms_norm(config), ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", config.attention_bias)
            rules += _gated_network(config, ours, f"{theirs}.mlp", config.mlp_bias)
            rules += _two_norms(ours, theirs, False)
        return rules


@architecture
class Mistral:
    """Llama without biases, in which every layer may see a window of the last positions."""

    model_type = "mistral"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "sliding_window": model.knob("attention", "window"),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = _rope(config, config.head_dim, refused)
        ffn = _network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        attention = _softmax(config.sliding_window)
        mixer = _self_attention(False, head_dim=_wide(config))
        return _layout(config, Part("PreNorm"), mixer, position, attention, _rms_norm(config), ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", False)
            rules += _gated_network(config, ours, f"{theirs}.mlp", False)
            rules += _two_norms(ours, theirs, False)
        return rules


@architecture
class Qwen2:
    """Llama with biases on q, k and v alone, in which some layers may see a window of the last positions."""

    model_type = "qwen2"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "rope_parameters": _rope_parameters(model),
            **_windows_of(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = _rope(config, config.hidden_size // config.num_attention_heads, refused)
        ffn = _network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        layout = _layout(config, Part("PreNorm"), _self_attention(True), position, _softmax(), _rms_norm(config), ffn)
        return _with_windows(layout, config)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", True, out_bias=False)
            rules += _gated_network(config, ours, f"{theirs}.mlp", False)
            rules += _two_norms(ours, theirs, False)
        return rules


@architecture
class Qwen3:
    """Llama with an RMSNorm on each head of q and k, in which some layers may see a window of the last positions."""

    model_type = "qwen3"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "attention_bias": model.knob("mixer", "bias", False),
            "rope_parameters": _rope_parameters(model),
            **_windows_of(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = _rope(config, config.head_dim, refused)
        ffn = _network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        norm = _rms_norm(config)
        mixer = _self_attention(config.attention_bias, qk_norm=norm, head_dim=_wide(config))
        return _with_windows(_layout(config, Part("PreNorm"), mixer, position, _softmax(), norm, ffn), config)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", config.attention_bias)
            rules += _norm(f"{ours}.mixer.q_norm", f"{theirs}.self_attn.q_norm", False)
            rules += _norm(f"{ours}.mixer.k_norm", f"{theirs}.self_attn.k_norm", False)
            rules += _gated_network(config, ours, f"{theirs}.mlp", False)
            rules += _two_norms(ours, theirs, False)
        return rules


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
            "n_inner": _hidden(model),
            "activation_function": _activation(model, PLAIN),
            "layer_norm_epsilon": model.knob("norm", "eps", 1e-5),
            "tie_word_embeddings": sizes.tie_embeddings,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def layout(self, config: Any) -> Layout:
        refused = _unequal(
            config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
        )
        hidden = config.n_inner or 4 * config.n_embd
        ffn = _network(PLAIN, config.activation_function, True, hidden, refused)
        _raise(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_epsilon, "bias": True})
        return _layout(config, Part("PreNorm"), _self_attention(True), (Part("Learned"),), _softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "transformer.wte", "lm_head") + _norm("norm", "transformer.ln_f", True)
        rules += [Rule("positions.0.table.weight", "transformer.wpe.weight")]
        for ours, theirs in _layers(config, "transformer.h"):
            rules += _norm(f"{ours}.mixer_norm", f"{theirs}.ln_1", True)
            rules += _norm(f"{ours}.ffn_norm", f"{theirs}.ln_2", True)
            for layer, module in (
                ("mixer.qkv", "attn.c_attn"),
                ("mixer.out", "attn.c_proj"),
                ("ffn.up", "mlp.c_fc"),
                ("ffn.down", "mlp.c_proj"),
            ):
                rules += _linear(f"{ours}.{layer}", f"{theirs}.{module}", True, changes=(Transposed(),))
        return rules


@architecture
class GPTNeoX:
    """GPT-NeoX and Pythia: LayerNorm before each sublayer or two norms in parallel, RoPE on a share of the channels, a
    plain network with biases, no grouped heads."""

    model_type = "gpt_neox"

    def config(self, model: Model) -> dict[str, Any]:
        sizes = _sizes_of(model)
        del sizes["num_key_value_heads"]
        return {
            **sizes,
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, PLAIN),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "attention_bias": model.knob("mixer", "bias", False),
            "use_parallel_residual": _is_parallel(model),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = _rope(config, config.hidden_size // config.num_attention_heads, refused, partial=True)
        ffn = _network(PLAIN, config.hidden_act, True, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        block = Part("Parallel", {"two_norms": True}) if config.use_parallel_residual else Part("PreNorm")
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": True})
        return _layout(config, block, _self_attention(config.attention_bias), position, _softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "gpt_neox.embed_in", "lm_head") + _norm("norm", "gpt_neox.final_layer_norm", True)
        mixer_norm = "norm" if config.use_parallel_residual else "mixer_norm"
        by_head = (Permuted(_by_head(config.num_attention_heads, config.hidden_size)),)
        for ours, theirs in _layers(config, "gpt_neox.layers"):
            bias = config.attention_bias
            rules += _linear(f"{ours}.mixer.qkv", f"{theirs}.attention.query_key_value", bias, changes=by_head)
            rules += _linear(f"{ours}.mixer.out", f"{theirs}.attention.dense", bias)
            rules += _linear(f"{ours}.ffn.up", f"{theirs}.mlp.dense_h_to_4h", True)
            rules += _linear(f"{ours}.ffn.down", f"{theirs}.mlp.dense_4h_to_h", True)
            rules += _norm(f"{ours}.{mixer_norm}", f"{theirs}.input_layernorm", True)
            rules += _norm(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", True)
        return rules


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
        refused = _unequal(config, no_bias=True, logit_scale=None)
        refused += _unequal(attention, alibi=True, alibi_bias_max=8, clip_qkv=None, qk_ln=False, prefix_lm=False)
        default_scale = (config.d_model / config.n_heads) ** -0.5
        if attention.softmax_scale not in (None, default_scale):
            refused.append(f"attn_config.softmax_scale = {attention.softmax_scale}: it must be None")
        _raise(self.model_type, refused)
        ffn = (Part("GELU", {"bias": False, "tanh": False}, {"hidden": None}),)
        norm = Part("LayerNorm", {"eps": config.layer_norm_epsilon, "bias": False})
        mixer = _self_attention(False)
        return _layout(config, Part("PreNorm"), mixer, (Part("ALiBi"),), _softmax(bias=True), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "transformer.wte", "lm_head") + _norm("norm", "transformer.norm_f", False)
        for ours, theirs in _layers(config, "transformer.blocks"):
            rules += _norm(f"{ours}.mixer_norm", f"{theirs}.norm_1", False)
            rules += _norm(f"{ours}.ffn_norm", f"{theirs}.norm_2", False)
            rules += _linear(f"{ours}.mixer.qkv", f"{theirs}.attn.Wqkv", False)
            rules += _linear(f"{ours}.mixer.out", f"{theirs}.attn.out_proj", False)
            rules += _linear(f"{ours}.ffn.up", f"{theirs}.ffn.up_proj", False)
            rules += _linear(f"{ours}.ffn.down", f"{theirs}.ffn.down_proj", False)
        return rules


@architecture
class Phi:
    """One LayerNorm for both sublayers in parallel, RoPE on a share of the channels, a plain network, biases
    everywhere; the output matrix has a bias of 0."""

    model_type = "phi"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, PLAIN),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = _unequal(config, qk_layernorm=False)
        position = _rope(config, config.hidden_size // config.num_attention_heads, refused, partial=True)
        ffn = _network(PLAIN, config.hidden_act, True, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": True})
        block = Part("Parallel", {"two_norms": False})
        return _layout(config, block, _self_attention(True), position, _softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.final_layernorm", True)
        rules.append(Constant("theirs", "lm_head.bias"))
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", True, out="dense")
            rules += _linear(f"{ours}.ffn.up", f"{theirs}.mlp.fc1", True)
            rules += _linear(f"{ours}.ffn.down", f"{theirs}.mlp.fc2", True)
            rules += _norm(f"{ours}.norm", f"{theirs}.input_layernorm", True)
        return rules


@architecture
class Starcoder2:
    """LayerNorm before each sublayer, RoPE, a plain network, biases on all matrices or on none, perhaps a window."""

    model_type = "starcoder2"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, PLAIN),
            "norm_epsilon": model.knob("norm", "eps", 1e-5),
            "use_bias": model.knob("mixer", "bias", False),
            "sliding_window": model.knob("attention", "window"),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused: list[str] = []
        position = _rope(config, config.hidden_size // config.num_attention_heads, refused)
        ffn = _network(PLAIN, config.hidden_act, config.use_bias, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.norm_epsilon, "bias": True})
        attention, mixer = _softmax(config.sliding_window), _self_attention(config.use_bias)
        return _layout(config, Part("PreNorm"), mixer, position, attention, norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", True)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", config.use_bias)
            rules += _linear(f"{ours}.ffn.up", f"{theirs}.mlp.c_fc", config.use_bias)
            rules += _linear(f"{ours}.ffn.down", f"{theirs}.mlp.c_proj", config.use_bias)
            rules += _two_norms(ours, theirs, True)
        return rules


@architecture
class Cohere:
    """One LayerNorm without bias for both sublayers in parallel, RoPE, SwiGLU. Theirs rotates neighbouring channels."""

    model_type = "cohere"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "intermediate_size": _hidden(model),
            "hidden_act": _activation(model, GATED),
            "layer_norm_eps": model.knob("norm", "eps", 1e-5),
            "logit_scale": 1.0,
            "attention_bias": model.knob("mixer", "bias", False),
            "use_qk_norm": False,
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = _unequal(config, use_qk_norm=False, logit_scale=1.0)
        position = _rope(config, config.hidden_size // config.num_attention_heads, refused)
        ffn = _network(GATED, config.hidden_act, False, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        norm = Part("LayerNorm", {"eps": config.layer_norm_eps, "bias": False})
        block, mixer = Part("Parallel", {"two_norms": False}), _self_attention(config.attention_bias)
        return _layout(config, block, mixer, position, _softmax(), norm, ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", config.attention_bias, neighbours=True)
            rules += _gated_network(config, ours, f"{theirs}.mlp", False)
            rules += _norm(f"{ours}.norm", f"{theirs}.input_layernorm", False)
        return rules


@architecture
class Gemma2:
    """RMSNorm (gain - 1 is learned) around each sublayer, GEGLU, embeddings times sqrt(C), soft caps, some windows."""

    model_type = "gemma2"

    def config(self, model: Model) -> dict[str, Any]:
        windows = [layer["attention"].knobs.get("window") for layer in model.layers]
        return {
            **_sizes_of(model),
            "head_dim": model.head_dim,
            "query_pre_attn_scalar": model.head_dim,
            "intermediate_size": _hidden(model),
            "hidden_activation": _activation(model, GATED),
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "attention_bias": model.knob("mixer", "bias", False),
            "sliding_window": next(filter(None, windows), None),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
            "attn_logit_softcapping": model.knob("attention", "softcap"),
            "final_logit_softcapping": model.sizes.logit_softcap,
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = _unequal(config, query_pre_attn_scalar=config.head_dim)
        if config.use_bidirectional_attention:
            refused.append("use_bidirectional_attention: attention must be causal")
        position = _rope(config, config.head_dim, refused)
        ffn = _network(GATED, config.hidden_activation, False, config.intermediate_size, refused)
        _raise(self.model_type, refused)
        cap = config.attn_logit_softcapping
        norm = Part("RMSNorm", {"eps": config.rms_norm_eps, "gain": True, "gain_minus_one": True})
        mixer = _self_attention(config.attention_bias, head_dim=_wide(config))
        return _with_windows(
            _layout(config, Part("Sandwich"), mixer, position, _softmax(softcap=cap), norm, ffn), config, cap
        )

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", config.attention_bias)
            rules += _gated_network(config, ours, f"{theirs}.mlp", False)
            for norm, their_norm in (
                ("mixer_norm", "input_layernorm"),
                ("mixer_out_norm", "post_attention_layernorm"),
                ("ffn_norm", "pre_feedforward_layernorm"),
                ("ffn_out_norm", "post_feedforward_layernorm"),
            ):
                rules += _norm(f"{ours}.{norm}", f"{theirs}.{their_norm}", False)
        return rules


@architecture
class Mixtral:
    """Llama without biases whose networks are mixtures of SwiGLU experts, perhaps with a window."""

    model_type = "mixtral"

    def config(self, model: Model) -> dict[str, Any]:
        return {
            **_sizes_of(model),
            "head_dim": model.head_dim,
            "intermediate_size": _hidden(model),
            "hidden_act": "silu",
            "rms_norm_eps": model.knob("norm", "eps", 1e-6),
            "num_local_experts": model.knob("ffn", "experts", 8),
            "num_experts_per_tok": model.knob("ffn", "top_k", 2),
            "router_aux_loss_coef": model.knob("ffn", "balance", 0.01),
            "sliding_window": model.knob("attention", "window"),
            "rope_parameters": _rope_parameters(model),
        }

    def layout(self, config: Any) -> Layout:
        refused = _unequal(config, hidden_act="silu")
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        position = _rope(config, head_dim, refused)
        _raise(self.model_type, refused)
        experts = {"experts": config.num_local_experts, "top_k": config.num_experts_per_tok}
        further = {"hidden": config.intermediate_size, "balance": config.router_aux_loss_coef}
        ffn = (Part("MixtureOfExperts", experts, further),)
        attention, mixer = _softmax(config.sliding_window), _self_attention(False, head_dim=_wide(config))
        return _layout(config, Part("PreNorm"), mixer, position, attention, _rms_norm(config), ffn)

    def rules(self, config: Any) -> Rules:
        rules = _tables(config, "model.embed_tokens", "lm_head") + _norm("norm", "model.norm", False)
        for ours, theirs in _layers(config, "model.layers"):
            rules += _projections(config, ours, f"{theirs}.self_attn", False)
            rules += _two_norms(ours, theirs, False)
            rules.append(Rule(f"{ours}.ffn.router.weight", f"{theirs}.mlp.gate.weight"))
            for expert in range(config.num_local_experts):
                for layer, stack in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                    name = f"{ours}.ffn.experts.{expert}.{layer}.weight"
                    rules.append(Rule(name, f"{theirs}.mlp.experts.{stack}", their_index=expert))
        return rules


# ---- what a config of transformers stands for ------------------------------------------------------------------------


def _layout(
    config: Any,
    block: Part,
    mixer: Part,
    position: Sequence[Part],
    attention: Sequence[Part],
    norm: Part,
    ffn: Sequence[Part],
) -> Layout:
    """The layout of a config in which every layer has the same parts."""
    sizes = Sizes(
        vocab_size=config.vocab_size,
        max_len=getattr(config, "max_seq_len", None) or config.max_position_embeddings,
        dim=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_kv_head=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        tie_embeddings=config.tie_word_embeddings,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        embed_scale=config.hidden_size**0.5 if config.model_type == "gemma2" else 1.0,
    )
    layers = same_layers(
        sizes.n_layer, block=[block], mixer=[mixer], position=position, attention=attention, norm=[norm], ffn=ffn
    )
    return Layout(sizes, layers, (norm,))


def _with_windows(layout: Layout, config: Any, softcap: float | None = None) -> Layout:
    """The layout with a window in those layers that have the type "sliding_attention"."""
    layers = tuple(
        layer | {"attention": _softmax(config.sliding_window, softcap)} if kind == "sliding_attention" else layer
        for layer, kind in zip(layout.layers, config.layer_types, strict=True)
    )
    return Layout(layout.sizes, layers, layout.norm)


def _softmax(window: int | None = None, softcap: float | None = None, bias: bool = False) -> tuple[Part, ...]:
    """The kernels that compute softmax attention; ``bias``: only those that take a score bias."""
    flex = Part("FlexAttention", {"window": window, "softcap": softcap})
    if window is not None and softcap is not None:
        return (flex,)
    if window is not None:
        return (Part("SlidingWindow", {"window": window}), flex)
    if softcap is not None:
        return (Part("SoftcapAttention", {"softcap": softcap}), flex)
    plain = (Part("SDPA"), Part("MathAttention"), flex)
    return plain if bias else (Part("FlashAttention"), *plain)


def _self_attention(bias: bool, qk_norm: Part | None = None, head_dim: int | None = None) -> Part:
    """``head_dim``: None if it is C / H. Of ours, its value shows in the shapes of the tensors."""
    knobs: dict[str, object] = {"bias": bias, "qk_norm": qk_norm, "gate": False}
    if qk_norm is not None:
        knobs["qk_norm_after_rotation"] = False
    return Part("SelfAttention", knobs, {"head_dim": head_dim})


def _rms_norm(config: Any) -> Part:
    return Part("RMSNorm", {"eps": config.rms_norm_eps, "gain": True, "gain_minus_one": False})


def _wide(config: Any) -> int | None:
    """The channels of a head; None if they are C / H, as usual."""
    usual = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or usual
    return None if head_dim == usual else head_dim


def _network(table: dict[str, Part], activation: str, bias: bool, hidden: int, refused: list[str]) -> tuple[Part, ...]:
    """The feed-forward network with an activation; adds a line to ``refused`` for one that no part has."""
    part = table.get(activation)
    if part is None:
        refused.append(f"the activation {activation!r}: it must be one of {', '.join(table)}")
        return ()
    return (Part(part.name, {"bias": bias, **part.knobs}, {"hidden": hidden}),)


def _rope(config: Any, head_dim: int, refused: list[str], partial: bool = False) -> tuple[Part, ...]:
    """The position parts of a config's rope_parameters; adds lines to ``refused`` for what no part computes.
    ``partial``: the architecture can rotate a share of the channels."""
    rope = dict(config.rope_parameters)
    theta, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    width = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))  # channels of a head that are rotated
    if width != head_dim and not partial:
        refused.append(f"it rotates all {head_dim} channels of a head, not {width}")
    if width % 2 or width < 2:
        refused.append(f"rope_parameters rotate {width} channels of {head_dim}: it must be an even number")
    if kind == "default":
        turned = Part(
            "RoPE",
            {"theta": theta},
            {"fraction": width / head_dim},
            lambda knobs: max(2, 2 * round(float(str(knobs["fraction"])) * head_dim / 2)) == width,
        )
        whole = (Part("NTKRoPE", where=lambda knobs: math.isclose(_ntk_theta(knobs, head_dim), theta)),)
        return (turned, *(whole if width == head_dim else ()))
    if width != head_dim:
        refused.append(f"rope_type {kind!r} on {width} of {head_dim} channels: it must be on all of them")
    if kind == "linear":
        return (Part("LinearRoPE", {"theta": theta, "scale": float(rope["factor"])}),)
    if kind == "yarn":
        return _yarn(config, rope, theta, refused)
    refused.append(f"rope_type {kind!r}: it must be default, linear or yarn")
    return ()


def _yarn(config: Any, rope: dict[str, Any], theta: float, refused: list[str]) -> tuple[Part, ...]:
    scale, length = float(rope["factor"]), rope["original_max_position_embeddings"]
    usual = 0.1 * math.log(scale) + 1
    if (
        not math.isclose(rope.get("attention_factor") or usual, usual)
        or rope.get("mscale")
        or not rope.get("truncate", True)
    ):
        refused.append("rope_type 'yarn': attention_factor, mscale and truncate must have their defaults")
    knobs = {
        "theta": theta,
        "scale": scale,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
    }
    max_len = config.max_position_embeddings
    return (
        Part("YaRN", knobs, {"original_len": length}, lambda own: (own["original_len"] or max_len / scale) == length),
    )


def _ntk_theta(knobs: Knobs, head_dim: int) -> float:
    """The theta of plain RoPE that NTKRoPE amounts to."""
    return float(str(knobs["theta"])) * float(str(knobs["scale"])) ** (head_dim / max(head_dim - 2, 1))


def _unequal(config: Any, **required: object) -> list[str]:
    """A line for each entry of a config that does not have the only value that our parts compute."""
    return [
        f"{name} = {getattr(config, name)!r}: it must be {value!r}"
        for name, value in required.items()
        if getattr(config, name) != value
    ]


def _raise(model_type: str, refused: list[str]) -> None:
    if refused:
        raise ValueError("\n".join(f"{model_type}: {line}" for line in refused))


# ---- a config for a model of ours ------------------------------------------------------------------------------------


def _sizes_of(model: Model) -> dict[str, Any]:
    sizes = model.sizes
    return {
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.max_len,
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_kv_head,
        "tie_word_embeddings": sizes.tie_embeddings,
    }


def _hidden(model: Model) -> int:
    """The width of the first layer's network."""
    names = ("blocks.0.ffn.down.weight", "blocks.0.ffn.experts.0.down.weight")
    return next((model.shapes[name][1] for name in names if name in model.shapes), 4 * model.sizes.dim)


def _activation(model: Model, table: dict[str, Part]) -> str:
    """The name in transformers of the activation of the first layer's network; the first of the table if it has none
    of these."""
    own = model.layers[0]["ffn"]
    tanh = own.knobs.get("tanh", False)
    fitting = (name for name, part in table.items() if part.name == own.name and part.knobs.get("tanh", False) == tanh)
    return next(fitting, next(iter(table)))


def _is_parallel(model: Model) -> bool:
    return model.layers[0]["block"].name == "Parallel"


def _windows_of(model: Model) -> dict[str, Any]:
    """Which layers see a window, as Qwen writes it."""
    windows = [layer["attention"].knobs.get("window") for layer in model.layers]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": next(filter(None, windows), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _rope_parameters(model: Model) -> dict[str, Any]:
    """``rope_parameters`` for the first layer's position part."""
    part = model.layers[0]["position"]
    head_dim, knobs = model.head_dim, part.knobs
    width = max(2, 2 * round(float(str(knobs.get("fraction", 1.0))) * head_dim / 2))
    theta = _ntk_theta(knobs, head_dim) if part.name == "NTKRoPE" else knobs.get("theta", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": width / head_dim}
    if part.name == "LinearRoPE":
        rope |= {"rope_type": "linear", "factor": knobs["scale"]}
    if part.name == "YaRN":
        length = knobs["original_len"] or model.sizes.max_len / float(str(knobs["scale"]))
        rope |= {
            "rope_type": "yarn",
            "factor": knobs["scale"],
            "original_max_position_embeddings": int(float(str(length))),
            "beta_fast": knobs["beta_fast"],
            "beta_slow": knobs["beta_slow"],
        }
    return rope


# ---- which tensor is which -------------------------------------------------------------------------------------------


def _layers(config: Any, theirs: str) -> Iterator[tuple[str, str]]:
    """(our name, their name) of each layer."""
    return ((f"blocks.{i}", f"{theirs}.{i}") for i in range(config.num_hidden_layers))


def _tables(config: Any, embed: str, unembed: str) -> Rules:
    """The embedding table and, if it is another one, the output matrix."""
    rows = (0, config.vocab_size)
    rules: Rules = [Rule("embed.weight", f"{embed}.weight", rows)]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", f"{unembed}.weight", rows))
    return rules


def _linear(
    ours: str,
    theirs: str,
    bias: bool,
    rows: tuple[int, int] | None = None,
    changes: tuple[Change, ...] = (),
) -> Rules:
    """Weight and, if there is one, bias of a linear layer. A bias is never transposed."""
    rules: Rules = [Rule(f"{ours}.weight", f"{theirs}.weight", rows, changes=changes)]
    if bias:
        kept = tuple(change for change in changes if not isinstance(change, Transposed))
        rules.append(Rule(f"{ours}.bias", f"{theirs}.bias", rows, changes=kept))
    return rules


def _norm(ours: str, theirs: str, bias: bool) -> Rules:
    rules: Rules = [Rule(f"{ours}.weight", f"{theirs}.weight")]
    return rules + ([Rule(f"{ours}.bias", f"{theirs}.bias")] if bias else [])


def _two_norms(ours: str, theirs: str, bias: bool) -> Rules:
    """The norms before the two sublayers, by the names that most architectures have."""
    return [
        *_norm(f"{ours}.mixer_norm", f"{theirs}.input_layernorm", bias),
        *_norm(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", bias),
    ]


def _projections(
    config: Any,
    ours: str,
    theirs: str,
    bias: bool,
    out_bias: bool | None = None,
    out: str = "o_proj",
    neighbours: bool = False,
) -> Rules:
    """The four projections of attention. ``out_bias`` False: theirs has biases on q, k and v alone. ``neighbours``:
    theirs rotates channels 2i and 2i + 1, ours i and i + D/2."""
    head_dim = _wide(config) or config.hidden_size // config.num_attention_heads
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    rules: Rules = []
    start = 0
    for name, count in heads.items():
        rows = (start, start + count * head_dim)
        changes = (Permuted(_interleaved(count, head_dim)),) if neighbours and name != "v" else ()
        rules += _linear(f"{ours}.mixer.qkv", f"{theirs}.{name}_proj", bias, rows, changes)
        start = rows[1]
    has_out_bias = bias if out_bias is None else out_bias
    rules += _linear(f"{ours}.mixer.out", f"{theirs}.{out}", has_out_bias)
    return rules + ([Constant("ours", f"{ours}.mixer.out.bias")] if bias and not has_out_bias else [])


def _gated_network(config: Any, ours: str, theirs: str, bias: bool) -> Rules:
    """gate and up, which ours merges, and down."""
    hidden = config.intermediate_size
    return [
        *_linear(f"{ours}.ffn.gate_up", f"{theirs}.gate_proj", bias, (0, hidden)),
        *_linear(f"{ours}.ffn.gate_up", f"{theirs}.up_proj", bias, (hidden, 2 * hidden)),
        *_linear(f"{ours}.ffn.down", f"{theirs}.down_proj", bias),
    ]


def _interleaved(heads: int, head_dim: int) -> tuple[int, ...]:
    """The row of ours for each row of theirs, which rotates neighbours: 0, D/2, 1, D/2 + 1, ... in each head."""
    half = head_dim // 2
    return tuple(head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in (0, 1))


def _by_head(heads: int, dim: int) -> tuple[int, ...]:
    """The row of ours, with all heads of q first, for each row of theirs, with q, k and v of a head together."""
    head_dim = dim // heads
    return tuple(
        part * dim + head * head_dim + i for head in range(heads) for part in range(3) for i in range(head_dim)
    )
