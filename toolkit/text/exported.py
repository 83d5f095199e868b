"""The content of a tokenizer.json file, of the tokenizers library, that gives the ids of a tokenizer of ours.

In such a file, the end of a document is a special token named <|endoftext|>. Ids that stand for nothing get names that
no text is divided into."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.text.pieces import EOT, byte_table, spell

UNUSED = "<|unused_{}|>"


def ranks(ranked: Mapping[bytes, int], pattern: str, size: int, eot: int) -> str:
    """A vocabulary of tiktoken: {piece: id}, and the regular expression that divides a text; ``size`` is V. A piece
    that is in the vocabulary is one id, whatever the merges say."""
    pieces = byte_table({i: piece for piece, i in ranked.items()}, size)
    return byte_level(pieces, merges_of(ranked), eot, oniguruma(pattern), ignore_merges=True)


def byte_level(
    pieces: Sequence[bytes],
    merges: Sequence[tuple[bytes, bytes]],
    eot: int,
    pattern: str | None = None,
    ignore_merges: bool = False,
) -> str:
    """A byte-level BPE. ``pieces``: (V,) the bytes of each id, b"" for none. ``merges``: in the order of their ranks.

    ``pattern``: a regular expression of Oniguruma for the pieces of a text (None: a text is one piece).
    ``ignore_merges``: a piece that is in the vocabulary is one id, whatever the merges say."""
    vocab = {spell(piece) if piece else _name(i, eot): i for i, piece in enumerate(pieces)}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [[spell(first), spell(second)] for first, second in merges],
        "ignore_merges": ignore_merges,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps: list[dict[str, Any]] = [level]
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps.insert(0, split)
    return _file(model, {"type": "Sequence", "pretokenizers": steps}, level, eot)


def characters(known: str, size: int, unknown: int, eot: int, first: int) -> str:
    """One id per character: ``first`` is that of the first character in ``known``; ``size`` is V."""
    ids = {character: first + i for i, character in enumerate(known)}
    names = {i: _name(i, eot) for i in range(size)} | {unknown: "<|unknown|>"}
    used = set(ids.values())
    vocab = ids | {name: i for i, name in names.items() if i not in used}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": names[unknown]}
    each = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    return _file(model, each, {"type": "Fuse"}, eot)


def with_eot(content: str, size: int, eot: int) -> str:
    """A file in which id ``eot`` is the special token at the end of a document, and in which every id below ``size``
    has a name. What adds ids to a text, shortens it or draws at random is left out."""
    about = json.loads(content)
    about |= {"post_processor": None, "truncation": None, "padding": None}
    model, added = about["model"], about.get("added_tokens") or []
    if "dropout" in model:
        model["dropout"] = None
    if not isinstance(model["vocab"], list):
        taken = {*model["vocab"].values(), *(token["id"] for token in added)}
        model["vocab"] |= {_name(i, eot): i for i in range(size) if i not in taken}
    if eot not in {token["id"] for token in added}:
        name = next((piece for piece, i in _vocab(model).items() if i == eot), EOT)
        added.append(_special(name, eot))
    about["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return json.dumps(about, ensure_ascii=False)


def eot_name(content: str, eot: int) -> str:
    """What a file calls the token with the id ``eot``."""
    about = json.loads(content)
    names = {token["id"]: token["content"] for token in about["added_tokens"]}
    return names[eot]


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a tiktoken vocabulary: each piece of two bytes or more is made of the two pieces that the merges
    before it leave of it."""
    return [
        _halves(piece, rank, ranks) for piece, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(piece) > 1
    ]


def oniguruma(pattern: str) -> str:
    """A regular expression of tiktoken in the syntax of Oniguruma, which the tokenizers library uses: {1,3}+ is a
    repetition there, not possessive, and $ also matches before a line break."""
    return re.sub(r"(?<!\\)\$", r"\\z", re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern))


def _halves(piece: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The last two pieces before ``piece`` is whole: merge the pair of the lowest rank, again and again."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        lowest, i = min(pairs)
        if lowest >= rank:
            raise ValueError(f"the piece {piece!r} can't be made by merging pieces of lower rank")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _file(model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any], eot: int) -> str:
    about = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(EOT, eot)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(about, ensure_ascii=False)


def _special(name: str, i: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": name} | flags


def _name(i: int, eot: int) -> str:
    """The name of an id that stands for no text."""
    return EOT if i == eot else UNUSED.format(i)


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
