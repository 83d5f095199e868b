"""The tokenizer of a GGUF file, made of a tokenizer.json.

A file names its pre-tokenizer, which divides a text before merging: llama.cpp has a fixed list of them. Those that
divide as a regular expression of ours are in PRE_TOKENIZERS; the others are refused."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from toolkit.exchange.gguf import package
from toolkit.protocols import Tokenizer
from toolkit.text.pieces import unspell

REMEDY = "--no-tokenizer writes the model alone"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_TIKTOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
_GPT4 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _GPT4
GPT4_TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
QWEN2 = GPT4.replace("{1,3}", "")


class PreTokenizer(NamedTuple):
    """A pre-tokenizer of llama.cpp. ``ignores_merges``: a piece of a text that is in the vocabulary is one id, whatever
    the merges say."""

    name: str
    ignores_merges: bool
    patterns: tuple[str, ...]  # spellings of the one regular expression


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", False, (GPT2, GPT2_TIKTOKEN)),
    PreTokenizer("llama-bpe", True, (GPT4, GPT4_TIKTOKEN)),
    PreTokenizer("dbrx", False, (GPT4, GPT4_TIKTOKEN)),
    PreTokenizer("qwen2", False, (QWEN2,)),
)


def keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of a tokenizer: lists of texts and whole numbers, and single values. Raises ValueError with the reason
    if llama.cpp can't give the same ids."""
    make = getattr(tokenizer, "tokenizer_json", None)
    name = type(tokenizer).__name__
    if make is None:
        raise ValueError(f"the tokenizer {name} has no method tokenizer_json(), so no file gives its ids; {REMEDY}")
    try:
        about = json.loads(make())
        _check_kind(about)
        pre = _pre_tokenizer(about)
    except ValueError as error:
        raise ValueError(f"the tokenizer {name} can't be written for llama.cpp: {error}; {REMEDY}") from error
    names = package.require().Keys.Tokenizer
    tokens, types = _tokens(about, tokenizer.vocab_size)
    end = tokens[tokenizer.eot]
    merges = [" ".join(pair) for pair in _merges(about["model"])]
    return {
        names.MODEL: "gpt2",  # any byte-level BPE
        names.PRE: pre,
        names.LIST: tokens,
        names.TOKEN_TYPE: types,
        names.MERGES: merges or [f"{end} {end}"],  # one that never applies: a list can't be empty
        names.BOS_ID: tokenizer.eot,
        names.EOS_ID: tokenizer.eot,
        names.ADD_BOS: False,
        names.ADD_EOS: False,
    }


def no_keys() -> dict[str, Any]:
    """The keys of a file without a tokenizer."""
    return {package.require().Keys.Tokenizer.MODEL: "no_vocab"}


def _check_kind(about: dict[str, Any]) -> None:
    """Raise ValueError for anything but a byte-level BPE."""
    model = about["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "a BPE with bytes as a fallback" if model.get("type") == "BPE" else f"a {model.get('type')} model"
        raise ValueError(f"it is {kind}, not a byte-level BPE")
    if about.get("normalizer") is not None:
        raise ValueError(f"it normalises texts ({about['normalizer'].get('type')}), which llama.cpp does not do")
    for entry in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(entry):
            raise ValueError(f"it has the entry {entry} = {model[entry]!r}")
    inside = [token["content"] for token in about["added_tokens"] if not token["special"]]
    if inside:
        raise ValueError(f"it finds {len(inside)} added tokens in a text, the first of which is {inside[0]!r}")


def _pre_tokenizer(about: dict[str, Any]) -> str:
    """The name of the pre-tokenizer. Raises ValueError if llama.cpp has none that divides a text alike."""
    model = about["model"]
    ignores = bool(model.get("ignore_merges"))
    pattern = _pattern(about.get("pre_tokenizer") or {})
    if pattern is None:
        if model["merges"]:
            raise ValueError("it merges over a whole text, but llama.cpp always divides a text first")
        return PRE_TOKENIZERS[0].name  # without merges, every byte is an id, however a text is divided
    fitting = [each for each in PRE_TOKENIZERS if pattern in each.patterns]
    if not fitting:
        raise ValueError(f"llama.cpp has no pre-tokenizer that is known to divide a text like {pattern!r}")
    for each in fitting:
        if each.ignores_merges == ignores:
            return each.name
    if ignores and (count := _unmerged(about)):
        raise ValueError(
            f"{count} pieces of its vocabulary are not what its merges make of their bytes, but llama.cpp always "
            f"merges with the pre-tokenizer {fitting[0].name}"
        )
    return fitting[0].name


def _pattern(step: dict[str, Any]) -> str | None:
    """The regular expression that divides a text; None if nothing does. Raises ValueError for other steps."""
    steps = step.get("pretokenizers", [step])
    level = steps[-1]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        raise ValueError(f"its last step before merging is not a plain ByteLevel: {json.dumps(level)[:120]}")
    pattern = GPT2 if level.get("use_regex", True) else None
    if len(steps) == 1:
        return pattern
    split = steps[0]
    regex = (split.get("pattern") or {}).get("Regex")
    plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) > 2 or pattern is not None or regex is None or not plain:
        raise ValueError(f"its steps before merging are not one division and ByteLevel: {json.dumps(steps)[:160]}")
    return str(regex)


def _unmerged(about: dict[str, Any]) -> int:
    """The number of pieces that get other ids where merges are not ignored."""
    from tokenizers import Tokenizer

    about = about | {"added_tokens": [], "post_processor": None}
    pieces = (unspell(piece).decode(errors="ignore") for piece in about["model"]["vocab"])
    texts = [piece for piece in pieces if piece]
    ids = []
    for ignores in (True, False):
        content = json.dumps(about | {"model": about["model"] | {"ignore_merges": ignores}})
        ids.append([each.ids for each in Tokenizer.from_str(content).encode_batch(texts, add_special_tokens=False)])
    return sum(ignored != merged for ignored, merged in zip(*ids, strict=True))


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs to merge, in the order of their ranks. Older files write "a b"."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _tokens(about: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each id: (V,) normal, control (special) or unused."""
    types = package.require().TokenType
    texts = {i: piece for piece, i in about["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in about["added_tokens"]}
    texts |= special
    made = {first + second for first, second in _merges(about["model"])}
    kinds = []
    for i in range(size):
        ordinary = len(texts[i]) == 1 or texts[i] in made
        kinds.append(types.CONTROL if i in special else types.NORMAL if ordinary else types.UNUSED)
    return [texts[i] for i in range(size)], [int(kind) for kind in kinds]
