"""Numbers gone bad: a loss or a gradient that is not finite, one that stands out, memory that runs out."""

import re

import pytest
from runs import assert_exact, rows, small_run, weights

from components.stories import SyntheticStories
from components.tokenizer import Bytes
from faults.world import assert_same, assert_sound, completed, content, finish, go, straight
from toolkit.loop.spikes import WINDOW
from toolkit.rundir.folder import RunDir
from toolkit.store import checkpoint

pytestmark = pytest.mark.slow

POISON = '''
"""Cross-entropy that is spoilt for one batch, which is known by the sum of its targets."""
from typing import Literal

import torch

from components.loss import CrossEntropy
from toolkit.registry import register


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@register("loss")
class Poisoned(torch.nn.Module):
    def __init__(self, batch: int | None = None, how: Literal["nan", "inf", "gradient", "spike"] = "nan"):
        super().__init__()
        self.plain, self.batch, self.how = CrossEntropy(), batch, how

    def forward(self, hidden, head, targets):
        objective, nats, count = self.plain(hidden, head, targets)
        if not torch.is_grad_enabled() or targets.sum().item() != self.batch:
            return objective, nats, count
        if self.how == "gradient":
            return BadGradient.apply(objective), nats, count
        factor = {"nan": float("nan"), "inf": float("inf"), "spike": 50.0}[self.how]
        return objective * factor, nats * factor, count
'''


@pytest.fixture
def poison(tmp_path_factory):
    """The options of a run with the loss above, spoilt at a step, or at none."""
    path = tmp_path_factory.getbasetemp() / "poison.py"
    if not path.exists():
        path.write_text(POISON)
    stories = SyntheticStories(Bytes(), 32, 0, stories=60, val_stories=10)
    sums = [int(stories.batch("train", step, 4)[:, 1:].sum()) for step in range(150)]

    def options(step: int | None = None, how: str = "nan", more: tuple[str, ...] = ()):
        bindings = ("Experiment.loss = @Poisoned", *more)
        if step is not None:
            assert sums.count(sums[step]) == 1
            bindings += (f"Poisoned.batch = {sums[step]}", f"Poisoned.how = '{how}'")
        return ("--import", str(path)), {"bindings": bindings}

    return options


def said_by(folder) -> dict:
    """status.json."""
    return RunDir(folder.parent, folder.name, resume=True).read("status.json")


def assert_stopped_before(folder, step, child):
    """Exit 3 with the batch's samples on stderr and in status.json; the state of before that step lies there, and so
    do the older ones."""
    assert child.wait() == 3, child.said
    samples = f"step {step}: .*samples {4 * step} to {4 * step + 3}"
    assert re.search(samples, child.said, re.DOTALL) and "Traceback" not in child.said
    status = said_by(folder)
    assert status["state"] == "diverged" and re.search(samples, status["reason"])
    assert completed(folder)[-1] == step and completed(folder)[:-1] == list(range(4, step, 4))
    assert all(checkpoint.problem(path) is None for path in (folder / "checkpoints").iterdir())


@pytest.mark.fault(31, "a loss that is not finite", 1)
@pytest.mark.parametrize("how", ["nan", "inf"])
@pytest.mark.parametrize("step", [5, 6])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(fault, how, step, poison, tmp_path):
    """At a step like any other, and at one that evaluates. Without the poison it goes on as if nothing had been."""
    strike(fault, how, step, poison, tmp_path)


@pytest.mark.fault(32, "a gradient that is not finite under a finite loss", 1)
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(fault, poison, tmp_path):
    strike(fault, "gradient", 7, poison, tmp_path)
    assert re.search(r"loss \d\.\d+, gradient norm nan", (tmp_path.parent / f"{tmp_path.name}-a.log").read_text())


def strike(fault, how, step, poison, tmp_path):
    more, options = poison(step, how)
    child = go(tmp_path, "a", *more, **options)
    assert_stopped_before(tmp_path / "a", step, child)
    fault.happened = re.search(r"nan|inf", child.said) is not None
    more, options = poison()
    assert small_run(tmp_path, "whole", *more, **options) == 0
    assert small_run(tmp_path, "upto", "--stop-at", str(step), *more, **options) == 0
    for name, value in weights(tmp_path / "upto", step).items():
        assert value.equal(weights(tmp_path / "a", step)[name]), name
    finish(tmp_path / "a", fault, "--allow-change", *more, **options)
    assert_exact(tmp_path / "whole", tmp_path / "a", 12)


@pytest.mark.fault(31, "a learning rate that lets the weights explode", 1)
def test_an_absurd_learning_rate_ends_in_exit_3(fault, tmp_path):
    child = go(tmp_path, "a", bindings=("AdamW.lr = 1e20", "Experiment.clip = None", "Experiment.checkpoint_every = 1"))
    assert child.wait() == 3, child.said
    told = re.search(r"diverged at step (\d+): loss (\S+), gradient norm (\S+), in training samples (\d+)", child.said)
    fault.happened = not told[2].replace(".", "").isdigit() or not told[3].replace(".", "").isdigit()
    assert said_by(tmp_path / "a")["state"] == "diverged" and int(told[4]) == 4 * int(told[1])
    assert completed(tmp_path / "a")[-1] == int(told[1])
    assert_sound(tmp_path / "a")


@pytest.mark.fault(33, "a batch whose loss and gradient are 50 times as large", 1)
def test_a_spike_is_left_out_recorded_and_repeated_by_a_resume(fault, poison, tmp_path):
    """The step changes neither weights nor optimizer, and a run that is resumed before it, after it, and at it, is the
    run that never stopped."""
    spike = WINDOW + 5
    every = ("Experiment.steps = 140", "Experiment.eval_every = 70", "Experiment.sample_every = 70")
    every += ("Experiment.spike_sigmas = 6.0", "Experiment.checkpoint_every = 35")
    more, options = poison(spike, "spike", every)
    child = go(tmp_path, "whole", *more, **options)
    assert child.wait() == 0, child.said
    skipped = [row for row in rows(tmp_path / "whole") if "skipped/count" in row]
    fault.happened = [row["step"] for row in skipped] == [spike] and skipped[0]["skipped/loss_nats"] > 100
    assert skipped[0]["skipped/count"] == 1
    for stop in (spike, spike + 1, spike + 3):
        child = go(tmp_path, "a", "--stop-at", str(stop), *more, **options)
        assert child.wait() == 0, child.said
        if stop == spike + 1:
            before, after = weights(tmp_path / "a", spike), weights(tmp_path / "a", spike + 1)
            assert all(value.equal(after[name]) for name, value in before.items())
    finish(tmp_path / "a", fault, *more, **options)
    assert_exact(tmp_path / "whole", tmp_path / "a", 140)


@pytest.mark.fault(47, "the system gives no more memory", 1)
def test_running_out_of_memory_ends_in_exit_4_with_a_hint(fault, tmp_path, tmp_path_factory):
    """For real: a limit on the address space, and a batch that goes beyond it."""
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    before = content(tmp_path / "a" / "checkpoints")
    large = {"bindings": ("Experiment.batch_size = 4096",)}
    limit = [{"limit": "RLIMIT_AS", "above": 600_000_000}]
    child = go(tmp_path, "a", "--allow-change", orders=limit, **large)
    code = child.wait()
    fault.happened = "allocate" in child.said
    assert code == 4, child.said
    assert "Experiment.batch_size" in child.said and "accumulate" in child.said and "Traceback" not in child.said
    assert said_by(tmp_path / "a")["state"] == "failed"
    assert content(tmp_path / "a" / "checkpoints") == before
    finish(tmp_path / "a", fault, "--allow-change")
    assert_same(straight(tmp_path_factory.getbasetemp()), tmp_path / "a", 12)
