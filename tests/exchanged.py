"""Small random models of transformers, and the same models in our parts, for the tests of ``convert``."""

import json
from pathlib import Path
from typing import Any

import torch

from components.tokenizer import BPE
from toolkit.architectures import ARCHITECTURES
from toolkit.compose import Run, compose, load_shelf
from toolkit.exchange import library, tensors
from toolkit.exchange.bindings import bindings_of

load_shelf()
VOCAB, EOT, CONTEXT = 257, 256, 24  # those of @Bytes
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # grouped heads
    intermediate_size=40,  # of no usual proportion
    max_position_embeddings=CONTEXT,
)
OTHER_NAMES = {
    "gpt2": dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=CONTEXT),
    "mpt": dict(vocab_size=VOCAB, d_model=24, n_layers=2, n_heads=6, max_seq_len=CONTEXT),  # 6 heads: no power of two
}
NO_GROUPS = {"gpt_neox": {"num_key_value_heads": None}, "phi": {"num_key_value_heads": 4}}


def rope(share: float = 1.0, theta: float = 10_000.0, kind: str = "default", **more: float) -> dict[str, Any]:
    """rope_parameters of a config."""
    return {"rope_parameters": dict(rope_type=kind, rope_theta=theta, partial_rotary_factor=share, **more)}


CASES = [  # (model type, entries of its config); the first of each type runs in the default tests
    ("gpt2", dict(activation_function="gelu_new")),
    ("gpt2", dict(tie_word_embeddings=False, activation_function="relu", n_inner=30)),
    ("llama", dict()),
    ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    ("llama", rope(kind="linear", theta=500.0, factor=2.0)),
    ("llama", dict(head_dim=8, vocab_size=317) | rope(kind="yarn", factor=4.0, original_max_position_embeddings=6)),
    (
        "llama",
        rope(kind="llama3", factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=12),
    ),
    ("mistral", dict(sliding_window=7)),
    ("mistral", dict(sliding_window=None, head_dim=10)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ("qwen2", dict(tie_word_embeddings=True)),
    ("qwen3", dict(head_dim=8)),
    ("qwen3", dict(attention_bias=True, head_dim=6, tie_word_embeddings=True)),
    ("stablelm", rope(0.67)),
    ("stablelm", dict(use_qkv_bias=True, use_parallel_residual=True, tie_word_embeddings=True) | rope(1.0)),
    ("gpt_neox", rope(0.67, theta=100.0)),
    ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False, vocab_size=300) | rope(1.0)),
    ("mpt", dict()),
    ("phi", rope(0.67)),
    ("starcoder2", dict(sliding_window=9, tie_word_embeddings=False)),
    ("starcoder2", dict(use_bias=False, hidden_act="silu")),
    ("cohere", dict(logit_scale=1.0)),
    ("gemma2", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=5)),
    ("gemma2", dict(head_dim=6, query_pre_attn_scalar=6, tie_word_embeddings=False, attn_logit_softcapping=None)),
    ("mixtral", dict(num_local_experts=4)),
    ("mixtral", dict(sliding_window=6, num_experts_per_tok=3)),
]
FIRST = list({model_type: (model_type, entries) for model_type, entries in reversed(CASES)}.values())[::-1]


def their_config(model_type: str, entries: dict[str, Any]) -> Any:
    """A small config of a type."""
    sizes = OTHER_NAMES.get(model_type) or SIZES | NO_GROUPS.get(model_type, {})
    sizes = {name: value for name, value in sizes.items() if value is not None}
    ids = dict(bos_token_id=EOT, eos_token_id=EOT, pad_token_id=None)
    return library.make_config(model_type, sizes | ids | entries)


def their_model(config: Any) -> Any:
    """A model of transformers with wide random values, so that a wrong mapping shows; its type's constants are kept."""
    model = library.model_class(config)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
        if config.model_type == "phi":
            model.lm_head.bias.zero_()
    return model


def our_run(config: Any, theirs: Any, *bindings: str) -> Run:
    """The model of transformers in our parts, as an opened run that is in no folder. ``bindings`` change the layout."""
    architecture = ARCHITECTURES[config.model_type]
    lines = [
        *bindings_of(architecture.layout(config)),
        f"Experiment.seq_len = {CONTEXT}",
        "Experiment.tokenizer = @Bytes",
        f"GPT.pad_vocab_to = {config.vocab_size if config.vocab_size > VOCAB else 16}",
    ]
    changed = {line.partition(" = ")[0] for line in bindings}
    ours, _ = compose(bindings=[line for line in lines if line.partition(" = ")[0] not in changed] + [*bindings])
    experiment = ours.build()
    model = experiment.model(VOCAB, CONTEXT).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    moved = tensors.move(architecture.rules(config), library.tensors_of(theirs), "ours", shapes)
    model.load_state_dict(moved)
    return Run(ours, experiment, experiment.tokenizer(), model, Path("none"), torch.device("cpu"))


def their_folder(folder: Path, config: Any, model: Any = None) -> Path:
    """A folder as on the Hub: config, weights, and a byte-level tokenizer of 257 ids."""
    (model or their_model(config)).save_pretrained(folder)
    tokenizer = BPE(VOCAB)
    tokenizer.train(["once upon a time"])
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer_json())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "split_special_tokens": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder
