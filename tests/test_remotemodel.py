"""What the models of the tier code of ``convert`` do where this toolkit is missing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import remotecode
import torch
import torch.nn.functional as F
from remotefolders import HELPER, MIXED, OWN, PARTS, built, exported_parts, measured, write

from toolkit.compose import Run, compose
from toolkit.context import Context
from toolkit.exchange import proof

COMPILED = ["GPT.ffn = @MixtureOfExperts"], ["GPT.mixer = @GatedLinearRecurrence"], ["GPT.block = @HyperConnections"]
compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def check(name: str, results: dict) -> None:
    tolerance = 1e-5 * results["scale"]
    for close in ("compiled", "right padding", "left padding"):
        assert results[close] <= tolerance, (name, close, results[close], tolerance)
    for relative in ("right padding, loss", "left padding, loss", "recomputed"):
        assert results[relative] <= 1e-5, (name, relative, results[relative])
    assert results["micro-batches"] <= 1e-4 and results["saved again"] == 0.0, (name, results)
    assert results["beams"] == [2, 11] and results["calls again"] > 0, (name, results)
    empty = ("cached tokens differ", "padded tokens differ", "beams differ", "tensors differ", "without gradient")
    for each in empty:
        assert not results[each], (name, each, results[each])


def test_models_of_many_parts_work_without_the_toolkit(tmp_path, monkeypatch):
    """Hybrids, hyper-connections, experts, several positions, and a part with a helper module, in a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_part.py").write_text(OWN)
    (tmp_path / "own_helper.py").write_text(HELPER)
    compose(imports=["own_part"])
    runs = {"mixed": built(*MIXED), "own": built("GPT.norm = @OwnNorm", "OwnNorm.factor = 0.7")}
    folders = [write(run, tmp_path / name) for name, run in runs.items()]
    for name, results in measured(folders, tmp_path / "results.json").items():
        check(name, results)
        difference, _ = proof.prove(
            runs[name].model, runs[name].tokenizer, tmp_path / name, code=["toolkit.x", "own_part"]
        )
        assert difference.problem is None, (name, difference)
    text = (tmp_path / "own" / "own_part.py").read_text()
    assert "Unused" not in text and "register(" not in text and "Annotated" not in text
    assert "# A comment above a class.\nclass OwnNorm(Base):" in text and "LIMITS.append(HIGH)" in text
    assert "left_out" not in (tmp_path / "own" / "own_helper.py").read_text()


def own_losses(run: Run) -> tuple[list[float], float]:
    """The losses of the steps of ``remotecode.trainer``, in the toolkit's own parts, and the loss after them."""
    ids = remotecode.texts(run.tokenizer.vocab_size)
    model, losses = run.model.train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in ids.split(remotecode.ROWS):
        parts = [loss_of(model, rows) / 2 for rows in step.split(remotecode.ROWS // 2)]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum(parts).detach()))
    with torch.no_grad():
        return losses, float(loss_of(model.eval(), ids[: remotecode.ROWS]))


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and in training the losses of the parts."""
    context = Context()
    hidden, head = model(ids, context)
    nats = F.cross_entropy(head.logits(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return nats + sum(context.losses.values()) if model.training else nats


def check_trainer(tmp_path: Path, python: str = sys.executable, path: Path | None = None) -> None:
    runs = {
        "experts": built("GPT.ffn = [@SwiGLU, @MixtureOfExperts]"),
        "recurrent": built("GPT.mixer = [@GatedLinearRecurrence, @SelfAttention]", "GPT.tie_embeddings = False"),
    }
    folders = [write(run, tmp_path / name) for name, run in runs.items()]
    for name, results in measured(folders, tmp_path / "results.json", python, "trainer", path).items():
        losses, evaluated = own_losses(runs[name])
        assert results["losses"] == pytest.approx(losses, rel=1e-5), name
        assert results["evaluated"] == pytest.approx(evaluated, rel=1e-5), name
        assert results["evaluated"] < losses[0] and results["saved again"] < 1e-5, (name, results)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the package accelerate is not installed")
def test_the_trainer_of_transformers_trains_as_a_loop_of_our_parts_does(tmp_path):
    check_trainer(tmp_path)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    """The Python of an environment that has torch, transformers, safetensors, and what these need."""
    env = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    python = str(env / "bin" / "python")
    install(python, f"torch=={torch.__version__.partition('+')[0]}", "transformers>=5", "safetensors")
    for name in ("gin", "toolkit"):
        missing = subprocess.run([python, "-P", "-c", f"import {name}"], env=alone(), capture_output=True, text=True)
        assert f"No module named '{name}'" in missing.stderr
    return python


def install(python: str, *packages: str) -> None:
    """Install packages, or skip the test where no index is reachable."""
    command = [python, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "20", *packages]
    installed = subprocess.run(command, env=alone(), capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"no package index is reachable: {installed.stderr.strip().splitlines()[-1][:200]}")


def alone() -> dict[str, str]:
    """The environment variables without the path to this toolkit."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_every_part_of_the_shelf_works_where_only_torch_transformers_and_safetensors_are(tmp_path, bare):
    folders = exported_parts(tmp_path / "models")
    assert folders.keys() == PARTS.keys() | {"mixed"}
    for name, results in measured(list(folders.values()), tmp_path / "results.json", bare).items():
        check(name, results)


@pytest.mark.slow
def test_the_trainer_trains_where_this_toolkit_is_missing(tmp_path, bare):
    extra = tmp_path / "extra"
    install(bare, "--no-deps", "--target", str(extra), "accelerate", "psutil")  # so that the other test's stays bare
    check_trainer(tmp_path, bare, extra)


@pytest.mark.slow
@pytest.mark.skipif(compiler is None, reason="no C++ compiler, which torch.compile needs on the CPU")
def test_torchs_compiler_computes_the_same(tmp_path):
    runs = [*(built(*bindings) for bindings in COMPILED), built(*MIXED)]
    folders = [write(run, tmp_path / str(number)) for number, run in enumerate(runs)]
    for name, results in measured(folders, tmp_path / "results.json", check="inductor").items():
        assert results["inductor"] <= 1e-5 * results["scale"], (name, results)
