"""Make a folder of the transformers library from a GGUF file alone; run as a script, in a process that imports nothing
of ours.

    python back.py FILE FOLDER

Names and permutations of tensors are undone by transformers' own reader of GGUF, which ignores many keys; the keys are
read here, as llama.cpp reads them. FOLDER gets config.json, model.safetensors, tokenizer.json if the file has a
tokenizer, and read.json: {entry of the config: value} as read from the keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # as in src/llama-vocab.cpp: (regular expression, None: that of GPT-2; whether merges are ignored)
    "gpt-2": (None, False),
    "llama-bpe": (GPT4, True),
    "dbrx": (GPT4, False),
    "qwen2": (GPT4.replace(r"\p{N}{1,3}", r"\p{N}"), False),
}
ACTIVATIONS = {"gpt2": "gelu_new", "gemma2": "gelu_pytorch_tanh"}  # "silu" elsewhere: a file can't say it


def back(file: str, folder: Path) -> None:
    """Write the folder. Raises ValueError if keys or tensors are missing or surplus."""
    import gguf
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    kind = keys["general.architecture"]
    entries = config_of(keys, names)
    network = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**entries))
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=network)["tensors"]
    missing, surplus = network.load_state_dict(tensors, strict=False)
    allowed = set(network._tied_weights_keys or ()) if network.config.tie_word_embeddings else set()
    if surplus or set(missing) - allowed or len(tensors) != len(names):
        raise ValueError(f"missing {missing}, surplus {surplus}, {len(names)} tensors in the file, {len(tensors)} read")
    network.tie_weights()
    network.save_pretrained(folder)
    (folder / "read.json").write_text(json.dumps(entries))
    if keys["tokenizer.ggml.model"] != "no_vocab":
        write_tokenizer(keys, folder)


def config_of(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The entries of a config of transformers that a file's keys and names of tensors stand for."""
    kind = keys["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        return keys.get(f"{kind}.{name}", default)

    heads, width, layers = key("attention.head_count"), key("embedding_length"), key("block_count")
    head_dim = key("attention.key_length", width // heads)
    ids = ("bos_token_id", "eos_token_id")
    tokens = {name: value for name in ids if (value := keys.get(f"tokenizer.ggml.{name}")) is not None}
    biased = "blk.0.attn_q.bias" in names
    entries = {"vocab_size": key("vocab_size"), "tie_word_embeddings": "output.weight" not in names, **tokens}
    if kind == "gpt2":
        sizes = {"n_positions": key("context_length"), "n_embd": width, "n_layer": layers, "n_head": heads}
        more = {"n_inner": key("feed_forward_length"), "layer_norm_epsilon": key("attention.layer_norm_epsilon")}
        return entries | sizes | more | {"activation_function": ACTIVATIONS[kind]}
    entries |= {
        "max_position_embeddings": key("context_length"),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "intermediate_size": key("feed_forward_length"),
        "rope_parameters": _rope(key, head_dim),
        "hidden_activation" if kind == "gemma2" else "hidden_act": ACTIVATIONS.get(kind, "silu"),
    }
    if kind == "stablelm":
        parallel = "blk.0.ffn_norm.weight" not in names
        eps = key("attention.layer_norm_epsilon")
        return entries | {"layer_norm_eps": eps, "use_qkv_bias": biased, "use_parallel_residual": parallel}
    entries["rms_norm_eps"] = key("attention.layer_norm_rms_epsilon")
    if kind != "qwen2":
        entries |= {"head_dim": head_dim, "attention_bias": biased}
    if kind == "llama":
        entries["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if kind == "gemma2":
        entries |= {
            "sliding_window": key("attention.sliding_window", 4096),
            "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
            "attn_logit_softcapping": key("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": key("final_logit_softcapping", 30.0),
            "query_pre_attn_scalar": head_dim,
        }
    return entries


def _rope(key: Any, head_dim: int) -> dict[str, Any]:
    """rope_parameters."""
    theta, kind = key("rope.freq_base", 10_000.0), key("rope.scaling.type", "default")
    share = key("rope.dimension_count", head_dim) / head_dim
    rope = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share}
    if kind != "default":
        rope["factor"] = key("rope.scaling.factor", 1.0)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = key("rope.scaling.original_context_length", key("context_length"))
    return rope


def write_tokenizer(keys: Mapping[str, Any], folder: Path) -> None:
    """Write a tokenizer.json that divides and merges as llama.cpp does with these keys. Special tokens are never found
    in a text."""
    tokens = keys["tokenizer.ggml.tokens"]
    pattern, ignores = PRE_TOKENIZERS[keys["tokenizer.ggml.pre"]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [level] if pattern is None else [split, level]
    vocab = {text: i for i, text in enumerate(tokens)}
    merges = [merge for merge in keys["tokenizer.ggml.merges"] if merge.replace(" ", "") in vocab]
    about: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignores},
    }
    (folder / "tokenizer.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    back(sys.argv[1], Path(sys.argv[2]))
