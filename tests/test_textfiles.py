"""Text files in every format and compression: which are found, what is read, and what is refused."""

import bz2
import gzip
import hashlib
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from components.data import HubDataset, TextFiles
from components.tokenizer import Bytes
from toolkit.config.layers import parse_file
from toolkit.text import textfiles as module
from toolkit.text.textfiles import documents, find_files

ROOT = Path(__file__).parents[1]
MARK = b"\xef\xbb\xbf"
STORIES = [f"Story {i}.\nThe ship went out to sea, and {i} sailors sang." for i in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def zstandard(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def as_parquet(texts: list[str], group: int = 70) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    parquet.write_table(table, sink, row_group_size=group)
    return sink.getvalue().to_pybytes()


def rows(texts: list[str]) -> list[str]:
    return [json.dumps({"id": i, "text": text, "more": [{"a": [1.5, None, "]},{"]}]}) for i, text in enumerate(texts)]


WRITE = {
    ".txt": lambda texts: "<|sep|>".join([*texts, ""]).encode(),
    ".md": lambda texts: "<|sep|>".join([*texts, ""]).encode(),
    ".jsonl": lambda texts: "\n".join(rows(texts)).encode(),
    ".ndjson": lambda texts: ("\r\n\r\n".join(rows(texts)) + "\n").encode(),
    ".json": lambda texts: ("[" + ",".join(rows(texts)) + "]").encode(),
    ".JSON": lambda texts: json.dumps([json.loads(row) for row in rows(texts)], indent=2, ensure_ascii=False).encode(),
    ".Json": lambda texts: MARK + "\n".join(rows(texts)).encode(),
    ".JSONL": lambda texts: MARK + "\n".join(rows(texts)).encode(),
    ".parquet": as_parquet,
}
CONTAINERS = [f + c for f in WRITE for c in (*COMPRESS, ".GZ") if f != ".parquet" or not c]


def write(path: Path, texts: list[str], suffix: str) -> Path:
    """The documents in a container: format and compression as the suffix says."""
    kind = "." + suffix.split(".")[1]
    path = path.with_name(path.name + suffix)
    path.write_bytes(COMPRESS[suffix.removeprefix(kind).lower()](WRITE[kind](texts)))
    return path


def odd_texts(seed: int) -> list[str]:
    """Documents with what readers trip over, the longest many pieces long."""
    rng = random.Random(seed)
    signs = [
        "a",
        "\n",
        '"',
        "\\",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        " ",
        "\u00e9",
        "\u6570",
        "\U0001f469",
        "<|",
        "\u2028",
        "\r",
    ]
    lengths = [*(rng.randrange(200) for _ in range(150)), 0, 30_000]
    return ["".join(rng.choices(signs, k=length)) for length in lengths]


# ---- what is read


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_the_same_documents_come_out_of_every_container(tmp_path, monkeypatch, suffix):
    for piece in (7, 1000, 2**20):
        monkeypatch.setattr(module, "PIECE", piece)
        texts = odd_texts(piece) if piece > 7 else odd_texts(piece)[:60]
        path = write(tmp_path / "a", texts, suffix)
        assert list(documents(path, "<|sep|>", "text")) == texts


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_tokens_are_the_same_whatever_the_container(tmp_path, suffix):
    plain = write(tmp_path / "plain", STORIES, ".txt")
    prints = {
        TextFiles(Bytes(), 16, 0, [str(path)], separator="<|sep|>").fingerprint()
        for path in (plain, write(tmp_path / "other", STORIES, suffix))
    }
    assert len(prints) == 1


@pytest.mark.parametrize("piece", [1, 2, 7, 10_000])
def test_text_is_divided_alike_however_it_is_read(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    texts = [*STORIES[:9], "", "", "h\u00e9 | <", "<|", "|>"]
    (tmp_path / "a.txt").write_bytes("<||>".join([*texts, ""]).encode())
    assert list(documents(tmp_path / "a.txt", "<||>", "text")) == texts
    assert list(documents(tmp_path / "a.txt", None, "text")) == [(tmp_path / "a.txt").read_bytes().decode()]


def test_members_of_a_compressed_file_are_read_to_the_last(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one|two") + compress(b" and|three"))
        assert list(documents(path, "|", "text")) == ["one", "two and", "three"]


def test_one_object_over_several_lines_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(
        '\n{\n "text": "a",\n "b": 1\n}\n{"text": "b"}{"text": "a", "text": "c", "n": NaN}'
    )
    assert list(documents(tmp_path / "a.json", None, "text")) == ["a", "b", "c"]
    (tmp_path / "b.json").write_text(" [ ]\n")
    assert list(documents(tmp_path / "b.json", None, "text")) == []


def test_columns_of_parquet_may_be_large_dictionaries_or_have_nulls(tmp_path):
    texts = pyarrow.array(["sea", None, "sea", "ship"])
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"story": texts.cast(kind)}), tmp_path / "a.parquet")
        assert list(documents(tmp_path / "a.parquet", None, "story")) == ["sea", "", "sea", "ship"]


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.gin").write_bytes(MARK + b"Experiment.steps = 3\n")
    [binding] = parse_file(tmp_path / "a.gin").bindings
    assert (binding.key, binding.value, binding.where) == ("Experiment.steps", 3, f"{tmp_path / 'a.gin'}:1")


# ---- token files of before


def test_plain_files_are_called_what_they_always_were(tmp_path):
    """The cache finds token files by this: a key more, and every text is tokenised anew."""
    (tmp_path / "a.txt").write_bytes(b"sea")
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    sums = [hashlib.sha256(content).hexdigest() for content in (b"sea", b"{}")]
    source = TextFiles(Bytes(), 16, 0, ["*.txt", "b.jsonl"])._source()
    assert json.dumps(source) == json.dumps(
        {
            "files": [["a.txt", sums[0]], ["b.jsonl", sums[1]]],
            "separator": "<|endoftext|>",
            "val_fraction": 0.1,
            "val_by_position": False,
            "column": "text",
        }
    )


@pytest.mark.parametrize("suffix", [".ndjson", ".json", ".JSONL", ".parquet", ".jsonl.gz"])
def test_what_was_once_read_as_plain_text_is_not_taken_from_the_cache(tmp_path, suffix):
    path = write(tmp_path / "a", STORIES, suffix)
    assert TextFiles(Bytes(), 16, 0, [str(path)])._source()["reader"] == 2


# ---- which files


def test_a_folder_means_its_text_files(tmp_path, caplog):
    folder = tmp_path / "corpus"
    for name in ("b.TXT", "deep/er/a.jsonl", "c.md.gz", ".hidden.txt", ".git/d.txt", "code.py", "none.txt", "p.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == "none.txt" else b"x")
    (folder / "void").mkdir()
    expected = [folder / "b.TXT", folder / "c.md.gz", folder / "deep/er/a.jsonl"]
    assert find_files(["corpus"]) == [path.relative_to(tmp_path) for path in expected]
    assert find_files([f"{folder}/"]) == expected == find_files([str(folder), f"{folder}/deep/er/a.jsonl"])
    [message] = [message for message in caplog.messages if str(folder) in message]
    assert "3 text files (.jsonl, .md, .txt); 3 others are ignored" in message


def test_a_folder_without_text_says_what_it_looks_for(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x")
    with pytest.raises(
        ValueError, match=r"folder code has no text file .* none of its 1 files ends in \.txt.*\.zst.*glob"
    ):
        find_files(["code"])


def test_a_path_that_exists_is_no_glob(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data[1].txt").write_text("a")
    (tmp_path / "data1.txt").write_text("b")
    (tmp_path / "set[a]").mkdir()
    (tmp_path / "set[a]" / "c.txt").write_text("c")
    assert find_files(["data[1].txt"]) == [Path("data[1].txt")]
    assert find_files(["~/data[1].txt", "~/data[0-9].txt"]) == [tmp_path / "data[1].txt", tmp_path / "data1.txt"]
    assert find_files(["~/set[a]"]) == [tmp_path / "set[a]" / "c.txt"]
    for missing in ("", "data[2].txt", "~/nothing/*.txt", "a\0b"):
        with pytest.raises(ValueError, match="TextFiles.paths: no file matches"):
            find_files([missing])


@pytest.mark.parametrize("name", ["rows", "rows.data", "rows.log.gz"])
def test_json_under_an_unknown_suffix_is_asked_about(tmp_path, name):
    compress = COMPRESS[".gz" if name.endswith(".gz") else ""]
    for content in (b'{"text": "a"}\n', MARK + b' [\n {"te\\"xt" : 1}]'):
        (tmp_path / name).write_bytes(compress(content))
        with pytest.raises(ValueError, match=f"{name} looks like JSON, .* rename it: to .jsonl .* .txt"):
            list(documents(tmp_path / name, None, "text"))
    for text in ("{ int a; }", "[1] See there", '"text": 3', '{"a", "b"}'):
        (tmp_path / name).write_bytes(compress(text.encode()))
        assert list(documents(tmp_path / name, None, "text")) == [text]


# ---- what is refused


BAD = {
    "digits.jsonl": (
        b'{"text": "a"}\n{"text": "b", "n": ' + b"7" * 5000 + b"}",
        ":2: not valid JSON .*too many digits",
    ),
    "deep.jsonl": (b"\n" + b'{"text":' * 100_000, ":2: not valid JSON .*nested too deeply"),
    "digits.json": (
        b'[{"text": "a"},\n{"text": "b", "n": ' + b"7" * 5000 + b"}]",
        ":2: not valid JSON .*too many digits",
    ),
    "deep.json": (b"[\n\n" + b"[" * 100_000, ":3: not valid JSON .*nested too deeply"),
    "strings.json": (b'[\n"a", "b"]', ":2: no text in the column 'text' .found: str."),
    "strings.jsonl": (b'["a", "b"]', ":1: no text in the column 'text' .found: list."),
    "nan.jsonl": (b'{"text": NaN}', ":1: no text in the column 'text' .found: text."),
    "null.json": (b'[{"text": "a"},\n{"text": null}]', ":2: no text in the column 'text'"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"}\n', ":3: not valid JSON .the array does not end"),
    "inside.json": (b'[{"text": "a"},\n{"text": "b', ":2: not valid JSON .Unterminated string"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', ":2: not valid JSON .a comma or . is missing"),
    "more.json": (b'[{"text": "a"}]\n[]', ":2: not valid JSON .more text follows"),
    "last.json": (b'[{"text": "a"},\n]', ":2: not valid JSON"),
    "end.json": (b'{"text": "a"}\n{"text": "b"}\nnot JSON\n', ":3: not valid JSON .Expecting value"),
    "break.json": (b'{"text": "a\nb"}' + b" " * 100, ":1: not valid JSON .Invalid control character"),
    "word.json": (b"no json", ":1: not valid JSON"),
    "latin.json": ('[{"text": "caf\u00e9"}]'.encode("latin-1"), " is not UTF-8: byte 0xe9 at offset 14"),
    "half.json": ('{"text": "caf\u00e9'.encode()[:-1], " is not UTF-8: byte 0xc3 at offset 13"),
    "wide.json": ('[{"text": "a"}]'.encode("utf-16"), " is not UTF-8|is not text"),
    "many.jsonl": (b'{"' + b'":1,"'.join(b"key%d" % i for i in range(9999)) + b'":1}', ":1: no text .{,400}$"),
    "a.parquet": (b"PAR1 and no more", " is damaged or was cut short .*copy or download"),
    "b.parquet": (as_parquet(["sea"] * 100)[:-40], " is damaged or was cut short"),
    "c.parquet.gz": (gzip.compress(as_parquet(["sea"])), ": parquet compresses .* unpack the file to c.parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, monkeypatch, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    for piece in (64, 2**20):
        monkeypatch.setattr(module, "PIECE", piece)
        with pytest.raises(ValueError, match=f"^{name}{message}") as caught:
            list(documents(Path(name), "<|endoftext|>", "text"))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_lone_surrogates_in_an_array_are_replaced(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "lone \ud800 surrogate"}, *({"text": s} for s in STORIES)]))
    data = TextFiles(Bytes(), 16, 0, ["a.json"])
    both = Bytes().decode([*data.files.tokens("train"), *data.files.tokens("val")])
    assert "lone \ufffd surrogate<|endoftext|>" in both


def test_a_parquet_without_the_column_or_with_numbers_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet(STORIES))
    with pytest.raises(ValueError, match=r"a.parquet: no column 'story' .found: id, text.; bind TextFiles.column"):
        list(documents(tmp_path / "a.parquet", None, "story"))
    with pytest.raises(ValueError, match="a.parquet: the column 'id' does not hold text, but int64"):
        list(documents(tmp_path / "a.parquet", None, "id"))


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.bz2", ".json.xz", ".txt.zst"])
def test_a_damaged_compressed_file_is_named(tmp_path, suffix):
    path = write(tmp_path / "a", [random.Random(0).randbytes(9).hex() for _ in range(9000)], suffix)
    whole = path.read_bytes()
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:3],
        whole[:100] + b"?" * 200 + whole[300:],
        b"plain text",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a{suffix} is damaged or was cut short .*; copy or download it again"):
            list(documents(path, "<|sep|>", "text"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO when it is read")
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_disk_that_fails_is_no_damage(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        list(documents(path, None, "text"))


# ---- messages


def test_messages_name_files_and_counts_and_no_sums(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("")
        (tmp_path / f"{i}.txt").write_text("a work without a separator " * 3 if i == 0 else " \n")
    with pytest.raises(ValueError) as caught:
        TextFiles(Bytes(), 16, 0, ["*.txt"], val_fraction=1e-9).prepare()
    message = str(caught.value)
    assert "val split of 0.txt, 1.txt, 2.txt and 2 more files (found: 1 in train, 0 in val)" in message
    assert "TextFiles.separator (it is '<|endoftext|>')" in message and "val_by_position = True" in message
    with pytest.raises(ValueError, match="lower Experiment.seq_len .* it is 0.txt$"):
        TextFiles(Bytes(), 1000, 0, ["0.txt"], val_by_position=True).prepare()


def test_a_data_set_is_named_without_sums(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.disable_progress_bars()
    (tmp_path / "stories").mkdir()
    write(tmp_path / "stories" / "train", STORIES[:3], ".jsonl")
    data = HubDataset(Bytes(), 16, 0, "~/stories", val_split=None, val_fraction=1e-9)
    with pytest.raises(ValueError, match=r"val split of the data set '~/stories', split 'train'.*3 in train, 0 in val"):
        data.prepare()


# ---- memory and speed


READ = """
import sys, time, pyarrow.parquet, torch
from pathlib import Path
from toolkit.rundir.facts import peak_memory
from toolkit.text.textfiles import documents
before, began = peak_memory(torch.device("cpu")), time.perf_counter()
size = sum(len(document) for document in documents(Path(sys.argv[1]), "<|sep|>", "text"))
print(size, peak_memory(torch.device("cpu")) - before, time.perf_counter() - began)
"""


def read_in_a_process(path: Path) -> tuple[int, int, float]:
    """(characters, bytes that the peak of memory grew by, seconds) of reading a file."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, grown, seconds = done.stdout.split()
    return int(size), int(grown), float(seconds)


@pytest.mark.slow
def test_a_parquet_file_of_one_row_group_is_not_read_at_once(tmp_path):
    rng = random.Random(0)
    texts = [rng.randbytes(1000).hex() for _ in range(60_000)]  # 120 MB in one group
    (tmp_path / "a.parquet").write_bytes(as_parquet(texts, len(texts)))
    size, grown, _ = read_in_a_process(tmp_path / "a.parquet")
    assert size == 120_000_000 and grown < 40 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.gz", ".json.gz", ".json.xz", ".txt.zst", ".parquet"])
def test_memory_stays_flat_however_long_the_file(tmp_path, suffix):
    texts = [f"{i} " + "the ship and the sea " * 100 for i in range(30_000)]  # 63 MB
    path = write(tmp_path / "a", texts, suffix)
    size, grown, _ = read_in_a_process(path)
    assert size == sum(map(len, texts)) and grown < 32 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.gz", ".json.zst", ".txt.xz"])
def test_a_small_file_that_expands_into_zeros_is_refused_in_little_memory(tmp_path, suffix):
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(COMPRESS["." + suffix.split(".")[2]](bytes(300 * 2**20)))
    assert path.stat().st_size < 2**20
    script = READ.replace("size = ", "\ntry: size = ").replace(
        "\nprint(", "\nexcept ValueError as error: size = error\nprint("
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    *told, grown, _ = done.stdout.split()
    assert "byte 0x00 at offset 0" in " ".join(told) and int(grown) < 16 * 2**20, done.stderr
