"""Checkpoints: a folder that is there whole or not at all, and that proves itself by a manifest of SHA-256 sums.

    checkpoints/step-00001000/{model.safetensors, state.pt, manifest.json}        checkpoints/best/ the same

``model.safetensors`` holds the weights that one evaluates and generates with; ``state.pt`` the optimizer, the step,
the best score, fingerprints of config, data and tokenizer, and the training weights where the optimizer keeps both."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from toolkit.store.disk import fsync, sha256
from toolkit.store.seal import digest as digest_of
from toolkit.store.statefile import read_state, write_state

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1_000_000  # bytes; ours have a thousand
STEPS = "step-" + "[0-9]" * 8
TRIES = 3  # saves in a row that the disk may refuse
PAUSES = (0.1, 1.0)  # seconds until a save that the disk refused is tried again: the refusal may pass by itself
FILES = ("model.safetensors", "state.pt")
log = logging.getLogger("toolkit")


class Keeper:
    """Saves the checkpoints of one run. A save that the disk refuses is tried again twice within two seconds. If that
    does not help, it costs a warning, and the next interval is the next chance; the third such save in a row raises
    OSError. ``lost`` is why there is no newer checkpoints/best, or None."""

    def __init__(self, root: Path, keep: int):
        self.root, self.keep, self.refused, self.lost = root, keep, 0, None

    def save(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict,
        journal: dict | None = None,
        last: bool = False,
    ) -> bool:
        """Whether the checkpoint was saved. ``journal`` is what vouches for the rows before it. ``last``: there is no
        later chance, so a refusal raises OSError."""
        for pause in (*PAUSES, None):
            try:
                save(self.root / name, model, optimizer, progress, journal)
                break
            except OSError as error:
                if pause is not None:
                    time.sleep(pause)
                    continue
                self.refused += 1
                self.lost = str(error) if name == "best" else self.lost
                if last or self.refused == TRIES:
                    raise
                log.warning("step %d is not saved (%d of %d): %s", progress["step"], self.refused, TRIES, error)
                return False
        self.refused = 0
        self.lost = None if name == "best" else self.lost
        return True

    def prune(self) -> None:
        """Delete all but the last steps, once the newest has been read back and verified."""
        steps = sorted(self.root.glob(STEPS))
        if len(steps) > self.keep and problem(steps[-1]) is None:
            for folder in steps[: -self.keep]:
                (folder / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not look like one
                shutil.rmtree(folder, ignore_errors=True)


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict, journal: dict | None = None
) -> Path:
    """Write a checkpoint beside ``folder``, then move it there. ``progress`` (plain values and tensors) goes into the
    state, ``journal`` (sizes and digests of the rows before this step) into the manifest. Raises OSError when the disk
    refuses; what was there before is then untouched."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        state = {"optimizer": optimizer.state_dict(), "progress": progress}
        with evaluation_weights(model, optimizer) as training_weights:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            if training_weights is not None:
                state["training_weights"] = training_weights
            _check_space(folder.parent, [weights, state])
            temporary.mkdir()
            safetensors.torch.save_file(weights, temporary / "model.safetensors")
        write_state(temporary / "state.pt", state)
        for name in FILES:
            fsync(temporary / name)
        files = {n: {"sha256": sha256(temporary / n), "size": (temporary / n).stat().st_size} for n in FILES}
        told = {name: progress[name] for name in ("step", "best", "config", "data", "tokenizer") if name in progress}
        manifest = {"files": files, "torch": torch.__version__, **told} | ({"journal": journal} if journal else {})
        (temporary / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}, indent=1))
        fsync(temporary / MANIFEST)
        fsync(temporary)
        _replace(temporary, folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"can't write {folder}: {error}") from error
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


def problem(folder: Path) -> str | None:
    """Why a checkpoint can't be trusted, or None when its manifest verifies."""
    try:
        if (folder / MANIFEST).stat().st_size > MANIFEST_LIMIT:
            return f"{MANIFEST} is too long to be one"
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256") != digest_of(manifest):
            return f"{MANIFEST} is not what was written"
        if folder.name.startswith("step-") and folder.name != f"step-{manifest['step']:08d}":
            return f"it holds step {manifest['step']}"
        if not set(FILES) <= set(manifest["files"]):
            return f"{MANIFEST} lists {sorted(manifest['files'])}, but a checkpoint has {' and '.join(FILES)}"
        names = {path.name for path in folder.iterdir()} - {MANIFEST}
        if names != set(manifest["files"]):
            return f"its files are {sorted(names)}, but {sorted(manifest['files'])} were written"
        for name, file in manifest["files"].items():
            if (folder / name).stat().st_size != file["size"]:
                return f"{name} has {(folder / name).stat().st_size} bytes, but {file['size']} were written"
            if sha256(folder / name) != file["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"no readable {MANIFEST}: {error}"
    return None


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint that has no ``problem``."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, as its manifest has it."""
    return read_manifest(folder)["files"]["model.safetensors"]["sha256"]


def newest(root: Path, set_aside: bool = False) -> Path | None:
    """The newest step checkpoint that verifies; says what it skips, and with ``set_aside`` renames that to
    bad-step-..., so that it neither counts as kept nor is overwritten. None where none was ever written.

    Raises OSError when there are some, and none of them is sound."""
    steps, bad = sorted(root.glob(STEPS), reverse=True), []
    for folder in steps:
        reason = problem(folder)
        if reason is None:
            for each in bad if set_aside else ():
                _replace(each, each.with_name(f"bad-{each.name}"))
            return folder
        log.warning("skipping checkpoint %s: %s", folder, reason)
        bad.append(folder)
    if steps:
        raise OSError(
            f"none of the {len(steps)} checkpoints in {root} is sound, and nothing was changed: "
            "bring one back from a copy, or begin again under another --name"
        )
    return None


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint, by its manifest alone: quick, and enough to refuse what can't work."""
    for folder in sorted(root.glob(STEPS), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return int(read_manifest(folder)["step"])
    return None


def best_score(root: Path) -> float:
    """The score of checkpoints/best, lower is better; infinite where there is none that verifies."""
    folder = root / "best"
    if not folder.is_dir() or problem(folder) is not None:
        return float("inf")
    best = read_manifest(folder).get("best")
    return float(best) if isinstance(best, int | float) else float("inf")


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
    """Read a checkpoint's weights into a model. Raises ValueError for a checkpoint of another architecture, and for a
    file that can't be read."""
    path = folder / "model.safetensors"
    try:
        weights = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} can't be read: {error}; use another checkpoint") from error
    _fit(model, weights, folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Read weights and optimizer state; returns the progress that was saved with them. Raises ValueError for another
    architecture or optimizer, and for a state that is not safe to read."""
    state = read_state(folder / "state.pt")
    progress = state.get("progress") if isinstance(state, dict) else None
    if not (isinstance(progress, dict) and {"step", "best"} <= progress.keys() and "optimizer" in state):
        raise ValueError(f"{folder / 'state.pt'} is no state of a run: step, best score or optimizer is missing")
    if "training_weights" in state:
        _fit(model, state["training_weights"], folder)
    else:
        load_weights(folder, model)
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder} holds the state of another optimizer ({error}); use --weights-only") from error
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["peak_lr"] = peak  # the config's, not the checkpoint's
    return progress


def _check_space(root, values):
    """Raises OSError where the disk can't hold so many tensors; a save that has begun would fill it for others too."""
    needed = sum(t.numel() * t.element_size() for t in _tensors(values))
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on that disk")


def _tensors(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _fit(model, weights, folder):
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    if own != theirs:
        differ = [name for name in sorted(own | theirs) if own.get(name) != theirs.get(name)]
        shown = "; ".join(
            f"{n} is {theirs.get(n, 'absent')} in the checkpoint, {own.get(n, 'absent')} in the model"
            for n in differ[:3]
        )
        raise ValueError(f"{folder} is of another architecture: {len(differ)} of {len(own | theirs)} tensors ({shown})")
    model.load_state_dict(weights)


def _replace(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place; one that is there already makes way first."""
    old = folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    fsync(folder.parent)
