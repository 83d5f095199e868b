"""Real runs, small enough for a test: the command itself, in this process or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit import run
from toolkit.store import journal

SMALL = (
    "GPT.dim = 32",
    "Experiment.steps = 12",
    "Experiment.batch_size = 4",
    "Experiment.seq_len = 32",
    "Experiment.eval_every = 6",
    "Experiment.eval_windows = 10",
    "Experiment.checkpoint_every = 4",
    "Experiment.sample_every = 6",
    "Experiment.sample_tokens = 8",
    "Experiment.log_every = 1",
    "SyntheticStories.stories = 60",
    "SyntheticStories.val_stories = 10",
    "warmup_steps = 2",
)


def arguments(
    runs: Path,
    name: str,
    *more: str,
    overlays: tuple[str, ...] = (),
    bindings: tuple[str, ...] = (),
    warmup: bool = True,
    stories: bool = True,
) -> list[str]:
    """The command line of a small run: tiny.gin, the bindings above, and what the test adds. ``warmup=False`` for a
    schedule without one, ``stories=False`` for other data: binding what they lack would be refused."""
    absent = ("warmup_steps",) * (not warmup) + ("SyntheticStories",) * (not stories)
    given = [binding for binding in _displace(SMALL, bindings) if not binding.startswith(absent)]
    flags = [flag for binding in given for flag in ("-p", binding)]
    return ["gin/model/tiny.gin", *overlays, *flags, "--runs", str(runs), "--name", name, *more]


def small_run(runs: Path, name: str, *more: str, **options: tuple[str, ...]) -> int:
    """Run it here; returns the exit code. Errors are raised."""
    return run.main(arguments(runs, name, *more, **options))


def command(module: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """``python -m module args`` in a process of its own, in the repository's folder."""
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)} | environment
    return subprocess.run([sys.executable, "-m", module, *args], cwd=root, env=env, capture_output=True, text=True)


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    kept = journal.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in kept]


def weights(folder: Path, step: int) -> dict:
    """The weights of a step's checkpoint."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def facts(folder: Path) -> dict:
    """facts.json."""
    return json.loads((folder / "facts.json").read_text())


def assert_exact(straight: Path, broken: Path, last: int) -> None:
    """Two runs are one to the last bit: rows, samples, evaluation weights, optimizer and progress, and what
    TensorBoard shows, each step once."""
    assert rows(straight) == rows(broken)
    assert (straight / "samples.md").read_text() == (broken / "samples.md").read_text()
    one, other = (folder / "checkpoints" / f"step-{last:08d}" for folder in (straight, broken))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert_equal(*(torch.load(folder / "state.pt", weights_only=True) for folder in (one, other)))
    steps = [row["step"] for row in rows(straight) if "train/loss_nats" in row]
    events = EventAccumulator(str(broken), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss_nats")] == steps


def assert_equal(one, other) -> None:
    """Nested dicts and lists, equal to the last bit of every tensor."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def _displace(base, more):
    """The bindings of both; where both bind a key, the later one: -p does not bind a key twice."""
    merged = {binding.split("=")[0].strip(): binding for binding in (*base, *more)}
    return merged.values()
