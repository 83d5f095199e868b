"""Entries of a transformers config, made of a model of ours."""

from __future__ import annotations

from typing import Any

from toolkit.architectures import Model, Part

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


def sizes_of(model: Model) -> dict[str, Any]:
    """The sizes by the names that most architectures have."""
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


def hidden_width(model: Model) -> int:
    """The width of the first layer's network."""
    names = ("blocks.0.ffn.down.weight", "blocks.0.ffn.experts.0.down.weight")
    return next((model.shapes[name][1] for name in names if name in model.shapes), 4 * model.sizes.dim)


def activation(model: Model, table: dict[str, Part]) -> str:
    """The name in transformers of the activation of the first layer's network; the first of the table if it has none
    of these."""
    own = model.layers[0]["ffn"]
    tanh = own.knobs.get("tanh", False)
    fitting = (name for name, part in table.items() if part.name == own.name and part.knobs.get("tanh", False) == tanh)
    return next(fitting, next(iter(table)))


def is_parallel(model: Model) -> bool:
    """Whether the first layer's mixer and ffn read the same input."""
    return model.layers[0]["block"].name == "Parallel"


def windows_of(model: Model) -> dict[str, Any]:
    """Which layers see a window, as Qwen writes it."""
    windows = [layer["attention"].knobs.get("window") for layer in model.layers]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": next(filter(None, windows), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }
