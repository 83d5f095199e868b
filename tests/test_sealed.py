"""Checkpoints and token files are sealed folders: one writer and one reader for both, and folders of old still open.

tests/saved/ has a checkpoint and a cache as they were written before the two shared their code. One token file there
counted as large, so that it is verified block by block."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from components.tokenizer import Characters
from toolkit.store import checkpoint, sealed
from toolkit.text import tokencache
from toolkit.text.tokens import TokenFiles

SAVED = Path(__file__).parent / "saved"
TEXT = {"train": [f"Story {i} of the sea, the ship and the storm." for i in range(40)], "val": ["A calm day. " * 20]}


class Checkpoints:
    """Writes the checkpoint in tests/saved again."""

    def __init__(self, folder):
        self.root = folder / "checkpoints"

    def model(self):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        groups = [{"params": list(model.parameters()), "lr": 0.01, "peak_lr": 0.01}]
        return model, torch.optim.AdamW(groups)

    def write(self):
        model, optimizer = self.model()
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        progress = {"step": 2, "best": 1.5, "config": "c" * 64, "data": "d" * 64, "tokenizer": "t" * 64}
        journal = {"metrics.jsonl": {"size": 0, "sha256": "0" * 64}}
        return checkpoint.save(self.root / "step-00000002", model, optimizer, progress, journal)

    def problem(self, folder):
        return checkpoint.problem(folder)


class Tokens:
    """Writes the token files in tests/saved again."""

    def __init__(self, folder):
        self.root = folder / "cache"

    def files(self, documents=TEXT.__getitem__):
        return TokenFiles(Characters(64), 8, 0, documents, lambda: {"name": "saved"})

    def write(self):
        self.files().prepare()
        [folder] = [path for path in self.root.glob("tokens-*") if path.is_dir()]
        return folder

    def problem(self, folder):
        return None if tokencache._read_manifest(folder) else "damaged"


@pytest.fixture(params=[Checkpoints, Tokens])
def user(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokencache, "WHOLE", 1000)
    return request.param(tmp_path)


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def damage(folder):
    """Damage one file, so that a cache folder is built again; returns the content of the folder."""
    path = next(path for path in sorted(folder.iterdir()) if path.name in ("val.bin", "state.pt"))
    path.write_bytes(path.read_bytes()[:-1])
    return content(folder)


def failing_at(monkeypatch, name, number):
    """Let the call ``number``, from 0, of a function of the writer raise OSError; returns the list of its calls."""
    function, calls = getattr(sealed, name), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise OSError(5, "Input/output error")
        return function(*arguments)

    monkeypatch.setattr(sealed, name, fails)
    return calls


def test_a_checkpoint_of_old_opens():
    folder = SAVED / "checkpoints" / "step-00000002"
    assert checkpoint.problem(folder) is None
    assert checkpoint.newest(folder.parent) == folder and checkpoint.newest_step(folder.parent) == 2
    model, optimizer = Checkpoints(SAVED).model()
    assert checkpoint.load(folder, model, optimizer)["best"] == 1.5
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_token_files_of_old_open(tmp_path, monkeypatch):
    shutil.copytree(SAVED / "cache", tmp_path / "cache")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    files = Tokens(tmp_path).files(lambda split: pytest.fail("the text was read"))
    assert files.fingerprint() == "51d48c23a91690e22d49f0a267108688795db1aac0696d59c2ab13b663c663d8"
    text = files.tokenizer.decode(files.tokens("train"))
    assert text == "".join(f"{document}<|endoftext|>" for document in TEXT["train"])
    assert files.batch("train", 0, 2).shape == (2, 9) and files._file("train")._digests is not None


def test_what_is_written_today_has_the_format_of_old(user):
    folder = user.write()
    [old] = (SAVED / user.root.name).glob(folder.name)
    assert sorted(content(folder)) == sorted(content(old))
    new, saved = (json.loads((each / "manifest.json").read_text()) for each in (folder, old))
    if isinstance(user, Tokens):
        assert content(folder) == content(old)
    else:  # torch writes its own version into state.pt
        assert new.keys() == saved.keys() and new["files"].keys() == saved["files"].keys()
        for name in ("model.safetensors", "state.pt"):
            assert new["files"][name].keys() == saved["files"][name].keys()


@pytest.mark.parametrize("name", ["fsync", "put_in_place"])
def test_a_fault_in_the_one_writer_leaves_the_old_folder(user, name, monkeypatch):
    """A checkpoint and token files fail alike, at whatever call, so both go through the writer."""
    folder = user.write()
    old, number = damage(folder), 0
    while True:
        with monkeypatch.context() as patch:
            calls = failing_at(patch, name, number)
            if name == "fsync" and number == len(old) + len([p for p in folder.rglob("*") if p.is_dir()]) + 1:
                break  # the folder above, after the new one is in place
            with pytest.raises(OSError, match="Input/output error"):
                user.write()
        assert len(calls) == number + 1
        assert content(folder) == old and [path for path in user.root.glob("*.tmp*")] == []
        if name == "put_in_place":
            break
        number += 1
    user.write()
    assert user.problem(folder) is None and content(folder) != old


def test_a_folder_that_can_not_be_put_in_place_leaves_the_old_one(user, monkeypatch):
    """The old folder is set aside first; it was left there."""
    folder = user.write()
    old, rename = damage(folder), Path.rename

    def refuses(source, target):
        if ".tmp-old-" not in source.name and target == folder:
            raise OSError(5, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="Input/output error"):
        user.write()
    assert content(folder) == old and list(user.root.glob("*.tmp*")) == []


def test_everything_is_on_the_disk_before_it_gets_its_name(user, monkeypatch):
    """Files, then the manifest, then the folders in it, then the name; the old folder is deleted last."""
    folder = user.write()
    damage(folder)
    done, rename, fsync, rmtree = [], Path.rename, sealed.fsync, shutil.rmtree
    monkeypatch.setattr(sealed, "fsync", lambda path: (done.append(("sync", path)), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(("rename", to)), rename(path, to)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (done.append(("delete", path)), rmtree(path)))
    user.write()
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside = folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}")
    inside = [temporary / path.relative_to(folder) for path in folder.rglob("*") if path.name != "manifest.json"]
    ends = [("rename", aside), ("rename", folder), ("sync", folder.parent), ("delete", aside)]
    assert done[-5:] == [("sync", temporary), *ends]
    synced = [path for what, path in done[:-5] if what == "sync"]
    assert sorted(synced) == sorted([*inside, temporary / "manifest.json"])
    names = [path.name for path in synced]
    assert all(names.index("manifest.json") > names.index(path.name) for path in inside if "." in path.name)


def test_what_was_set_aside_comes_back_and_drafts_go(tmp_path):
    for name in ("a.tmp-old-1", "b", "b.tmp-old-1", "c.tmp-1"):
        (tmp_path / name).mkdir()
    sealed.sweep(tmp_path, "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tmp-old-1", "b", "b.tmp-old-1"]
    sealed.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("text, reason", [
    ("[]", "no readable manifest.json"),
    ("{}", "no readable manifest.json"),
    ('{"files": {"x": 1}}', "no readable manifest.json"),
    ('{"files": {"model.safetensors": [3, null]}}', "no readable manifest.json"),
    ("[" * 100_000, "no readable manifest.json"),
    (" " * 1_000_001, "too long"),
])  # fmt: skip
def test_a_manifest_that_is_none_is_damage(text, reason, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    assert reason in checkpoint.problem(tmp_path)
    if reason != "too long":
        assert tokencache._read_manifest(tmp_path) is None


@pytest.mark.parametrize("names", [["a\0b"], ["../manifest.json"], ["gone"]])
def test_a_manifest_that_agrees_with_itself_and_names_odd_files_is_damage(names, tmp_path):
    content = {"step": 2, "files": dict.fromkeys(names, {"size": 1, "sha256": "0" * 64})}
    content["sha256"] = sealed.seal.digest(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert checkpoint.problem(tmp_path)
    content = {"files": dict.fromkeys(names, [1, "0" * 64])}
    (tmp_path / "manifest.json").write_text(json.dumps(sealed.seal.seal(content)))
    with pytest.raises(sealed.Damaged):
        sealed.verified(tmp_path, tokencache.STYLE)


def test_a_block_of_an_old_large_file_is_still_verified(tmp_path, monkeypatch):
    shutil.copytree(SAVED / "cache", tmp_path / "cache")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    [path] = (tmp_path / "cache").glob("*/train.bin")
    ids = np.fromfile(path, dtype=np.uint16)
    ids[700] += 1
    ids.tofile(path)
    files = Tokens(tmp_path).files(lambda split: pytest.fail("the text was read"))
    with pytest.raises(ValueError, match="train.bin is damaged in the 65,536 bytes from 0"):
        files.batch("train", 0, 1)
