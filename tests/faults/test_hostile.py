"""Checkpoints that somebody made to do harm: code in a pickle, archives that grow or escape, tensors that claim memory.

Each forgery has a manifest that is true of it, and each is shown to work on a reader that takes less care."""

import functools
import json
import os
import pickle
import shutil
import struct
import subprocess
import warnings
import zipfile

import pytest
import torch
from runs import small_run

from faults.world import content, go, reseal

pytestmark = pytest.mark.slow

NAME = "step-00000004"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at 4; read, never written to."""
    runs = tmp_path_factory.mktemp("stopped")
    assert small_run(runs, "a", "--stop-at", "4") == 0
    return runs / "a"


@pytest.fixture
def checkpoint(stopped, tmp_path):
    """Its only checkpoint, in a copy that may be harmed."""
    return shutil.copytree(stopped, tmp_path / "a") / "checkpoints" / NAME


def assert_refused(folder, name, tmp_path):
    """A new run that is to go on from it ends at once: the file is named, or the checkpoint where the file can be
    read, nothing is taken, and memory stays small."""
    reseal(folder)
    before = content(folder)
    child = go(tmp_path, "b", "--from", str(folder), orders=[{"peak": str(tmp_path / "peak")}])
    assert child.wait() in (2, 4), child.said
    assert f"{NAME}/{name}" in child.said or f"{NAME} is of another architecture" in child.said
    assert "Traceback" not in child.said and not (tmp_path / "b").exists()
    assert int((tmp_path / "peak").read_text()) < 2e9
    assert content(folder) == before


# --- code in a pickle


class Command:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def in_the_progress(path, owned):
    """The checkpoint's own format, with a command where a number was."""
    state = torch.load(path, weights_only=True)
    torch.save(state | {"progress": Command(os.system, f"touch {owned}")}, path)
    return lambda: torch.load(path, weights_only=False)


def in_the_old_format(path, owned):
    torch.save(Command(subprocess.call, ["touch", str(owned)]), path, _use_new_zipfile_serialization=False)
    return lambda: torch.load(path, weights_only=False)


def in_a_bare_pickle(path, owned):
    path.write_bytes(pickle.dumps(Command(exec, f"import pathlib; pathlib.Path({str(owned)!r}).touch()")))
    return lambda: pickle.loads(path.read_bytes())


def through_another_file(path, owned):
    """No shell, nothing of the system's: PyTorch's own function is asked to read a second file without care."""
    in_the_old_format(path.with_name("second"), owned)
    (path.with_name("second")).rename(owned.with_name("second"))
    torch.save(Command(functools.partial(torch.load, weights_only=False), str(owned.with_name("second"))), path)
    return lambda: torch.load(path, weights_only=False)


def in_a_script(path, owned):
    """A TorchScript archive runs its __setstate__ when it is loaded (as in CVE-2025-32434); this one makes a file."""

    class Bomb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.path = str(owned)

        @torch.jit.export
        def __getstate__(self):
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]):
            self.path, self.training = state
            self.path += str(torch.from_file(self.path, True, 8).numel())

        def forward(self):
            return 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Bomb()), str(path))

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.load(str(path))

    return load


PAYLOADS = [in_the_progress, in_the_old_format, in_a_bare_pickle, through_another_file, in_a_script]


@pytest.mark.fault(15, "code in a checkpoint", 1)
@pytest.mark.parametrize("forge", PAYLOADS, ids=lambda forge: forge.__name__)
def test_code_in_a_checkpoint_is_refused_and_not_run(fault, forge, checkpoint, tmp_path):
    owned = tmp_path / "owned"
    careless = forge(checkpoint / "state.pt", owned)
    careless()
    fault.happened = owned.exists()  # the payload is alive
    owned.unlink()
    assert_refused(checkpoint, "state.pt", tmp_path)
    assert not owned.exists()


# --- files that claim more than they are


def an_entry_inflates(folder):
    """A tensor of zeros, 2.2 GB in 10 MB; all else is as it should be."""
    rewrite(folder / "state.pt", 550_000_000, zipfile.ZIP_DEFLATED, zeros=True)
    return (folder / "state.pt").stat().st_size < 20e6


def an_entry_claims_gigabytes(folder):
    """4 GB by the directory's word."""
    path = folder / "state.pt"
    data, record = bytearray(path.read_bytes()), b"PK\x01\x02"
    start = data.rfind(record)
    struct.pack_into("<II", data, start + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        return max(entry.file_size for entry in archive.infolist()) > 4e9


def a_tensor_claims_gigabytes(folder):
    """70,000 numbers in the archive, 2^30 by the pickle's word."""
    rewrite(folder / "state.pt", 2**30, zipfile.ZIP_STORED)
    return struct.pack("<i", 2**30) in (folder / "state.pt").read_bytes()


def rewrite(path, claimed, method, zeros=False):
    """An archive whose pickle claims so many numbers in its one tensor, which has 70,000, or as many zeros."""
    torch.save({"optimizer": {}, "progress": {"step": 4, "huge": torch.zeros(70_000)}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, data in entries.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                if zeros and name.endswith("data/0"):
                    for _ in range(0, 4 * claimed, 4_000_000):
                        entry.write(bytes(4_000_000))
                else:
                    entry.write(data.replace(struct.pack("<i", 70_000), struct.pack("<i", claimed)))


def an_entry_escapes(folder):
    path = folder / "state.pt"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/../../../escaped", b"here")
    return True


def a_header_is_endless(folder):
    """The weights' header is 2^40 bytes long by its own word."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**40) + data[8:])
    return True


def a_header_is_huge(folder):
    """The weights' header is there, all 90 MB of it."""
    entries = {f"{i}{'x' * 30_000}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return len(header) > 80e6


def a_weight_claims_gigabytes(folder):
    """A tensor of 16 GB, by the header's word, in a file of a few bytes."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**32], "data_offsets": [0, 2**34]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    return True


STATES = [an_entry_inflates, an_entry_claims_gigabytes, a_tensor_claims_gigabytes, an_entry_escapes]
WEIGHTS = [a_header_is_endless, a_header_is_huge, a_weight_claims_gigabytes]


@pytest.mark.fault(16, "an archive that grows, claims or escapes", 1)
@pytest.mark.parametrize("forge", STATES, ids=lambda forge: forge.__name__)
def test_an_archive_that_claims_too_much_is_refused(fault, forge, checkpoint, tmp_path):
    fault.happened = forge(checkpoint)
    assert_refused(checkpoint, "state.pt", tmp_path)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.fault(16, "weights that claim too much", 1)
@pytest.mark.parametrize("forge", WEIGHTS, ids=lambda forge: forge.__name__)
def test_weights_that_claim_too_much_are_refused(fault, forge, checkpoint, tmp_path):
    fault.happened = forge(checkpoint)
    assert_refused(checkpoint, "model.safetensors", tmp_path)
