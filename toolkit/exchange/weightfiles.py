"""The files with weights in a folder that comes in: what their names may be, and what they hold. No tensor is read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from toolkit.exchange import library

SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
LARGEST_HEADER = 100_000_000  # bytes; safetensors itself allows no more


@dataclass(frozen=True)
class Counts:
    """How many tensors the weights of a folder are at most, and how many numbers they have at most in total."""

    tensors: int
    numbers: int


def check_names(folder: Path) -> None:
    """Raise ValueError for an index that names a file in another folder, and for a link that leads out of the folder.
    The links in a cache of the Hub, snapshots/COMMIT/NAME to blobs/DIGEST, are allowed."""
    for index in sorted(folder.glob("*.index.json")):
        shards = library.read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map, an object with the file of each tensor")
        for tensor, shard in shards.items():
            if not isinstance(shard, str) or not shard or set("/\\\0") & set(shard) or shard in (".", ".."):
                raise ValueError(
                    f"{index}: the file of {tensor} is {shard!r}, but must be the name of a file in {folder}, without "
                    "a folder"
                )
    blobs = folder.absolute().parent.parent / "blobs" if folder.absolute().parent.name == "snapshots" else folder
    for pattern in ("*.json", *SAFETENSORS, *PICKLES):
        for file in folder.glob(pattern):
            target = file.resolve()
            if file.is_symlink() and not any(target.is_relative_to(each.resolve()) for each in (folder, blobs)):
                raise ValueError(f"{file} is a link to {target}, outside the folder; put the file in its place")


def counts(folder: Path, pickle: bool) -> Counts:
    """What the weights in a folder can hold. Raises ValueError if there are none, or only pickled ones that are not
    asked for, or if a file is damaged."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        sizes = [size for file in files for size in _sizes(file)]
        return Counts(len(sizes), sum(sizes))
    pickled = sorted(folder.glob("*.bin"))
    if not pickled:
        raise ValueError(f"{folder} has no weights (no *.safetensors)")
    if not pickle:
        raise ValueError(
            f"{folder} has only pickled weights, which can run code when they are read (no *.safetensors); --pickle "
            "reads them as weights only"
        )
    # A number takes a byte or more. A file of today's format is a zip archive with an entry for each tensor; one of the
    # older format takes 100 bytes and more for each.
    return Counts(sum(map(_entries, pickled)), sum(file.stat().st_size for file in pickled))


def _sizes(file: Path) -> Iterator[int]:
    """How many numbers each tensor of a safetensors file has, from its header. Raises ValueError for a damaged file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise ValueError("its header is longer than the file, or empty")
            header = json.loads(stream.read(length))
        tensors = [each for name, each in header.items() if name != "__metadata__"]
        for each in tensors:
            first, end = each["data_offsets"]
            numbers = prod(each["shape"])
            if not 0 <= first <= end <= size - 8 - length or numbers < 0 or numbers > 8 * (end - first):
                raise ValueError("its header does not fit its length")
            yield numbers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} can't be read: {error}; download it again") from error


def _entries(file: Path) -> int:
    """How many tensors a pickled file has at most."""
    try:
        with zipfile.ZipFile(file) as archive:
            return len(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return file.stat().st_size // 100
