"""Checkpoints: folders that are written whole or not at all, each with a manifest of SHA-256 sums that verifies it.

    checkpoints/step-00001000/{model.safetensors, state.pt, manifest.json}        checkpoints/best/ the same

``model.safetensors`` holds the weights for evaluation and generation. ``state.pt`` holds the optimizer, the step, the
best score, fingerprints of config, data and tokenizer, and the training weights if the optimizer averages others for
evaluation."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from toolkit.store import sealed
from toolkit.store.disk import sha256
from toolkit.store.sealed import MANIFEST, read_manifest
from toolkit.store.statefile import read_state, write_state

STEPS = "step-" + "[0-9]" * 8
TRIES = 3  # failed saves in a row after which the run ends
PAUSES = (0.1, 1.0)  # seconds to wait before each retry of a failed save: the disk may have room by then
FILES = ("model.safetensors", "state.pt")
STYLE = sealed.ManifestStyle(
    seal_key="sha256",
    indent=1,
    limit=1_000_000,  # a manifest has about a thousand bytes
    exact=True,
    measure=lambda path: {"sha256": sha256(path), "size": path.stat().st_size},
    expected=lambda entry: (entry["size"], entry["sha256"]),
)
log = logging.getLogger("toolkit")


class Keeper:
    """Saves the checkpoints of one run and deletes old ones.

    A save that fails with OSError is tried again twice within two seconds. If it still fails, ``save`` warns, and the
    run goes on until the next interval. The third failed save in a row raises OSError. ``lost`` is why
    checkpoints/best could not be replaced by a newer one, or None."""

    def __init__(self, root: Path, keep: int):
        self.root, self.keep, self.failed_in_a_row = root, keep, 0
        self.lost: str | None = None

    def save(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
        journal: dict[str, Any] | None = None,
        last: bool = False,
    ) -> bool:
        """Save a checkpoint as ``name``; returns whether that succeeded.

        ``journal``: sizes and digests of the rows before this step, for the manifest. ``last``: no later save follows,
        so this one raises OSError if it fails."""
        for pause in (*PAUSES, None):
            try:
                save(self.root / name, model, optimizer, progress, journal)
                break
            except OSError as error:
                if pause is not None:
                    time.sleep(pause)
                    continue
                self.failed_in_a_row += 1
                self.lost = str(error) if name == "best" else self.lost
                if last or self.failed_in_a_row == TRIES:
                    raise
                log.warning("step %d is not saved (%d of %d): %s", progress["step"], self.failed_in_a_row, TRIES, error)
                return False
        self.failed_in_a_row = 0
        self.lost = None if name == "best" else self.lost
        return True

    def prune(self) -> None:
        """Delete all but the newest ``keep`` step checkpoints. Deletes nothing if the newest one does not verify."""
        steps = sorted(self.root.glob(STEPS))
        if len(steps) > self.keep and problem(steps[-1]) is None:
            for folder in steps[: -self.keep]:
                sealed.delete(folder)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    journal: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as the sealed folder ``folder``, which is returned.

    ``progress`` (plain values and tensors) goes into the state, ``journal`` (sizes and digests of the rows before this
    step) into the manifest. Raises OSError if the disk refuses; a checkpoint already in ``folder`` is then unchanged.
    """

    def fill(temporary: Path) -> dict[str, Any]:
        state: dict[str, Any] = {"optimizer": optimizer.state_dict(), "progress": progress}
        with evaluation_weights(model, optimizer) as training_weights:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            if training_weights is not None:
                state["training_weights"] = training_weights
            _check_space(folder.parent, [weights, state])
            safetensors.torch.save_file(weights, temporary / "model.safetensors")
        write_state(temporary / "state.pt", state)
        about: dict[str, Any] = {
            n: progress[n] for n in ("step", "best", "config", "data", "tokenizer") if n in progress
        }
        return {"torch": torch.__version__, **about, **({"journal": journal} if journal else {})}

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sealed.sweep(folder.parent)
        sealed.write(folder, fill, STYLE)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"can't write {folder}: {error}") from error
    return folder


@contextlib.contextmanager
def evaluation_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, torch.Tensor] | None]:
    """Swap in the optimizer's averaged evaluation weights; restore the training weights exactly on exit.

    Yields a copy of the training weights, or None if the optimizer has no ``eval`` and ``train``. The copy is restored
    because ``optimizer.train`` alone would round: evaluating more often would change the run."""
    if not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield None
        return
    training_weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.eval()
    try:
        yield training_weights
    finally:
        optimizer.train()
        model.load_state_dict(training_weights)


def problem(folder: Path) -> str | None:
    """Why a checkpoint can't be trusted, in words; None if its manifest and files verify."""
    try:
        manifest = sealed.verified(folder, STYLE)
    except sealed.Damaged as damage:
        return str(damage)
    if not set(FILES) <= set(manifest["files"]):
        return f"{MANIFEST} lists {sorted(manifest['files'])}, but a checkpoint has {' and '.join(FILES)}"
    step = manifest.get("step")
    if folder.name.startswith("step-") and not (isinstance(step, int) and folder.name == f"step-{step:08d}"):
        return f"it holds step {step}"
    return None


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, hex, read from its manifest."""
    return read_manifest(folder)["files"]["model.safetensors"]["sha256"]


def newest(root: Path, set_aside: bool = False) -> Path | None:
    """The newest step checkpoint that verifies; None if ``root`` has no step checkpoint.

    Warns about each damaged one that it skips. ``set_aside`` renames these to bad-step-..., so that they are neither
    counted among the kept ones nor overwritten. Raises OSError if there are step checkpoints but none verifies."""
    steps = sorted(root.glob(STEPS), reverse=True)
    damaged: list[Path] = []
    for folder in steps:
        reason = problem(folder)
        if reason is None:
            for each in damaged if set_aside else ():
                sealed.put_in_place(each, each.with_name(f"bad-{each.name}"))
            return folder
        log.warning("skipping checkpoint %s: %s", folder, reason)
        damaged.append(folder)
    if steps:
        raise OSError(
            f"none of the {len(steps)} checkpoints in {root} is sound, and nothing was changed: "
            "restore one from a copy, or start again under another --name"
        )
    return None


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint with a readable manifest, or None. Nothing is verified, so this is quick: it
    serves to refuse impossible requests early."""
    for folder in sorted(root.glob(STEPS), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return int(read_manifest(folder)["step"])
    return None


def best_score(root: Path) -> float:
    """The score of checkpoints/best, lower is better; infinity if it is missing, damaged or has no score."""
    folder = root / "best"
    if not folder.is_dir() or problem(folder) is not None:
        return float("inf")
    best = read_manifest(folder).get("best")
    return float(best) if isinstance(best, int | float) else float("inf")


def find(path: str | Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) for the path of a run or of a checkpoint in one.

    A run stands for its best checkpoint, or for its newest if it has no best one. Raises ValueError if no checkpoint is
    found or it does not verify, and OSError if a run without a best one has only damaged checkpoints."""
    path = Path(path)
    if (path / MANIFEST).is_file() or path.parent.name == "checkpoints":
        run, folder = path.parent.parent, path
    elif (path / "config.gin").is_file():
        best = path / "checkpoints" / "best"
        found = best if best.is_dir() else newest(path / "checkpoints")
        if found is None:
            raise ValueError(f"{path} has no checkpoint yet; let it train up to Experiment.checkpoint_every first")
        run, folder = path, found
    else:
        raise ValueError(f"{path} is neither a run (a folder with config.gin) nor a checkpoint in one")
    reason = problem(folder)
    if reason:
        raise ValueError(f"{folder} can't be used: {reason}; name another checkpoint of the run")
    return run, folder


def kept(run: Path, steps: Collection[int] | None = None) -> dict[int, Path]:
    """The checkpoints that a run kept, in the order of their steps: {step: folder}. ``steps`` chooses some of them;
    None: all. checkpoints/best counts at its step, unless another checkpoint has this step.

    Raises ValueError, which names each one that is chosen and missing or damaged."""
    root = run / "checkpoints"
    folders = {int(folder.name.removeprefix("step-")): folder for folder in root.glob(STEPS)}
    if (root / "best").is_dir():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            folders.setdefault(int(read_manifest(root / "best")["step"]), root / "best")
    if not folders:
        raise ValueError(f"{run} has no checkpoint yet; let it train up to Experiment.checkpoint_every first")
    chosen = sorted(set(folders if steps is None else steps))
    problems = {step: problem(folders[step]) if step in folders else "not found" for step in chosen}
    faults = [f"step {step}: {reason}" for step, reason in problems.items() if reason is not None]
    if faults:
        sound = [str(step) for step in sorted(folders) if problem(folders[step]) is None]
        raise ValueError(f"{run}: {'; '.join(faults)}; it has sound checkpoints of steps {','.join(sound) or 'none'}")
    return {step: folders[step] for step in chosen}


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model. Raises ValueError for a checkpoint of another architecture, and for a
    file that can't be read."""
    path = folder / "model.safetensors"
    try:
        weights = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} can't be read: {error}; use another checkpoint") from error
    _load_tensors(model, weights, folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights and optimizer state; returns the progress that was saved with them. The peak learning rates of the
    optimizer stay as they are. Raises ValueError for another architecture or optimizer, and for a state file that is
    not safe to read."""
    state = read_state(folder / "state.pt")
    progress = state.get("progress") if isinstance(state, dict) else None
    if not (isinstance(progress, dict) and {"step", "best"} <= progress.keys() and "optimizer" in state):
        raise ValueError(f"{folder / 'state.pt'} is not the state of a run: step, best score or optimizer is missing")
    if "training_weights" in state:
        _load_tensors(model, state["training_weights"], folder)
    else:
        load_weights(folder, model)
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder} holds the state of another optimizer ({error}); use --weights-only") from error
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["peak_lr"] = peak  # from the config: load_state_dict replaced it by the checkpoint's
    return progress


def _check_space(root: Path, values: object) -> None:
    """Raise OSError if the disk has no room for all tensors in ``values``. Checked before anything is written, because
    a save that fails halfway would fill the disk for other processes too."""
    needed = sum(t.numel() * t.element_size() for t in _tensors_in(values))
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free on that disk")


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in a value; dicts, lists and tuples are searched."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _load_tensors(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Load tensors into a model. Raises ValueError if their names or shapes are not the model's."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    if own != saved:
        differ = [name for name in sorted(own | saved) if own.get(name) != saved.get(name)]
        shown = "; ".join(
            f"{n} is {saved.get(n, 'absent')} in the checkpoint, {own.get(n, 'absent')} in the model"
            for n in differ[:3]
        )
        raise ValueError(f"{folder} is of another architecture: {len(differ)} of {len(own | saved)} tensors ({shown})")
    model.load_state_dict(weights)
