"""Turn text into token files once, and read windows and batches from them. Data parts hold a ``TokenFiles``."""

from __future__ import annotations

import functools
import hashlib
import json
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from toolkit.protocols import Tokenizer
from toolkit.text.order import Permutation, order
from toolkit.text.tokencache import cached
from toolkit.text.tokenfile import TokenFile
from toolkit.text.tokenise import SPLITS, write_splits

TRAINING_TEXT = 100_000_000  # bytes of text that a tokenizer learns from, at most
VAL_SEED = 1_009  # replaces the run's seed: all seeds are validated on the same windows in the same order


class TokenFiles:
    """The tokens of one text under one tokenizer, on disk, and the samples of seq_len + 1 tokens cut from them.

    ``documents(split)`` yields the documents of "train" or "val" as str. Blank ones are left out, and
    ``tokenizer.eot`` is added to each of the others. ``source()`` returns a dict of JSON values that identifies the
    text (names, knobs, content hashes); it is called in ``prepare``. ``describe()`` is for messages: it returns a name
    of the text, and what to bind if a split has no document. The files are in ``$TOOLKIT_CACHE``, or else in the user's
    cache directory, in a folder named after source, tokenizer and format, so that they are never used for another text,
    knob or vocabulary.

    A tokenizer with ``train`` first learns from the train documents (at most 100 MB of their text). What it learnt is
    saved, and loaded the next time. ``train`` must not change a tokenizer that has learnt already, such as one loaded
    from a run. After ``prepare`` the tokenizer is the one that wrote the files.

    Batches are verified: ``prepare`` hashes token files up to 4 GiB, and builds them again, with a warning, if a bit
    has changed (hashing takes 4 s for 4 GiB, 10 ms for a small text). In larger files each block is compared with its
    digest when it is first read, so that training starts at once.

    Raises ValueError for an empty split, a split shorter than seq_len + 1 tokens, ids outside the vocabulary, and a
    damaged block of a large file; OSError when the disk fails, or the file shrinks while a run reads it. None of them
    leaves a half-written folder.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        documents: Callable[[str], Iterable[str]],
        source: Callable[[], dict[str, Any]],
        describe: Callable[[], tuple[str, str]] | None = None,
    ):
        self.tokenizer, self.seq_len, self.seed = tokenizer, seq_len, seed
        self.documents, self.source, self.describe = documents, source, describe or self._describe
        self._lock = threading.Lock()
        self._files: dict[str, TokenFile] = {}
        self._fingerprint = ""
        self._source: dict[str, Any] = {}
        self.encoded_by: str | None = None  # set by prepare: "encode" or, say, "encode_batch: gigatoken 0.10.0"
        self._order = functools.lru_cache(maxsize=4)(self._permutation)  # two epochs of two splits

    def prepare(self) -> None:
        """Write the token files unless they exist. A second call returns at once. Other processes wait."""
        with self._lock:
            if self._files:
                return
            self._source = self.source()
            about: dict[str, Any] = {"source": self._source, "tokenizer": self.tokenizer.fingerprint()}
            if hasattr(self.tokenizer, "train"):
                folder, learnt = cached("tokenizer", about, self._train)
                about["tokenizer"] = learnt["learnt"]
                self._load_tokenizer(folder, about["tokenizer"])
            folder, manifest = cached("tokens", about, self._encode)
            self._load_tokenizer(folder, about["tokenizer"])
            files = {}
            for split in SPLITS:
                files[split] = TokenFile(folder / f"{split}.bin", manifest["dtype"], self.tokenizer.vocab_size)
                if files[split].tokens != manifest["splits"][split]["tokens"]:
                    raise ValueError(
                        f"{files[split].path} holds {files[split].tokens} ids of {manifest['dtype']}, but "
                        f"{manifest['splits'][split]['tokens']} were written; delete {folder}, and it is built again"
                    )
                if files[split].tokens < self.seq_len + 1:
                    raise ValueError(
                        f"the {split} split has {files[split].tokens} tokens, but a sample takes seq_len + 1 = "
                        f"{self.seq_len + 1}; lower Experiment.seq_len or give the data more {split} text: "
                        f"it is {self.describe()[0]}"
                    )
            content = [about["tokenizer"], *(manifest["splits"][split]["sha256"] for split in SPLITS)]
            self._fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            self._files = files
            self.encoded_by = manifest.get("encoded_by")  # older files have no such entry

    def tokens(self, split: str) -> np.memmap:
        """All token ids of a split in order, (tokens,) uint16 or uint32, as a read-only memory map: for inspection.
        Batches are not read from this map. In files beyond 4 GiB its bytes are not verified."""
        file = self._file(split)
        return np.memmap(file.path, dtype=file.dtype, mode="r")

    def windows(self, split: str) -> int:
        """How many distinct samples a split has: window i covers tokens[i * T : i * T + T + 1] with T = seq_len."""
        return (self._file(split).tokens - 1) // self.seq_len

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        """Samples index * size ... index * size + size - 1 as (size, seq_len + 1) int64. Thread-safe.

        Sample j depends on (seed, split, j) alone: it is place j % W of epoch j // W, and each epoch goes through
        all W windows once, in an order seeded by (seed, epoch)."""
        windows = self.windows(split)
        places = (divmod(sample, windows) for sample in range(index * size, index * size + size))
        starts = [int(self._order(split, epoch)[place]) * self.seq_len for epoch, place in places]
        return self._file(split).rows(starts, self.seq_len + 1)

    def fingerprint(self) -> str:
        """Hex. Covers every token of both splits and the tokenizer."""
        self.prepare()
        return self._fingerprint

    def _file(self, split: str) -> TokenFile:
        """The token file of a split. Raises ValueError for an unknown split."""
        self.prepare()
        if split not in self._files:
            raise ValueError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}")
        return self._files[split]

    def _permutation(self, split: str, epoch: int) -> Permutation:
        """The order of a split's windows in one epoch."""
        return order(self.windows(split), [VAL_SEED if split == "val" else self.seed, epoch])

    def _texts(self, split: str) -> Iterator[str]:
        """The documents of a split without the blank ones. Lone surrogates, which JSON can escape but UTF-8 can't hold,
        become U+FFFD. Nothing is read before the first document is asked for."""
        for document in self.documents(split):
            if document and not document.isspace():
                if not document.isascii():
                    try:
                        document.encode()
                    except UnicodeEncodeError:
                        document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                yield document

    def _load_tokenizer(self, folder: Path, fingerprint: str) -> None:
        """Load the tokenizer from a cache folder. Raises ValueError unless it then has this fingerprint."""
        self.tokenizer.load(folder / "tokenizer")
        if self.tokenizer.fingerprint() != fingerprint:
            name = type(self.tokenizer).__name__
            raise ValueError(f"{name}.load does not restore what {name}.save wrote: the fingerprints differ")

    def _describe(self) -> tuple[str, str]:
        """The default of ``describe``."""
        return f"the text {textwrap.shorten(json.dumps(self._source), 300)}", "give the data part more documents"

    def _refuse_changed_text(self) -> None:
        """Raise ValueError if the text has changed since ``prepare`` began: the folder's name stands for that text."""
        if self.source() != self._source:
            raise ValueError(f"the text changed while it was read; start again once it is whole: {self.describe()[0]}")

    def _train(self, folder: Path) -> dict[str, Any]:
        """Train the tokenizer, and save it in a cache folder; returns entries for the manifest."""
        assert hasattr(self.tokenizer, "train")
        self.tokenizer.train(_first_bytes(self._texts("train"), TRAINING_TEXT))
        (folder / "tokenizer").mkdir()
        self.tokenizer.save(folder / "tokenizer")
        self._refuse_changed_text()
        return {"learnt": self.tokenizer.fingerprint()}

    def _encode(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer and the token files of both splits; returns entries for the manifest."""
        (folder / "tokenizer").mkdir()
        self.tokenizer.save(folder / "tokenizer")  # first: this loads the vocabulary before threads need it
        dtype = np.dtype(np.uint16 if self.tokenizer.vocab_size <= 65_536 else np.uint32)
        splits, encoded_by = write_splits(self.tokenizer, self._texts, self.describe, folder, dtype)
        self._refuse_changed_text()
        return {"dtype": dtype.name, "splits": splits, "encoded_by": encoded_by}


class _HasFiles(Protocol):
    files: TokenFiles


Part = TypeVar("Part", bound=type)


def reads_token_files(cls: Part) -> Part:
    """Class decorator: a data part whose ``self.files`` is a TokenFiles gets the methods of the Data protocol."""

    def prepare(self: _HasFiles) -> None:
        self.files.prepare()

    def windows(self: _HasFiles, split: str) -> int:
        return self.files.windows(split)

    def batch(self: _HasFiles, split: str, index: int, size: int) -> np.ndarray:
        return self.files.batch(split, index, size)  # (size, seq_len + 1)

    def fingerprint(self: _HasFiles) -> str:
        return self.files.fingerprint()

    def encoded_by(self: _HasFiles) -> str | None:
        return self.files.encoded_by

    for method in (prepare, windows, batch, fingerprint):
        setattr(cls, method.__name__, method)
    setattr(cls, encoded_by.__name__, property(encoded_by))
    return cls


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents up to ``limit`` bytes of UTF-8 in all; the last one is cut."""
    for document in documents:
        size = len(document.encode())
        if size >= limit:
            yield document.encode()[:limit].decode(errors="ignore")
            return
        limit -= size
        yield document
