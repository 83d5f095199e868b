"""Write the tokenizer files of a model that goes out, and check that they give the same ids."""

from __future__ import annotations

import functools
import json
import logging
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from toolkit.exchange import library
from toolkit.protocols import Tokenizer
from toolkit.text import exported
from toolkit.text.tiktokens import TRICKY
from toolkit.text.tokenizerjson import probe

log = logging.getLogger("toolkit")
REMEDY = "--no-tokenizer exports the model alone"
FUZZED = 400  # random texts
COMMON = "abc XYZ stSmldve'0123 \n\r\t .,!?()-\u00a0\u3000\u2019é"


def write(tokenizer: Tokenizer, folder: Path, max_len: int) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises ValueError with the reason if there can be none.

    In the files, special tokens in a text are ordinary text, as with our tokenizers (``split_special_tokens``)."""
    name = type(tokenizer).__name__
    if reason := refusal(type(tokenizer)):
        raise ValueError(f"the tokenizer {name} {reason}; {REMEDY}")
    try:
        content = tokenizer.tokenizer_json()  # type: ignore[attr-defined]  # an optional method
    except ValueError as error:
        raise ValueError(f"the tokenizer {name} can't be exported: {error}; {REMEDY}") from error
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    end = exported.eot_name(content, tokenizer.eot)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")


def refusal(cls: type) -> str | None:
    """Why no tokenizer of a class can be written, in words that follow its name; None if one can be."""
    if hasattr(cls, "tokenizer_json"):
        return None
    return "has no method tokenizer_json(), so no tokenizer.json gives its ids"


@functools.cache
def fuzzed() -> tuple[str, ...]:
    """Texts on which tokenizers differ first: random characters of all of Unicode that Python knows, frequent ones, and
    fixed ones. The same texts every time."""
    draw = random.Random(0)
    codes = [code for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    texts = []
    for _ in range(FUZZED):
        alphabet = [draw.choice(COMMON), draw.choice(COMMON), chr(draw.choice(codes)), chr(draw.choice(codes[:3000]))]
        texts.append("".join(draw.choice(alphabet + list(COMMON)) for _ in range(draw.randint(1, 40))))
        texts.append("".join(chr(draw.choice(codes)) for _ in range(draw.randint(1, 20))))
    return (*texts, *TRICKY, *probe([]))


def differing(tokenizer: Tokenizer, texts: Sequence[str], theirs: Sequence[Sequence[int]]) -> list[str]:
    """The texts to which the tokenizers give different ids."""
    return [text for text, ids in zip(texts, theirs, strict=True) if [int(i) for i in tokenizer.encode(text)] != ids]


def check(tokenizer: Tokenizer, texts: Sequence[str], theirs: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if the written files give other ids than our tokenizer."""
    texts_that_differ = differing(tokenizer, texts, theirs)
    if texts_that_differ:
        raise ValueError(
            f"the exported tokenizer gives other ids than {type(tokenizer).__name__} to {len(texts_that_differ)} of "
            f"{len(texts)} texts, the first of which is {texts_that_differ[0][:40]!r}; {REMEDY}"
        )


def check_source(tokenizer: Tokenizer, texts: Sequence[str], theirs: Sequence[Sequence[int]]) -> None:
    """Warn if the library reads a folder's tokenizer otherwise than our part does: some of its classes rebuild it."""
    texts_that_differ = differing(tokenizer, texts, theirs)
    if texts_that_differ:
        log.warning(
            "transformers gives other ids than the tokenizer.json that the run has, to %d of %d texts, the first of "
            "which is %r",
            *(len(texts_that_differ), len(texts), texts_that_differ[0][:40]),
        )


def source_file(folder: Path) -> Path:
    """The tokenizer.json of a model that comes in. Raises ValueError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json, which a run needs to read text; save the model's tokenizer there: "
            f"transformers.AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
        )
    return path


def name_of(path: Path, token: int | None) -> str | None:
    """What a tokenizer.json calls a special token; None if it has none of that id. Raises ValueError."""
    added = library.read_json(path).get("added_tokens") or []
    try:
        return next((each["content"] for each in added if each["id"] == token), None)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: added_tokens must be a list of objects with an id and a content") from error
