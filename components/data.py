"""Data: TinyStories, any data set that the datasets library loads, and your own text files."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Lt, MinLen

from toolkit.protocols import Tokenizer
from toolkit.registry import register
from toolkit.store.disk import sha256
from toolkit.text import textfiles
from toolkit.text.tokens import TokenFiles, reads_token_files

Share = Annotated[float, Gt(0), Lt(1)]
PAUSES = (0, 1)  # seconds before each try to reach the Hub: a network may be down for a moment
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED)


@register("data")
@reads_token_files
class TinyStories:
    """roneneldan/TinyStories from the Hugging Face Hub, with its own validation split: 1.9 GB of text."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int):
        self.files = TokenFiles(tokenizer, seq_len, seed, self._documents, self._source)

    def _source(self) -> dict[str, Any]:
        return {"hub": "roneneldan/TinyStories", "splits": ["train", "validation"], "column": "text"}

    def _documents(self, split: str) -> Iterator[str]:
        hub_split = {"train": "train", "val": "validation"}[split]
        return _load("roneneldan/TinyStories", None, hub_split, "text", None)


@register("data")
@reads_token_files
class HubDataset:
    """Any data set that ``datasets.load_dataset(name, config)`` loads: a name on the Hub, or a local folder of
    .parquet, .jsonl, .csv or .txt files (in which .../train.jsonl and .../validation.jsonl are the splits).

    One row is one document. ``val_split = None``: the set has no validation split, and a share ``val_fraction`` of the
    documents of ``train_split`` becomes one, chosen by a hash of the text, so that two copies of a document are always
    in the same split. A data set on the Hub can change under its name: pin ``revision`` to a commit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        name: str,
        config: str | None = None,
        train_split: str = "train",
        val_split: str | None = "validation",
        column: str = "text",
        revision: str | None = None,
        val_fraction: Share = 0.01,
    ):
        self.name, self.config, self.train_split, self.val_split = name, config, train_split, val_split
        self.column, self.revision, self.val_fraction = column, revision, val_fraction
        self.files = TokenFiles(tokenizer, seq_len, seed, self._documents, self._source, self._describe)

    def _describe(self) -> tuple[str, str]:
        splits = (
            f"splits {self.train_split!r} and {self.val_split!r}" if self.val_split else f"split {self.train_split!r}"
        )
        share = "" if self.val_split else ", or HubDataset.val_fraction to another share"
        return (
            f"the data set {self.name!r}, {splits}, column {self.column!r}",
            f"bind HubDataset.column to the column that holds the text, or the splits to others{share}",
        )

    def _source(self) -> dict[str, Any]:
        folder = Path(os.path.expanduser(self.name))
        if self.name.startswith((".", "/", "~")) and not folder.is_dir():
            raise ValueError(f"HubDataset.name = {self.name!r}: folder not found")
        content = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return {
            "hub": self.name,
            "content": [[path.relative_to(folder).as_posix(), sha256(path)] for path in content],
            "config": self.config,
            "splits": [self.train_split, self.val_split],
            "val_fraction": self.val_fraction if self.val_split is None else None,
            "column": self.column,
            "revision": self.revision,
        }

    def _documents(self, split: str) -> Iterator[str]:
        hub_split = self.val_split if self.val_split is not None and split == "val" else self.train_split
        documents = _load(os.path.expanduser(self.name), self.config, hub_split, self.column, self.revision)
        if self.val_split is not None:
            return documents
        return (d for d in documents if _held_out(d, self.val_fraction) == (split == "val"))


@register("data")
@reads_token_files
class TextFiles:
    """Your own text files. ``paths`` are files, folders (the files in them that end as below), or globs (``**``
    reaches into folders). Suffixes count without regard to case, and each file may also be compressed: .gz, .bz2, .xz
    or .zst.

    - .jsonl, .ndjson: one object a line, with the document in ``column``; .json: an array of objects, or lines
    - .parquet: one row a document, in ``column``
    - .txt, .md, any other: UTF-8 text whose documents ``separator`` divides (None: the file is one document)

    By default a share ``val_fraction`` of the documents is held out, chosen by a hash of the text: the choice does not
    change when other documents do, and two copies of a document are always in the same split. Surrounding blank lines
    are cut off. With ``val_by_position`` the last ``val_fraction`` of the characters is held out and nothing is cut
    off: the classic 90/10 split of a single work. Memory holds one document at a time. Each start hashes the files, a
    second or less for a GB: if a byte has changed, new token files are made, with another fingerprint.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        paths: Annotated[list[str], MinLen(1)],
        separator: Annotated[str, MinLen(1)] | None = "<|endoftext|>",
        val_fraction: Share = 0.1,
        val_by_position: bool = False,
        column: str = "text",
    ):
        self.paths, self.separator, self.column = paths, separator, column
        self.val_fraction, self.val_by_position = val_fraction, val_by_position
        self.files = TokenFiles(tokenizer, seq_len, seed, self._documents, self._source, self._describe)

    def _describe(self) -> tuple[str, str]:
        return (
            textfiles.name_of(textfiles.find_files(self.paths)),
            f"bind TextFiles.separator (it is {self.separator!r}) to what divides the documents, "
            f"TextFiles.val_fraction (it is {self.val_fraction:g}) to another share, or TextFiles.val_by_position = "
            "True, which divides a single document",
        )

    def _source(self) -> dict[str, Any]:
        files = textfiles.find_files(self.paths)
        source = {
            "files": [[path.name, sha256(path)] for path in files],
            "separator": self.separator,
            "val_fraction": self.val_fraction,
            "val_by_position": self.val_by_position,
            "column": self.column,
        }
        return source | ({"reader": 2} if textfiles.were_plain_text(files) else {})

    def _documents(self, split: str) -> Iterator[str]:
        if not self.val_by_position:
            documents = (_without_blank_lines(document) for document in self._read())
            return (d for d in documents if _held_out(d, self.val_fraction) == (split == "val"))
        total = sum(len(document) for document in self._read())
        return _one_side(self._read(), int(total * (1 - self.val_fraction)), split)

    def _read(self) -> Iterator[str]:
        for path in textfiles.find_files(self.paths):
            yield from textfiles.documents(path, self.separator, self.column)


def _load(name: str, config: str | None, split: str, column: str, revision: str | None) -> Iterator[str]:
    """Yield the documents in a column of a data set. Raises ValueError if it can't be loaded, with the reason."""
    import datasets

    try:
        _reach(name)
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except ConnectionError as error:
        raise ValueError(
            f"the data set {name!r} is not in the cache and can't be reached ({error}). Run `python -m "
            "toolkit.prepare` with the same config on a machine with a network and copy the cache folder "
            "($TOOLKIT_CACHE), or train on your own text: gin/data/text_files.gin"
        ) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
            raise error.__cause__ from None  # the disk, not the data set
        raise ValueError(
            f"can't load the split {split!r} of the data set {name!r}, config {config!r}: {error.__cause__ or error}. "
            "Check name, config and revision; bind HubDataset.val_split = None if it has no validation split"
        ) from error
    if column not in dataset.column_names:
        raise ValueError(f"{name!r} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    if "string" not in str(dataset.features[column]):
        raise ValueError(f"the column {column!r} of {name!r} does not hold text, but {dataset.features[column]}")
    for rows in dataset.select_columns([column]).iter(batch_size=1000):
        yield from (text or "" for text in rows[column])


def _reach(name: str) -> None:
    """Raise ConnectionError if the Hub can't be reached and nothing may be cached. load_dataset would notice too, but
    only after 23 s of retries, which huggingface_hub has no setting for. A Hub that is only slow passes."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    owner = name.partition("/")[0]
    caches = {HF_HUB_CACHE: f"datasets--{owner}*", datasets.config.HF_DATASETS_CACHE: f"{owner}*"}
    cached = any(any(Path(folder).glob(pattern)) for folder, pattern in caches.items())
    if cached or datasets.config.HF_HUB_OFFLINE or Path(name).exists():
        return
    for pause in PAUSES:
        time.sleep(pause)
        try:
            return urllib.request.urlopen(datasets.config.HF_ENDPOINT, timeout=10).close()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, socket.gaierror) and getattr(reason, "errno", None) not in UNREACHABLE:
                return  # it refuses this request, is slow, or this client's certificates are not the library's
    raise ConnectionError(f"{datasets.config.HF_ENDPOINT}: {reason}")


def _without_blank_lines(document: str) -> str:
    """A document without the blank lines at its start and end; the indentation of the first line stays."""
    document = document.rstrip()
    indented = len(document) - len(document.lstrip())
    return document[document.rfind("\n", 0, indented) + 1 :]


def _held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: about ``fraction`` of them do, chosen by their content."""
    digest = hashlib.blake2b(document.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _one_side(documents: Iterator[str], cut: int, split: str) -> Iterator[str]:
    """The text before the character ``cut`` ("train") or from it on ("val"), as documents; one of them is divided."""
    for document in documents:
        place = max(cut, 0)
        yield document[:place] if split == "train" else document[place:]
        cut -= len(document)
