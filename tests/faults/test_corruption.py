"""Checkpoints that are not what was written: cut short, a bit flipped, files missing, added or swapped."""

import random
import shutil

import pytest
from runs import facts, rows, small_run

from faults.world import assert_same, completed, content, go, straight
from toolkit.store import checkpoint

FILES = ("model.safetensors", "state.pt", "manifest.json")
CUTS = {"to nothing": lambda size: 0, "to 1 byte": lambda size: 1, "to half": lambda size: size // 2}
CUTS["by 1 byte"] = lambda size: size - 1


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at 8, with checkpoints of 4, 8 and the best; read, never written to."""
    runs = tmp_path_factory.mktemp("stopped")
    assert small_run(runs, "a", "--stop-at", "8") == 0
    return runs / "a"


@pytest.fixture
def struck(stopped, tmp_path):
    """A copy of it that may be harmed."""
    return shutil.copytree(stopped, tmp_path / "a")


def assert_walked_past(folder, caplog, tmp_path_factory):
    """Step 8 is bad: it is named, 4 is found and resumed from, and the run ends as the straight one does."""
    root = folder / "checkpoints"
    assert checkpoint.problem(root / "step-00000008")
    assert checkpoint.newest(root).name == "step-00000004"
    assert "step-00000008" in caplog.text
    assert small_run(folder.parent, "a", "--resume") == 0
    assert facts(folder)["resumed"][-1]["step"] == 4
    assert (root / "bad-step-00000008").is_dir()  # kept as evidence
    shutil.rmtree(root / "bad-step-00000008")
    assert_same(straight(tmp_path_factory.getbasetemp()), folder, 12)


@pytest.mark.slow
@pytest.mark.fault(11, "a file of a checkpoint is cut short", 1)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_walked_past(fault, name, cut, struck, caplog, tmp_path_factory):
    path = struck / "checkpoints" / "step-00000008" / name
    whole = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(CUTS[cut](whole))
    fault.happened = path.stat().st_size < whole
    assert_walked_past(struck, caplog, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.fault(12, "one bit of a checkpoint is flipped", 400)
def test_a_flipped_bit_is_detected(fault, stopped):
    """In place, and back again."""
    folder = stopped / "checkpoints" / "step-00000008"
    draw = random.Random(f"bit {fault.repetition}")
    path = folder / FILES[fault.repetition % len(FILES)]
    bit = draw.randrange(8 * path.stat().st_size)
    flip(path, bit)
    try:
        fault.happened = True
        fault.silent += checkpoint.problem(folder) is None
        assert fault.silent == 0, f"bit {bit} of {path.name}"
        assert checkpoint.newest(folder.parent).name == "step-00000004"
    finally:
        flip(path, bit)
    assert checkpoint.problem(folder) is None


def flip(path, bit):
    """Turn one bit of a file over."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_flipped_bit_of_every_file_is_detected(stopped):
    """The row above in short: a few bits of each file, the first and the last among them."""
    folder = stopped / "checkpoints" / "best"
    for path in sorted(folder.iterdir()):
        size = 8 * path.stat().st_size
        for bit in (0, size - 1, *random.Random(path.name).sample(range(size), 5)):
            flip(path, bit)
            assert checkpoint.problem(folder), f"bit {bit} of {path.name}"
            flip(path, bit)
    assert checkpoint.problem(folder) is None


def remove(name):
    return lambda root: (root / "step-00000008" / name).unlink()


def swap(*names):
    """Exchange files, or the whole folders, of steps 4 and 8."""

    def exchange(root):
        for name in names or [""]:
            one, other, aside = root / "step-00000004" / name, root / "step-00000008" / name, root / "aside"
            one.rename(aside)
            other.rename(one)
            aside.rename(other)

    return exchange


def copied(root):
    """The older checkpoint, sound in itself, stands where the newer one was."""
    shutil.rmtree(root / "step-00000008")
    shutil.copytree(root / "step-00000004", root / "step-00000008")


CHANGES = {f"{name} is missing": remove(name) for name in FILES} | {
    "a file is added": lambda root: (root / "step-00000008" / "extra").write_text("unasked"),
    "a folder is added": lambda root: (root / "step-00000008" / "extra").mkdir(),
    "it is empty": lambda root: (shutil.rmtree(root / "step-00000008"), (root / "step-00000008").mkdir()),
    "it is a copy of the older one": copied,
}
BOTH = {f"{name} is swapped": swap(name) for name in FILES} | {"the folders are swapped": swap()}


@pytest.mark.slow
@pytest.mark.fault(13, "a file of a checkpoint is missing or added", 1)
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_other_files_is_walked_past(fault, change, struck, caplog, tmp_path_factory):
    before = content(struck)
    CHANGES[change](struck / "checkpoints")
    fault.happened = content(struck) != before or (struck / "checkpoints" / "step-00000008" / "extra").is_dir()
    assert_walked_past(struck, caplog, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.fault(13, "files are swapped between two checkpoints", 1)
@pytest.mark.parametrize("change", BOTH)
def test_files_of_another_step_are_refused(fault, change, struck):
    before = content(struck)
    BOTH[change](struck / "checkpoints")
    fault.happened = content(struck) != before
    assert_refused(struck)


@pytest.mark.slow
@pytest.mark.fault(14, "no checkpoint is sound", 1)
def test_nothing_is_restarted_where_no_checkpoint_is_sound(fault, struck):
    for folder in (struck / "checkpoints").iterdir():
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    fault.happened = all(checkpoint.problem(folder) for folder in (struck / "checkpoints").iterdir())
    assert_refused(struck)


def assert_refused(folder):
    """Exit 4, both checkpoints named, and nothing begun again: the rows and the weights are those of before."""
    kept = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "samples.md", "config.gin")}
    weights = set(content(folder / "checkpoints").values())
    for attempt in (1, 2):  # asking again changes nothing
        child = go(folder.parent, "a")
        assert child.wait() == 4, child.said
        assert "checkpoints" in child.said and ("step-00000008" in child.said or attempt == 2)
        assert {name: (folder / name).read_bytes() for name in kept} == kept
        assert set(content(folder / "checkpoints").values()) == weights


@pytest.mark.slow
@pytest.mark.fault(45, "validation gets worse after a resume", 1)
def test_the_best_survives_a_resume_that_makes_things_worse(fault, stopped, tmp_path):
    struck = shutil.copytree(stopped, tmp_path / "a")
    best = content(struck / "checkpoints" / "best")
    assert small_run(tmp_path, "a", "--resume", "--allow-change", bindings=("AdamW.lr = 2.0",)) == 0
    scores = {row["step"]: row["val/loss_nats"] for row in rows(struck) if "val/loss_nats" in row}
    fault.happened = scores[12] > scores[6]
    assert content(struck / "checkpoints" / "best") == best
    assert completed(struck) == [8, 12]
