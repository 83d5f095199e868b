"""Token files: windows and batches, the cache, and what can go wrong with it."""

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from components.tokenizer import BPE, Bytes, Characters
from toolkit.text import order, tokenise
from toolkit.text import tokens as module
from toolkit.text.tokens import TokenFiles

ROOT = Path(__file__).parents[1]
TEXT = {"train": [f"Story {i} of the sea, the ship and the storm." for i in range(40)], "val": ["A calm day. " * 20]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(tokenizer=None, seq_len=8, seed=0, text=TEXT, **source) -> TokenFiles:
    return TokenFiles(tokenizer or Bytes(), seq_len, seed, text.__getitem__, lambda: {"name": "sea", **source})


def unread(tokenizer=None, **source) -> TokenFiles:
    """The same text, but reading it fails the test."""
    return TokenFiles(tokenizer or Bytes(), 8, 0, lambda split: pytest.fail("read"), lambda: {"name": "sea", **source})


def folders(cache: Path, kind: str = "tokens") -> list[Path]:
    return sorted(path for path in cache.glob(f"{kind}-*") if path.is_dir())


def test_each_document_ends_with_eot():
    assert bytes(files().tokens("val")[:-1].astype(np.uint8)).decode() == TEXT["val"][0]
    ids = files().tokens("train")
    assert ids[-1] == Bytes.eot and int((ids == Bytes.eot).sum()) == 40


def test_blank_documents_are_left_out_and_lone_surrogates_replaced():
    text = {"train": ["", " \n", "ship \ud800 sea"], "val": TEXT["val"]}
    assert Bytes().decode(files(text=text).tokens("train")) == "ship \ufffd sea<|endoftext|>"


def test_batch_holds_the_windows():
    data = files()
    ids, windows = np.asarray(data.tokens("train")), data.windows("train")
    assert windows == (len(ids) - 1) // 8
    batch = data.batch("train", 0, windows)
    assert batch.shape == (windows, 9) and batch.dtype == np.int64
    expected = sorted(tuple(ids[i * 8 : i * 8 + 9]) for i in range(windows))
    assert sorted(map(tuple, batch)) == expected  # an epoch visits each window once
    again = data.batch("train", 1, windows)
    assert sorted(map(tuple, again)) == expected and (again != batch).any()


def test_samples_depend_on_seed_split_and_number_alone():
    data, last = files(), 3 * files().windows("train") // 12
    whole = data.batch("train", 0, 12 * last)  # spans three epochs
    for size in (1, 3, 12):
        parts = [files().batch("train", i, size) for i in range(12 * last // size)]
        assert (np.concatenate(parts) == whole).all()
    backwards = files()
    for i in reversed(range(last)):  # what was asked before does not matter
        assert (backwards.batch("train", i, 12) == whole[12 * i : 12 * i + 12]).all()
    assert (files(seed=1).batch("train", 0, 12) != whole[:12]).any()


def test_order_stays_what_it_was():
    """A recorded order: a change here would change every comparison with earlier runs."""
    text = {"train": ["".join(chr(i) for i in range(1, 21))], "val": TEXT["val"]}
    order = files(seq_len=1, seed=3, text=text).batch("train", 0, 20)[:, 0].tolist()
    assert order == [17, 13, 19, 9, 4, 14, 16, 11, 7, 2, 3, 12, 18, 1, 15, 10, 5, 8, 6, 20]


@pytest.mark.parametrize("windows", [1, 2, 3, 99, 100, 101, 1000, 4097])
def test_an_order_that_is_not_listed_is_a_permutation_too(monkeypatch, windows):
    monkeypatch.setattr(order, "LISTED", 0)
    orders = [order.order(windows, [0, epoch]) for epoch in (0, 0, 1)]
    assert all(isinstance(places, order.Feistel) for places in orders)
    first, again, other = ([places[i] for i in range(windows)] for places in orders)
    assert sorted(first) == sorted(other) == list(range(windows)) and first == again
    if windows >= 99:
        assert first != other and abs(np.corrcoef(first, range(windows))[0, 1]) < 0.3 > np.corrcoef(first, other)[0, 1]
    with pytest.raises(IndexError):
        orders[0][windows]


def test_beyond_the_listed_windows_memory_stays_flat():
    places = order.order(10**12, [0, 0])
    seen = {places[i] for i in range(2000)}
    assert isinstance(places, order.Feistel) and len(seen) == 2000 and 9e11 < max(seen) < 1e12


def test_every_seed_is_judged_on_the_same_windows():
    judged = [files(seed=seed).batch("val", 0, 40) for seed in (0, 1, 12345)]
    assert (judged[0] == judged[1]).all() and (judged[0] == judged[2]).all()


def test_batches_from_threads_are_the_same():
    data = files()
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda i: data.batch("train", i, 7), range(200)))
    assert all((batch == files().batch("train", i, 7)).all() for i, batch in enumerate(batches))


def test_threads_keep_the_order_of_documents(monkeypatch):
    class SlowerFirst(Bytes):
        def encode(self, text):
            time.sleep(0.01 if text.startswith("Story 0") else 0)
            return super().encode(text)

    monkeypatch.setattr(tokenise, "CHUNK", 50)
    written = Bytes().decode(files(SlowerFirst()).tokens("train"))
    assert written == "".join(document + "<|endoftext|>" for document in TEXT["train"])


def test_tokenised_once(cache):
    first = files()
    first.prepare()
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    assert unread().fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == before and len(before) == 2
    first.documents = first.source = lambda *_: pytest.fail("read")
    first.prepare()


def test_constructor_does_no_io(cache):
    files()
    assert not cache.exists()


def test_manifest_states_what_the_files_hold(cache):
    files().prepare()
    [folder] = folders(cache)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == {"name": "sea"} and manifest["dtype"] == "uint16"
    train = manifest["splits"]["train"]
    assert train["documents"] == 40 and train["bytes"] == sum(map(len, TEXT["train"])) and train["max_id"] == 256
    assert train["tokens"] * 2 == manifest["files"]["train.bin"][0] == (folder / "train.bin").stat().st_size


def test_other_source_or_tokenizer_is_other_files(cache):
    prints = {files(text=TEXT, version=v).fingerprint() for v in (1, 2)}
    assert len(prints) == 1 and len(folders(cache)) == 2  # the same tokens, but nobody can know before reading
    files(Characters(300)).prepare(), files(Characters(301)).prepare()
    assert len(folders(cache)) == 4


def test_fingerprint_covers_tokens_of_both_splits():
    longer = {"train": TEXT["train"], "val": ["A calm day. " * 20 + "!"]}
    other = {"train": ["x" + TEXT["train"][0], *TEXT["train"][1:]], "val": TEXT["val"]}
    prints = {files(text=text, v=i).fingerprint() for i, text in enumerate((TEXT, longer, other))}
    assert len(prints) == 3 and all(len(p) == 64 for p in prints)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: os.truncate(folder / "train.bin", 10),
        lambda folder: (folder / "val.bin").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": '),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
    ],
)
def test_damaged_folder_is_built_again(cache, caplog, harm):
    expected = files(BPE(300)).fingerprint()
    [folder] = folders(cache)
    harm(folder)
    assert files(BPE(300)).fingerprint() == expected
    assert "damaged" in caplog.text and str(folder) in caplog.text
    assert unread(BPE(300)).fingerprint() == expected  # and whole again


def test_temporaries_of_dead_processes_are_swept(cache):
    files().prepare()
    [folder] = folders(cache)
    folder.rename(cache / f"{folder.name}.tmp-1")
    files().prepare()
    assert folders(cache) == [folder]


def test_two_processes_tokenise_once(tmp_path):
    script = f"""
import time
from components.tokenizer import BPE
from toolkit.text.tokens import TokenFiles
def documents(split):
    with open({str(tmp_path / "reads")!r}, "a") as file:
        file.write(split + "\\n")
    time.sleep(0.3)
    yield "the ship and the sea " * 20
print(TokenFiles(BPE(300), 8, 0, documents, dict).fingerprint())
"""
    run = [sys.executable, "-W", "error", "-c", script]
    started = [subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0] and prints[0] == prints[1] != ""
    assert (tmp_path / "reads").read_text().split() == ["train", "train", "val"]  # to learn from, to encode


def test_failed_write_is_an_oserror_and_leaves_nothing(cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a disk that is full after 1000 bytes
    try:
        with pytest.raises(OSError):
            files(text={"train": ["x" * 5000], "val": ["x"]}).prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_cache_that_is_no_folder_is_an_oserror(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError):
        files().prepare()


def test_broken_source_leaves_nothing(cache):
    def documents(split):
        yield "one"
        raise ValueError("line 2 is broken")

    with pytest.raises(ValueError, match="line 2"):
        TokenFiles(Bytes(), 8, 0, documents, dict).prepare()
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_read_only_cache_can_be_used(cache):
    files().prepare()
    for path in cache.glob("*.lock"):
        path.unlink()
    unread().prepare()
    assert list(cache.glob("*.lock")) == []  # a reader writes nothing


def test_wide_vocabulary_is_not_wrapped():
    class Wide(Bytes):
        vocab_size, eot = 100_000, 99_999

    data = files(Wide())
    assert data.tokens("train").dtype == np.uint32 and data.tokens("train")[-1] == 99_999
    Wide.vocab_size, Wide.eot = 65_536, 65_535
    data = files(Wide(), version=2)
    assert data.tokens("train").dtype == np.uint16 and data.tokens("train")[-1] == 65_535


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_split_is_refused(split):
    with pytest.raises(ValueError, match=f"(?s)no document.*{split}.*sea.*val"):
        files(text=TEXT | {split: ["", "\n"]}).prepare()


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="val split has 241 tokens.*seq_len . 1 = 301.*lower Experiment.seq_len"):
        files(seq_len=300).prepare()
    assert files(seq_len=240).windows("val") == 1


def test_ids_outside_the_vocabulary_are_refused():
    class Narrow(Bytes):
        vocab_size, eot = 100, 0

    with pytest.raises(ValueError, match="Narrow.* 121 .*train.*vocab_size is 100"):
        files(Narrow()).prepare()

    class Negative(Bytes):
        eot = -1

    with pytest.raises(ValueError, match="id -1 .*train"):
        files(Negative()).prepare()


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'.*train, val"):
        files().windows("test")


def test_tokenizer_that_forgets_is_refused():
    class Forgetful(Characters):
        def load(self, folder):
            self._learn("theship")

    with pytest.raises(ValueError, match="Forgetful.load"):
        files(Forgetful(64)).prepare()


def test_learns_once_and_from_train_alone(cache):
    first, second = BPE(300), BPE(300)
    files(first).prepare()
    unread(second).prepare()
    assert second.encode("the ship") == first.encode("the ship") and second.fingerprint() == first.fingerprint()
    letters = Characters(64)
    files(letters).prepare()
    assert letters.encode("Ay") == [0, letters.encode("y")[0]]  # "A" occurs in val only


def test_learnt_tokenizer_stays_what_it_is():
    run = BPE(300)
    files(run).prepare()
    before = run.fingerprint()
    other = files(run, text={"train": ["zebra zebra " * 30], "val": ["zebra " * 30]}, name="other text")
    assert other.fingerprint() and run.fingerprint() == before
    assert unread(run).windows("train") > 0  # the files of the run itself are found, too


def test_learning_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "TRAINING_TEXT", 3)
    letters = Characters(64)
    files(letters, text={"train": ["é", "aß", "z" * 20], "val": ["z" * 20]}).prepare()
    assert [letters.encode(c)[0] != 0 for c in "éaßz"] == [True, True, False, False]


def test_quick_work_is_quiet_and_long_work_reports_one_line(capsys):
    files().prepare()
    assert capsys.readouterr() == ("", "")

    class Slow(Bytes):
        def encode(self, text):
            time.sleep(0.05)
            return super().encode(text)

    files(Slow(), version=2).prepare()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "tokenised train: 40 documents" in err and "MB/s" in err
