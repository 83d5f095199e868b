"""Checkpoints: a folder that is there whole or not at all, and that proves itself by a manifest of SHA-256 sums.

    checkpoints/step-00001000/{model.safetensors, state.pt, manifest.json}        checkpoints/best/ the same

``model.safetensors`` holds the weights that one evaluates and generates with; ``state.pt`` the optimizer, the step,
the best score, and the training weights where the optimizer keeps both."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from toolkit.disk import fsync, sha256

MANIFEST = "manifest.json"
log = logging.getLogger("toolkit")


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> Path:
    """Write a checkpoint beside ``folder``, then move it there. ``progress`` (plain values and tensors) goes into the
    state. Raises OSError when the disk refuses; what was there before is then untouched."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        state = {"optimizer": optimizer.state_dict(), "progress": progress}
        with evaluation_weights(model, optimizer) as training_weights:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            safetensors.torch.save_file(weights, temporary / "model.safetensors")
        if training_weights is not None:
            state["training_weights"] = training_weights
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
        files = {f.name: {"sha256": sha256(f), "size": f.stat().st_size} for f in sorted(temporary.iterdir())}
        manifest = {"step": progress["step"], "files": files, "torch": torch.__version__}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        _replace(temporary, folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(f"can't write {folder}: {error}") from error
    return folder


@contextlib.contextmanager
def evaluation_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[dict | None]:
    """The model with the weights to judge by, where the optimizer keeps others to train on: then yields a copy of
    those, which goes back in afterwards. There and back by the optimizer's own arithmetic alone would round, and how
    often one evaluates would change the run."""
    if not hasattr(optimizer, "eval"):
        yield None
        return
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.eval()
    try:
        yield kept
    finally:
        optimizer.train()
        model.load_state_dict(kept)


def sweep(root: Path) -> None:
    """Clear what an interrupted save left behind; a folder that was making way for its successor goes back."""
    for stale in root.glob("*.tmp-*"):
        original = stale.with_name(stale.name.split(".tmp-")[0])
        if ".tmp-old-" in stale.name and not original.exists():
            stale.rename(original)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Delete all but the last ``keep`` step checkpoints, once the newest has been read back and verified."""
    steps = sorted(root.glob("step-" + "[0-9]" * 8))
    if len(steps) > keep and problem(steps[-1]) is None:
        for folder in steps[:-keep]:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not look like one
            shutil.rmtree(folder, ignore_errors=True)


def problem(folder: Path) -> str | None:
    """Why a checkpoint can't be trusted, or None when its manifest verifies."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, file in manifest["files"].items():
            if (folder / name).stat().st_size != file["size"]:
                return f"{name} has the wrong size"
            if sha256(folder / name) != file["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no readable {MANIFEST}: {error}"
    return None


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, as its manifest has it."""
    return json.loads((folder / MANIFEST).read_text())["files"]["model.safetensors"]["sha256"]


def newest(root: Path) -> Path | None:
    """The newest step checkpoint that verifies; says what it skips. None where none was ever written.

    Raises OSError when there are some, and none of them is sound."""
    steps = sorted(root.glob("step-" + "[0-9]" * 8), reverse=True)
    for folder in steps:
        reason = problem(folder)
        if reason is None:
            return folder
        log.warning("skipping checkpoint %s: %s", folder, reason)
    if steps:
        raise OSError(f"none of the {len(steps)} checkpoints in {root} is sound; nothing was changed")
    return None


def find(path: str | Path) -> tuple[Path, Path]:
    """A run, or a checkpoint in one, as (run folder, checkpoint folder). A run stands for its best checkpoint, or the
    newest where there is no best. Raises ValueError when there is none, or the named one does not verify."""
    path = Path(path)
    if (path / MANIFEST).is_file() or path.parent.name == "checkpoints":
        run, folder = path.parent.parent, path
    elif (path / "config.gin").is_file():
        best = path / "checkpoints" / "best"
        run, folder = path, best if best.is_dir() else newest(path / "checkpoints")
        if folder is None:
            raise ValueError(f"{path} has no checkpoint yet; let it train up to Experiment.checkpoint_every first")
    else:
        raise ValueError(f"{path} is neither a run (a folder with config.gin) nor a checkpoint in one")
    reason = problem(folder)
    if reason:
        raise ValueError(f"{folder} can't be used: {reason}; name another checkpoint of the run")
    return run, folder


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into a model. Raises ValueError for a checkpoint of another architecture."""
    _fit(model, safetensors.torch.load_file(folder / "model.safetensors"), folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Read weights and optimizer state; returns the progress that was saved with them."""
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    if "training_weights" in state:
        _fit(model, state["training_weights"], folder)
    else:
        load_weights(folder, model)
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds the state of another optimizer ({error}); use --weights-only") from error
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["peak_lr"] = peak  # the config's, not the checkpoint's
    return state["progress"]


def _fit(model, weights, folder):
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    if own != theirs:
        differ = [name for name in sorted(own | theirs) if own.get(name) != theirs.get(name)]
        shown = "; ".join(f"{n}: {theirs.get(n, 'absent')} there, {own.get(n, 'absent')} here" for n in differ[:3])
        raise ValueError(f"{folder} is of another architecture: {len(differ)} of {len(own | theirs)} tensors ({shown})")
    model.load_state_dict(weights)


def _replace(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place; one that is there already (best) makes way first."""
    old = folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    fsync(folder.parent)
