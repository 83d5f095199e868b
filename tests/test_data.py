"""Where the text comes from: files of one's own, and what the datasets library loads."""

import http.server
import json
import logging
import os
import socket
import threading
import time

import pytest

from components import data as module
from components.data import HubDataset, TextFiles, TinyStories
from components.stories import SyntheticStories, story
from components.tokenizer import Bytes

STORIES = [f"Story {i}.\nThe ship went out to sea, and {i} sailors sang." for i in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The datasets library without a network, with a cache of its own; a folder of data to load."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "stories"
    folder.mkdir()
    write_rows(folder / "train.jsonl", STORIES[:150])
    write_rows(folder / "validation.jsonl", STORIES[150:])
    return folder


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def text_files(*paths, **knobs) -> TextFiles:
    return TextFiles(Bytes(), 16, 0, [str(path) for path in paths], **knobs)


def documents(data, split) -> list[str]:
    return Bytes().decode(data.files.tokens(split)).split("<|endoftext|>")[:-1]


# ---- text files


def test_documents_are_divided_by_the_separator(tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n\n<|endoftext|>")
    data = text_files("a.txt")
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(STORIES)  # each whole, none twice, no blank ones
    assert 5 <= len(val) <= 40
    assert [d for d in STORIES if d in train] == train  # in the order of the file
    assert data.windows("train") == (len(data.files.tokens("train")) - 1) // 16
    assert data.batch("train", 0, 4).shape == (4, 17) and len(data.fingerprint()) == 64


def test_validation_documents_outlive_changes_elsewhere(tmp_path):
    (tmp_path / "a.txt").write_text("|".join(STORIES))
    before = documents(text_files("a.txt", separator="|"), "val")
    (tmp_path / "a.txt").write_text("|".join(["a new one", *reversed(STORIES), *STORIES]))
    after = documents(text_files("a.txt", separator="|"), "val")
    assert set(before) <= set(after) <= {*before, "a new one"} and len(after) >= 2 * len(before)  # copies together


def test_blank_lines_around_a_document_go_and_indentation_stays(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"\n \n    def f{i}():\n        return {i}\n\n|" for i in range(50)))
    train = documents(text_files("a.txt", separator="|"), "train")
    assert len(train) > 30 and all(d.startswith("    def f") and d[-1].isdigit() for d in train)


def test_position_divides_a_single_work_without_a_loss(tmp_path):
    text = "\n  First Citizen:\r\nBefore we proceed, héar me.\n\n" * 41 + "\n"
    (tmp_path / "play.txt").write_text(text, newline="")
    data = text_files("play.txt", val_by_position=True)
    cut = int(len(text) * 0.9)
    assert documents(data, "train") == [text[:cut]] and documents(data, "val") == [text[cut:]]


def test_position_counts_over_files_and_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 60 + "|" + "b" * 60)
    (tmp_path / "b.txt").write_text("c" * 80)
    data = text_files("*.txt", separator="|", val_by_position=True, val_fraction=0.5)
    assert documents(data, "train") == ["a" * 60, "b" * 40] and documents(data, "val") == ["b" * 20, "c" * 80]


def test_no_separator_makes_a_file_a_document(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} <|endoftext|> of the sea\n")
    data = text_files("*.txt", separator=None)
    both = Bytes().decode([*data.files.tokens("train"), *data.files.tokens("val")])
    assert both.count("<|endoftext|>") == 80 and int((data.files.tokens("train") == 256).sum()) < 40


def test_jsonl(tmp_path):
    write_rows(tmp_path / "a.jsonl", [*STORIES, "", "lone \ud800 surrogate"])
    data = text_files("a.jsonl")
    assert sorted(documents(data, "train") + documents(data, "val")) == sorted([*STORIES, "lone \ufffd surrogate"])
    (tmp_path / "b.jsonl").write_text("\n" + "".join(json.dumps({"story": s}) + "\n\n" for s in STORIES))
    other = text_files("b.jsonl", column="story")
    assert sorted(documents(other, "train") + documents(other, "val")) == sorted(STORIES)


def test_globs_reach_into_folders_and_name_each_file_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("|".join(STORIES))
    data = text_files("deep/**/*.txt", "deep/er/a.txt", "deep/**/a*", separator="|")
    assert len(documents(data, "train") + documents(data, "val")) == len(STORIES)


def test_one_byte_or_one_knob_changes_the_files(tmp_path, cache):
    (tmp_path / "a.txt").write_text("|".join(STORIES))
    knobs = [{}, {"val_fraction": 0.2}, {"separator": "."}, {"val_by_position": True}]
    prints = [text_files("a.txt", **{"separator": "|"} | knob).fingerprint() for knob in knobs]
    os.utime(tmp_path / "a.txt", (0, 0))
    (tmp_path / "a.txt").write_text("|".join(STORIES).replace("Story 77", "Story 78"))
    os.utime(tmp_path / "a.txt", (0, 0))  # neither size nor time tell them apart
    prints.append(text_files("a.txt", separator="|").fingerprint())
    assert len(set(prints)) == 5 and len([path for path in cache.iterdir() if path.is_dir()]) == 5


def test_elsewhere_the_same_files_are_the_same(tmp_path, cache):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("|".join(STORIES))
    assert len({text_files(f"{name}/a.txt", separator="|").fingerprint() for name in ("here", "there")}) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    "name, content, knobs, message",
    [
        ("a.txt", b"", {}, "a.txt is empty"),
        ("a.txt", b" \n\n", {}, "no document with text.*train"),
        ("a.txt", b"one document", {}, "no document with text.*val_by_position"),
        ("a.txt", b"good|sea\0", {"separator": "|"}, "a.txt is not text: byte 0x00 at offset 8"),
        ("a.txt", b"good|caf\xe9", {"separator": "|"}, "a.txt is not UTF-8: byte 0xe9 at offset 8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, "a.jsonl is not UTF-8: byte 0xff at offset 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, "a.jsonl:2: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"story": "b", "id": 3}\n',
            {},
            "a.jsonl:2: no text in the column 'text'.*story, id",
        ),
        ("a.jsonl", b'{"text": 3}\n', {}, "a.jsonl:1: no text in the column 'text'.*TextFiles.column"),
        ("a.jsonl", b"[1, 2]\n", {}, "a.jsonl:1: no text in the column 'text' .found: list"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, knobs, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_files(name, **knobs).prepare()


def test_no_match_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("|".join(STORIES))
    with pytest.raises(ValueError, match="no file matches 'missing-.*txt'"):
        text_files("a.txt", "missing-*.txt").prepare()


def test_short_text_names_both_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("a short text")
    with pytest.raises(ValueError, match="train split has 11 tokens.* 17"):
        text_files("a.txt", val_by_position=True).prepare()


def test_constructors_do_no_io(tmp_path, cache):
    text_files("missing.txt"), TinyStories(Bytes(), 16, 0), HubDataset(Bytes(), 16, 0, "./missing")
    assert list(tmp_path.iterdir()) == []


# ---- stories that are made up


def test_stories_depend_on_the_corpus_seed_alone(cache):
    made = SyntheticStories(Bytes(), 16, 0, 20, 5)
    assert documents(made, "train") == [story(0, i) for i in range(20)]
    assert documents(made, "val") == [story(0, i) for i in range(20, 25)]
    assert SyntheticStories(Bytes(), 16, 7, 20, 5).fingerprint() == made.fingerprint()
    assert SyntheticStories(Bytes(), 16, 0, 20, 5, 1).fingerprint() != made.fingerprint()
    assert SyntheticStories(Bytes(), 16, 0, 21, 4).fingerprint() != made.fingerprint()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3


# ---- data sets


def test_folder_with_its_own_splits(hub):
    data = HubDataset(Bytes(), 16, 0, str(hub))
    assert documents(data, "train") == STORIES[:150] and documents(data, "val") == STORIES[150:]
    assert data.batch("val", 0, 2).shape == (2, 17)


def test_share_of_train_where_there_is_no_validation_split(hub):
    (hub / "validation.jsonl").unlink()
    data = HubDataset(Bytes(), 16, 0, str(hub), val_split=None, val_fraction=0.2)
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(STORIES[:150]) and 10 <= len(val) <= 50


def test_parquet_and_column(hub):
    import datasets

    for path in hub.iterdir():
        path.unlink()
    for split, texts in (("train", STORIES[:100]), ("test", [*STORIES[100:], None])):
        datasets.Dataset.from_dict({"story": texts, "id": list(range(len(texts)))}).to_parquet(hub / f"{split}.parquet")
    data = HubDataset(Bytes(), 16, 0, str(hub), val_split="test", column="story")
    assert documents(data, "train") == STORIES[:100] and documents(data, "val") == STORIES[100:]
    with pytest.raises(ValueError, match="no column 'text'; it has story, id"):
        HubDataset(Bytes(), 16, 0, str(hub), val_split="test").prepare()
    with pytest.raises(ValueError, match="column 'id'.*does not hold text.*int64"):
        HubDataset(Bytes(), 16, 0, str(hub), val_split="test", column="id").prepare()


def test_changed_folder_is_read_again(hub):
    before = HubDataset(Bytes(), 16, 0, str(hub)).fingerprint()
    assert HubDataset(Bytes(), 16, 0, str(hub)).fingerprint() == before
    write_rows(hub / "validation.jsonl", [*STORIES[150:], "one more story"])
    changed = HubDataset(Bytes(), 16, 0, str(hub))
    assert changed.fingerprint() != before and documents(changed, "val")[-1] == "one more story"


def test_missing_split_says_what_to_do(hub):
    (hub / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="split 'validation'.*val_split = None"):
        HubDataset(Bytes(), 16, 0, str(hub)).prepare()


def test_broken_rows_are_refused(hub):
    (hub / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="can't load the split 'train'"):
        HubDataset(Bytes(), 16, 0, str(hub)).prepare()


def test_missing_folder_is_refused():
    with pytest.raises(ValueError, match="'./missing': folder not found"):
        HubDataset(Bytes(), 16, 0, "./missing").prepare()


@pytest.mark.parametrize("make", [TinyStories, lambda *given: HubDataset(*given, "roneneldan/TinyStories")])
def test_without_a_network_the_remedy_is_named(hub, make):
    with pytest.raises(ValueError, match="TinyStories.*python -m toolkit.prepare.*TOOLKIT_CACHE.*text_files.gin"):
        make(Bytes(), 16, 0).prepare()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The datasets library as it is on a new machine; the Hub is whatever ``online(port)`` names."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "files"))
    monkeypatch.setattr(module, "PAUSES", (0, 0.01))
    monkeypatch.setenv("no_proxy", "*")
    return lambda port: monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_hub_out_of_reach_is_not_waited_for(online, tmp_path):
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        online(held.getsockname()[1])
        began = time.perf_counter()
        with pytest.raises(ValueError, match="not in the cache and can't be reached .*127.0.0.1.*refused"):
            TinyStories(Bytes(), 16, 0).prepare()
        assert time.perf_counter() - began < 5
        (tmp_path / "hub" / "roneneldan___tiny_stories").mkdir(parents=True)
        module._reach("roneneldan/TinyStories")  # may be cached: the library knows
        with pytest.raises(ConnectionError):
            module._reach("other/TinyStories")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_hub_that_answers_is_left_to_the_library(online, status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        online(server.server_port)
        began = time.perf_counter()
        module._reach("roneneldan/TinyStories")
        assert time.perf_counter() - began < 5  # asked once: nobody answers a second time
        thread.join()
    assert len(asked) == 1


def test_tinystories_once_prepared_needs_no_network(hub, caplog):
    """Token files are found by the data set's name; here they hold other text, as if made where there is a network."""
    data = TinyStories(Bytes(), 16, 0)
    data.files.documents = {"train": STORIES, "val": STORIES[:9]}.__getitem__
    data.prepare()
    caplog.set_level(logging.WARNING)
    assert TinyStories(Bytes(), 16, 1).fingerprint() == data.fingerprint() and caplog.text == ""
