"""Corpora in the files that they come in: the same documents out of each, in bounded memory, damage that is named."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from components.data import TextFiles
from components.tokenizer import Bytes, Tiktoken
from toolkit import textfiles
from toolkit.config import parse_file

STORIES = [f"Story {i}: a cat, “{'é' * (i % 7)}” and\n{i} 😀 hats." for i in range(300)]
SEPARATOR = "<|endoftext|>"
PACKED = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress}
PACKED[".zst"] = lambda data: b"".join(zstandard.compress(part) for part in (data[:900], data[900:]))  # two frames


def rows(stories):
    return [{"id": i, "text": story} for i, story in enumerate(stories)]


WRITTEN = {
    ".txt": lambda stories: SEPARATOR.join(stories),
    ".MD": lambda stories: SEPARATOR.join(stories),
    ".jsonl": lambda stories: "".join(json.dumps(row) + "\n" for row in rows(stories)),
    ".NDJSON": lambda stories: "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows(stories)),
    ".json": lambda stories: json.dumps(rows(stories), indent=2, ensure_ascii=False),
    ".Json": lambda stories: "".join(json.dumps(row, indent=1) for row in rows(stories)),
}


def read(path, separator=SEPARATOR, column="text"):
    return list(textfiles.documents(Path(path), separator, column))


@pytest.mark.parametrize("piece", [2**20, 7])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", WRITTEN)
def test_each_file_gives_the_same_documents(kind, packed, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "PIECE", piece)
    path = tmp_path / f"stories{kind}{packed.upper() if kind.isupper() else packed}"
    path.write_bytes(PACKED[packed](WRITTEN[kind](STORIES[:60]).encode()))
    assert read(path) == STORIES[:60]


def test_a_table_gives_the_same_documents(tmp_path):
    path = tmp_path / "stories.PARQUET"
    pyarrow.parquet.write_table(pyarrow.table({"id": range(300), "text": STORIES}), path, row_group_size=50)
    assert read(path) == STORIES
    with pytest.raises(ValueError, match=r"stories.PARQUET has no column 'story'; it has id, text"):
        read(path, column="story")
    with pytest.raises(ValueError, match=r"the column 'id' holds no text, but int64"):
        read(path, column="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"stories.PARQUET is damaged, or no Parquet file"):
        read(path)


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
def test_a_byte_order_mark_is_no_part_of_json(kind, tmp_path):
    path = tmp_path / f"stories{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + WRITTEN[".jsonl"](STORIES).encode())
    assert read(path) == STORIES


def test_a_byte_order_mark_is_no_part_of_gin(tmp_path):
    path = tmp_path / "x.gin"
    path.write_bytes(b"\xef\xbb\xbfGPT.dim = 8\n")
    assert parse_file(path).bindings[0].key == "GPT.dim"


@pytest.mark.parametrize("line, reason", [
    ('{"text": ' + "9" * 5000 + "}", "a number has thousands of digits"),
    ("[" * 100_000, "a value is nested too deeply|Expecting"),
    ('{"text": ' * 100_000, "a value is nested too deeply|Expecting"),
    ('{"text": "x"', "Expecting"),
    ('["x"]', "no text in the column 'text' \\(found: list\\)"),
    ('{"story": "x"}', "no text in the column 'text' \\(found: story\\)"),
    ('{"text": 3}', "no text in the column 'text'"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_json_that_can_not_be_read_is_named_with_its_line(kind, line, reason, tmp_path):
    good = json.dumps({"text": "good"})
    path = tmp_path / ("x.jsonl" if kind == "lines" else "x.json")
    path.write_text(f"{good}\n{line}\n" if kind == "lines" else f"[{good},\n{line}\n]")
    with pytest.raises(ValueError, match=rf"{path.name}:[234]: .*({reason})"):
        read(path)


@pytest.mark.parametrize("content, reason", [
    ('[{"text": "a"}', "the array has no end"),
    ('[{"text": "a"}] x', "something follows the end of the array"),
    ('[{"text": "a"}, ', "the array has no end"),
])  # fmt: skip
def test_an_array_that_does_not_end_well_is_named(content, reason, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=f"x.json:1: .*{reason}"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "garbled", "not compressed"])
def test_a_damaged_compressed_file_is_named(packed, harm, tmp_path):
    path = tmp_path / f"x.txt{packed}"
    data = bytearray(PACKED[packed](WRITTEN[".txt"](STORIES).encode()))
    if harm == "garbled":
        data[len(data) // 2 :] = os.urandom(len(data) - len(data) // 2)
    path.write_bytes(data[: len(data) // 2] if harm == "cut" else data if harm == "garbled" else b"plain text")
    with pytest.raises(ValueError, match=rf"x.txt{packed} is (damaged|not)"):
        read(path)


def test_an_unknown_name_that_holds_json_is_asked_about(tmp_path):
    path = tmp_path / "stories.data"
    path.write_text(WRITTEN[".jsonl"](STORIES))
    with pytest.raises(ValueError, match=r"stories.data looks like JSON, .* rename it to .jsonl or .json, or to .txt"):
        read(path)
    path.write_text("[Chapter 1]\nOnce upon a time")
    assert read(path) == ["[Chapter 1]\nOnce upon a time"]


def test_a_folder_means_its_text_files_and_says_how_many(tmp_path, capsys):
    for name in ("b.txt", "a.jsonl.gz", "sub/c.md", ".hidden/d.txt", "picture.png", "empty.txt", "sub/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else b"x")
    found = textfiles.find([str(tmp_path)])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jsonl.gz", "b.txt", "sub/c.md"]
    assert "3 text files" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no text files"):
        textfiles.find([str(tmp_path / "none")])


def test_a_path_is_a_path_before_it_is_a_glob(tmp_path, monkeypatch):
    for name in ("data[1].txt", "data1.txt"):
        (tmp_path / name).write_text("x")
    assert textfiles.find([str(tmp_path / "data[1].txt")]) == [tmp_path / "data[1].txt"]
    assert textfiles.find([str(tmp_path / "data[0-9].txt")]) == [tmp_path / "data1.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert textfiles.find(["~/data1.txt"]) == textfiles.find(["~/data1*"]) == [tmp_path / "data1.txt"]


def test_token_files_of_before_are_found_again(tmp_path):
    """What names the token files of plain text did not change with what can be read."""
    (tmp_path / "a.txt").write_text(SEPARATOR.join(STORIES))
    source = TextFiles(Bytes(), 16, 0, paths=[str(tmp_path / "a.txt")])._source()
    assert list(source) == ["files", "separator", "val_fraction", "val_by_position", "column"]
    assert source["files"][0][0] == "a.txt" and len(source["files"][0][1]) == 64


def test_a_split_without_documents_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("one document")
    data = TextFiles(Bytes(), 4, 0, paths=[str(tmp_path / "a.txt")])
    with pytest.raises(ValueError, match=r"split of a.txt: 1 found in all; give .*TextFiles.val_fraction") as told:
        data.prepare()
    assert "{" not in str(told.value)


def test_a_stretch_that_is_too_long_for_tiktoken_is_told(monkeypatch):
    class PanicException(BaseException):
        pass

    class Encoding:
        def encode_ordinary(self, text):
            raise PanicException("called `Result::unwrap()` on an `Err` value: StackOverflow")

    tokenizer = Tiktoken()
    tokenizer.__dict__["_encoding"] = Encoding()
    with pytest.raises(ValueError, match="1,300,000 characters that begins 'ACGTACGT.*install gigatoken"):
        tokenizer.encode("ACGT" * 325_000)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_memory_does_not_grow_with_the_file(packed, tmp_path):
    """A corpus of 200 MB, read by a process of its own."""
    path = tmp_path / f"x.jsonl{packed}"
    opened = {".gz": gzip.open, ".xz": lambda p, m: lzma.open(p, m, preset=0), ".zst": zstandard.open}[packed]
    block = "".join(json.dumps({"text": story * 20}) + "\n" for story in STORIES).encode()
    with opened(path, "wb") as file:
        for _ in range(200_000_000 // len(block)):
            file.write(block)
    program = (
        "import sys; from pathlib import Path; from toolkit import textfiles\n"
        "count = sum(len(d) for d in textfiles.documents(Path(sys.argv[1]), None, 'text'))\n"
        "print(count, *(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, peak = map(int, done.stdout.split())
    assert count > 100_000_000 and peak < 100_000  # kB, of which Python itself has a third
