"""Text to token files, compared with the batch encoding of tiktoken and of Hugging Face on the same cores.

    python -m benchmarks.tokenise [--text FILE] [--megabytes 128] [--threads 2] [--rounds 5] [--json]
    python -m benchmarks.tokenise --bounded [--megabytes 2000]

All start with the same documents in memory and end with the same file of uint32 ids, with an end of document after
each. The SHA-256 of their files must be equal. Ours does what a run does: ``TokenFiles.prepare``, with the comparison
of encoders, both splits, the manifest, and the checked copy of the vocabulary. The peers encode batches of 1,000
documents and write them. A round runs all of them, and each round starts with another one; ratios are taken within a
round. The cores are set by the affinity of the process. ``--bounded`` streams text through ours and prints the peak
memory."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from components.stories import story
from components.tokenizer import Tiktoken
from toolkit.text.tokens import TokenFiles

BATCH = 1_000  # documents that the peers encode at a time
VAL = "Once upon a time there was a small validation split. The end.\n"


def main(argv: list[str] | None = None) -> int:
    """Print a table or JSON. Returns 0; raises AssertionError if the files differ."""
    arguments = _arguments(argv)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
        os.sched_setaffinity(0, cores)
        if len(cores) < arguments.threads:
            raise ValueError(f"--threads {arguments.threads}: this process may use only {len(cores)} cores")
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # Hugging Face's threads
    texts = _file(arguments.text) if arguments.text else _synthetic()
    table = _bounded(arguments, texts) if arguments.bounded else _compare(arguments, texts)
    print(json.dumps(table, indent=2) if arguments.json else "\n".join(_lines(table)))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenise", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--text", type=Path, help="a file of documents that end with <|endoftext|> (default: synthetic stories)"
    )
    parser.add_argument("--megabytes", type=float, help="how much text (default: 128, or 2000 with --bounded)")
    parser.add_argument("--threads", type=int, default=2, help="how many cores all contestants use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-hugging-face", action="store_true", help="leave out the slowest peer")
    parser.add_argument("--bounded", action="store_true", help="peak memory of ours on a stream of text")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.megabytes = arguments.megabytes or (2_000 if arguments.bounded else 128)
    return arguments


def _synthetic() -> list[str]:
    return [story(0, index) for index in range(4_000)]


def _file(path: Path) -> list[str]:
    documents = (document.strip() for document in path.read_text(encoding="utf-8").split("<|endoftext|>"))
    return [document for document in documents if document]


def _stream(texts: list[str], megabytes: float) -> Iterator[str]:
    """Repeat the documents, each time in another order, until there are this many megabytes."""
    left, rng = megabytes * 1e6, random.Random(0)
    while left > 0:
        for document in rng.sample(texts, len(texts)):
            yield document
            left -= len(document.encode())
            if left <= 0:
                return


def _ours(documents: Callable[[], Iterable[str]]) -> tuple[Path, str | None]:
    """Write our token file of the training split. Returns its path, and the encoder that was used."""
    folder = tempfile.mkdtemp(dir=os.environ["TOOLKIT_CACHE"])
    os.environ["TOOLKIT_CACHE"], before = folder, os.environ["TOOLKIT_CACHE"]
    try:
        files = TokenFiles(Tiktoken(), 4, 0, lambda split: documents() if split == "train" else [VAL], dict)
        files.prepare()
    finally:
        os.environ["TOOLKIT_CACHE"] = before
    return next(Path(folder).rglob("train.bin")), files.encoded_by


def _tiktoken(documents: list[str], threads: int) -> Path:
    encoding = Tiktoken()._encoding
    return _peer(
        documents, encoding.eot_token, lambda batch: encoding.encode_ordinary_batch(batch, num_threads=threads)
    )


def _hugging_face(documents: list[str]) -> Path:
    tokenizer = _converted()
    return _peer(
        documents,
        Tiktoken().eot,
        lambda batch: [e.ids for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False)],
    )


@functools.cache
def _converted() -> Tokenizer:
    """tiktoken's vocabulary as Hugging Face's transformers converts it."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = Tiktoken()._encoding
    with tempfile.TemporaryDirectory() as folder:
        Tiktoken().save(Path(folder))
        converter = TikTokenConverter(vocab_file=str(Path(folder) / "ranks.tiktoken"), pattern=encoding._pat_str)
        return converter.converted()


def _peer(documents: list[str], eot: int, encode: Callable[[list[str]], list[list[int]]]) -> Path:
    handle, name = tempfile.mkstemp(dir=os.environ["TOOLKIT_CACHE"])
    with os.fdopen(handle, "wb") as file:
        for start in range(0, len(documents), BATCH):
            for ids in encode(documents[start : start + BATCH]):
                ids.append(eot)
                file.write(np.array(ids, dtype=np.uint32).data)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _compare(arguments: argparse.Namespace, texts: list[str]) -> dict:
    documents = list(_stream(texts, arguments.megabytes))
    size = sum(len(document.encode()) for document in documents) / 1e6
    encoded_by: set[str | None] = set()

    def ours() -> Path:
        path, by = _ours(lambda: documents)
        encoded_by.add(by)
        return path

    sides: dict[str, Callable[[], Path]] = {"ours": ours, "tiktoken": lambda: _tiktoken(documents, arguments.threads)}
    if not arguments.no_hugging_face:
        sides["hugging face"] = lambda: _hugging_face(documents)
        _converted()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    sums: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOOLKIT_CACHE"] = folder
        for number in range(arguments.rounds):
            order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
            for name in order:
                start = time.perf_counter()
                path = sides[name]()
                rates[name].append(size / (time.perf_counter() - start))
                sums[name] = hashlib.sha256(path.read_bytes()).hexdigest()
                path.unlink()
                if sums[name] != sums[order[0]]:
                    raise AssertionError(f"{name} and {order[0]} write different ids")
    ratios = {
        name: [a / b for a, b in zip(rates["ours"], rates[name], strict=True)] for name in sides if name != "ours"
    }
    return {
        "text": str(arguments.text.name) if arguments.text else "synthetic stories",
        "megabytes": round(size, 1),
        "documents": len(documents),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "encoded_by": sorted(map(str, encoded_by)),
        "sha256": sums["ours"],
        "megabytes_per_second": {name: _spread(values) for name, values in rates.items()},
        "ours_over": {name: _spread(values) for name, values in ratios.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def _bounded(arguments: argparse.Namespace, texts: list[str]) -> dict:
    peaks: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peaks.append(_resident())

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOOLKIT_CACHE"] = folder
        _ours(lambda: itertools.islice(texts, 1_000))  # load the libraries and the vocabulary before measuring
        before, start = _resident(), time.perf_counter()
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        path, encoded_by = _ours(lambda: _stream(texts, arguments.megabytes))
        over.set()
        thread.join()
        tokens = path.stat().st_size // 4
    return {
        "text": str(arguments.text.name) if arguments.text else "synthetic stories",
        "megabytes": arguments.megabytes,
        "threads": arguments.threads,
        "encoded_by": encoded_by,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "resident_MiB_before": round(before, 1),
        "resident_MiB_peak": round(max([before, *peaks]), 1),
    }


def _resident() -> float:
    """The memory that this process uses now, in MiB. Only Linux reports it without a package."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _lines(table: dict) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield f"{name}:"
            for row, spread in value.items():
                yield f"  {row:14} {spread['median']:8.2f}  ({spread['min']:.2f} ... {spread['max']:.2f})"
        else:
            yield f"{name:22} {value}"


if __name__ == "__main__":
    sys.exit(main())
