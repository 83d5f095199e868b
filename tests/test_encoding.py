"""A batch is a quicker way to the ids of ``encode``, and is not believed when it differs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from components.tokenizer import Bytes, Tiktoken
from toolkit.compose import load_shelf
from toolkit.conformance import Bench, run_checks
from toolkit.registry import entry_of
from toolkit.text.encoding import Disagreement, Unencodable, encode_all, has_batches, referee
from toolkit.text.tokens import TokenFiles

load_shelf()
STORIES = [f"Story {i}: Zoë saw {i} red balls — and one more." for i in range(300)]
TEXT = {"train": STORIES, "val": STORIES[:20]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    return tmp_path / "cache"


def written(tokenizer, **about):
    files = TokenFiles(tokenizer, 8, 0, TEXT.__getitem__, lambda: about)
    files.prepare()
    return files


class OneByOne(Bytes):
    def encode(self, text):
        return super().encode(text)


class Shifted(Bytes):
    """Its batches are wrong where a text has more than ASCII."""

    def encode(self, text):
        return super().encode(text)

    def encode_batch(self, texts):
        ids, counts = super().encode_batch(texts)
        return np.where(ids > 127, ids ^ 1, ids), counts


def test_a_class_that_overrides_encode_alone_is_encoded_by_it():
    assert has_batches(Bytes()) and has_batches(Shifted()) and not has_batches(OneByOne())


def test_files_are_the_same_either_way_and_say_which_way(cache):
    batches, single = written(Bytes(), by="batches"), written(OneByOne(), by="encode")
    assert batches.fingerprint() == single.fingerprint()
    assert (batches.encoded_by, single.encoded_by) == ("encode_batch: Bytes", "encode")
    sums = [json.loads(path.read_text())["splits"] for path in cache.rglob("manifest.json")]
    assert len(sums) == 2 and sums[0] == sums[1]


def test_a_batch_that_differs_is_encoded_again_with_a_warning(caplog):
    files = written(Shifted())
    assert files.encoded_by == "encode" and "Shifted.encode_batch" in caplog.text
    assert files.fingerprint() == written(OneByOne(), by="encode").fingerprint()


def test_the_referee_sees_long_texts_and_wrong_counts():
    long = ["Zoë " * 10_000]
    for seed in range(3):
        with pytest.raises(Disagreement, match="encode gives"):
            referee(Shifted(), long, *encode_all(Shifted(), long), seed)
        referee(Bytes(), long, *encode_all(Bytes(), long), seed)

    class Loses(Bytes):
        def encode_batch(self, texts):
            ids, counts = super().encode_batch(texts)
            return ids[:-1], counts

    with pytest.raises(Disagreement, match="counts 2 ids of 1 texts, but gave 1"):
        encode_all(Loses(), ["ab"])


def test_a_panic_in_a_batch_is_a_difference_and_in_encode_names_the_document():
    class PanicException(BaseException):
        """As pyo3 raises it."""

    class Panics(Bytes):
        worst = "\u2014 and"

        def encode(self, text):
            if self.worst in text:
                raise PanicException("StackOverflow")
            return super().encode(text)

        def encode_batch(self, texts):
            raise PanicException("StackOverflow")

    class BatchPanics(Panics):
        worst = "not in any story"

        encode = Panics.encode
        encode_batch = Panics.encode_batch

    assert written(BatchPanics(), by="panic").encoded_by == "encode"
    with pytest.raises(Unencodable, match="Panics.encode fails on a document of .*'Story 0: .*StackOverflow"):
        encode_all(Panics(), STORIES, batches=False)
    with pytest.raises(ValueError, match="^document 1 of the train split of the text .*bind another tokenizer"):
        written(Panics(), by="panics")


def test_conformance_compares_batches():
    (line,) = run_checks(Bench(entry_of("tokenizer", Shifted)), only="save() and load() keep the encoding")
    assert line.verdict == "fail" and "batch" in str(line)
    (line,) = run_checks(Bench(entry_of("tokenizer", OneByOne)), only="save() and load() keep the encoding")
    assert line.verdict != "fail"


def test_the_default_vocabulary_is_written_by_gigatoken_as_tiktoken_would():
    class Plain(Tiktoken):
        def encode(self, text):
            return super().encode(text)

    fast, plain = written(Tiktoken(), by="batches"), written(Plain(), by="encode")
    assert fast.encoded_by.startswith("encode_batch: gigatoken") and plain.encoded_by == "encode"
    assert fast.fingerprint() == plain.fingerprint()


@pytest.mark.slow
def test_the_benchmark_runs_and_its_files_agree():
    """In a process of its own: it binds itself to cores."""
    options = ["--megabytes", "0.2", "--threads", "1", "--rounds", "2", "--json"]
    command = [sys.executable, "-m", "benchmarks.tokenise", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["megabytes_per_second"].keys() == {"ours", "tiktoken", "hugging face"} and len(table["sha256"]) == 64
    assert table["encoded_by"][0].startswith("encode_batch: gigatoken")
