"""Read a file of the tokenizers library so that its special tokens are never found in a text."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.text.once import say_once
from toolkit.text.pieces import EOT, byte_table, unspell

if TYPE_CHECKING:
    from tokenizers import Tokenizer

USUAL_EOT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")  # in files
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how a byte fallback writes a byte
_HIDDEN = "\uffff\uffff"  # put before the names of special tokens, so that no text holds them


def read(path: str) -> str:
    """The text of the file. Raises ValueError if it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"TokenizerFile.path = {path!r} can't be read ({type(error).__name__}: {error}); bind it to a "
            "tokenizer.json (each run keeps a copy, in runs/NAME/tokenizer)"
        ) from error


class File(NamedTuple):
    """What TokenizerFile reads out of its file."""

    tokenizer: Tokenizer
    eot: int
    pieces: list[bytes]  # (V,) the bytes of each id
    special: dict[int, str]  # what decode shows for ids that stand for no text
    ordinary: list[str]  # added tokens that are found in a text, as the file wants it


def parse(content: str, eot: str | None, path: str) -> File:
    """Build the tokenizer from a file's text. ``eot``: the name of the token that ends a document; None looks for a
    usual name. ``path`` is named in messages. Raises ValueError for another kind of file, or an unknown name."""
    from tokenizers import Tokenizer

    try:
        about = json.loads(content)
        model, added = about["model"], about.get("added_tokens") or []
        unigram = isinstance(model["vocab"], list)
        vocab = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
        unknown = model.get("unk_token") if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
        # A piece that BPE merges to may be named </s> by chance; elsewhere such a name in the vocabulary is no text.
        names = ({} if "merges" in model else vocab) | {token["content"]: token["id"] for token in added}
        name = next((usual for usual in USUAL_EOT if usual in names), None) if eot is None else eot
        special = {token["content"] for token in added if token["special"]} | ({name, unknown} - {None})
        hidden = {token: _HIDDEN + token for token in special if not _BYTE.fullmatch(token)}
        model["vocab"] = (
            [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
            if unigram
            else {hidden.get(piece, piece): i for piece, i in vocab.items()}
        )
        if model.get("unk_token"):
            model["unk_token"] = hidden[unknown]
        if "dropout" in model:
            model["dropout"] = None
        about["added_tokens"] = [t | {"content": hidden.get(t["content"], t["content"])} for t in added]
        if unigram and model.get("byte_fallback"):
            about["pre_tokenizer"] = _cutting_bytes(about.get("pre_tokenizer"))
        about |= {"post_processor": None, "truncation": None, "padding": None}
        tokenizer = Tokenizer.from_str(json.dumps(about))
    except Exception as error:  # the library raises nothing narrower
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
        raise ValueError(
            f"TokenizerFile.path = {path!r} is not a file of the tokenizers library ({reason}); bind a tokenizer.json"
        ) from error
    if name is not None and name not in names:
        known = [token["content"] for token in added] or list(names)
        near = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0)) or "none"
        raise ValueError(f"TokenizerFile.eot = {name!r}: {path} has no such special token; the nearest are {near}")
    tokenizer.encode_special_tokens = True  # or <0x41> of a byte fallback would be found in a text
    ids = tokenizer.get_vocab()
    size = max(ids.values()) + 1
    if name is None:
        say_once(f"{path} has no token that ends a document; TokenizerFile adds the id {size} for it")
    end = size if name is None else ids[hidden[name]]
    ordinary = [token["content"] for token in added if token["content"] not in special]
    table = byte_table(_file_pieces(about, ids, {*ordinary}), max(size, end + 1))
    shown = {ids[spelled]: token for token, spelled in hidden.items()} | {end: EOT}
    return File(tokenizer, end, table, shown, ordinary)


def _cutting_bytes(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    """A file's own pre-tokenizer, followed by a step that divides a <0x41> in a text: Unigram would read it as the
    byte A."""
    cut = {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step for step in (pre_tokenizer, cut) if step]}


def _file_pieces(about: dict[str, Any], ids: dict[str, int], ordinary: set[str]) -> dict[int, bytes]:
    """What each id of a file stands for, but for special ones."""
    model, steps = about["model"], [about.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
    spelling = json.dumps(steps, ensure_ascii=False)
    byte_level, space = "ByteLevel" in spelling, "\u2581" if "\u2581" in spelling else " "
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def stands_for(token: str) -> bytes:
        if token in ordinary:
            return token.encode()
        if model.get("byte_fallback") and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if byte_level:
            return unspell(token)
        return token.removeprefix(prefix).removesuffix(suffix).replace(space, " ").encode()

    return {i: stands_for(token) for token, i in ids.items() if not token.startswith(_HIDDEN)}


def probe(added: list[str]) -> list[str]:
    """Text with every byte that UTF-8 has, and what tokenizers change: case, letters, white space, added tokens."""
    codes = [*range(0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x10000)]
    every = "".join(map(chr, codes))
    fixed = [every, "e\u0301 \uff34om \ufb01 A", " a  b\t\r\n\n c ", "a", " a", "</s><0x41><|endoftext|>"]
    return fixed + [f"a {token} b" for token in added]
