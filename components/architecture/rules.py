"""Which tensor is which: rules that several architectures share.

Names of tensors: ours are those of GPT and of the parts on the shelf; theirs are those of a model in memory, which
the library may rename when it writes a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.architecture.layouts import head_dim_knob
from toolkit.architectures import Change, Constant, Permuted, Rule, Transposed

Rules = list[Rule | Constant]


def layers(config: Any, theirs: str) -> Iterator[tuple[str, str]]:
    """(our name, their name) of each layer."""
    return ((f"blocks.{i}", f"{theirs}.{i}") for i in range(config.num_hidden_layers))


def tables(config: Any, embed: str, unembed: str) -> Rules:
    """The embedding table and, if it is another one, the output matrix."""
    rows = (0, config.vocab_size)
    rules: Rules = [Rule("embed.weight", f"{embed}.weight", rows)]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", f"{unembed}.weight", rows))
    return rules


def linear(
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


def norm_rules(ours: str, theirs: str, bias: bool) -> Rules:
    """Gain and, if there is one, bias of a norm."""
    rules: Rules = [Rule(f"{ours}.weight", f"{theirs}.weight")]
    return rules + ([Rule(f"{ours}.bias", f"{theirs}.bias")] if bias else [])


def two_norms(ours: str, theirs: str, bias: bool) -> Rules:
    """The norms before the two sublayers, by the names that most architectures have."""
    return [
        *norm_rules(f"{ours}.mixer_norm", f"{theirs}.input_layernorm", bias),
        *norm_rules(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", bias),
    ]


def projections(
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
    head_dim = head_dim_knob(config) or config.hidden_size // config.num_attention_heads
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    rules: Rules = []
    start = 0
    for name, count in heads.items():
        rows = (start, start + count * head_dim)
        changes = (Permuted(interleaved(count, head_dim)),) if neighbours and name != "v" else ()
        rules += linear(f"{ours}.mixer.qkv", f"{theirs}.{name}_proj", bias, rows, changes)
        start = rows[1]
    has_out_bias = bias if out_bias is None else out_bias
    rules += linear(f"{ours}.mixer.out", f"{theirs}.{out}", has_out_bias)
    return rules + ([Constant("ours", f"{ours}.mixer.out.bias")] if bias and not has_out_bias else [])


def gated_network(config: Any, ours: str, theirs: str, bias: bool) -> Rules:
    """gate and up, which ours merges, and down."""
    hidden = config.intermediate_size
    return [
        *linear(f"{ours}.ffn.gate_up", f"{theirs}.gate_proj", bias, (0, hidden)),
        *linear(f"{ours}.ffn.gate_up", f"{theirs}.up_proj", bias, (hidden, 2 * hidden)),
        *linear(f"{ours}.ffn.down", f"{theirs}.down_proj", bias),
    ]


def interleaved(heads: int, head_dim: int) -> tuple[int, ...]:
    """The row of ours for each row of theirs, which rotates neighbours: 0, D/2, 1, D/2 + 1, ... in each head."""
    half = head_dim // 2
    return tuple(head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in (0, 1))


def by_head(heads: int, dim: int) -> tuple[int, ...]:
    """The row of ours, with all heads of q first, for each row of theirs, with q, k and v of a head together."""
    head_dim = dim // heads
    return tuple(
        part * dim + head * head_dim + i for head in range(heads) for part in range(3) for i in range(head_dim)
    )
