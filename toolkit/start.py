"""Starts or continues a run: checks its config, opens its folder, trains, and writes how the training ended.

The command ``python -m toolkit.run`` and the function ``toolkit.train`` are two ways to call this. Slow imports are
inside the functions, so that the command's --help is quick."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.output import escape
from toolkit.output.errors import clean, kind_of

if TYPE_CHECKING:
    import torch

    from toolkit.config.layers import Config
    from toolkit.experiment import Experiment, Parts
    from toolkit.loop.signals import Signals
    from toolkit.rundir.folder import RunDir

_training = threading.Lock()  # held while ``train`` trains


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the training of a run starts and stops. Raises ValueError for options that exclude each other.

    resume           continue the run from its newest checkpoint
    allow_change     with ``resume``: accept a changed config, and record the change in facts.json
    from_checkpoint  start a new run from this checkpoint of another run, with its step, weights and optimizer state
    weights_only     with ``from_checkpoint``: take only the weights, and start at step 0
    stop_at          stop at this step; the learning-rate schedule does not change
    """

    resume: bool = False
    allow_change: bool = False
    from_checkpoint: str | None = None
    weights_only: bool = False
    stop_at: int | None = None

    def __post_init__(self) -> None:
        if self.allow_change and not self.resume:
            raise ValueError("--allow-change can only be used with --resume")
        if self.weights_only and not self.from_checkpoint:
            raise ValueError("--weights-only can only be used with --from")
        if self.resume and self.from_checkpoint:
            raise ValueError("--resume continues a run, --from starts a new one: give only one of them")
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError("--stop-at must be 1 or more")


@dataclass(frozen=True)
class Checked:
    """A run whose config is checked. Nothing is written yet. ``blank`` holds the parts, built without values."""

    run: RunDir
    config: Config
    code: list[Path]
    experiment: Experiment
    blank: Parts
    start: Start


@dataclass(frozen=True)
class Result:
    """How the training of a run ended.

    path     the run's folder
    state    "done": all steps are trained. "stopped": at ``stop_at``. "preempted": a signal ended the training; it can
             be resumed. "diverged": the loss or the gradient of a step is not finite
    step     the step of the last evaluation or checkpoint, at which a resumed run would continue
    metrics  {name: last value}
    reason   for a diverged run: at which step, and in which training samples
    """

    path: Path
    state: str
    step: int
    metrics: dict[str, float] = field(repr=False)
    reason: str = ""


class Preempted(KeyboardInterrupt):
    """A signal, such as Ctrl-C or a notebook's "interrupt", has ended ``train``. What was trained is saved.

    This is a KeyboardInterrupt, so that the code after ``train``, such as a loop over several runs, stops too.
    ``result`` is the Result."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.path} was preempted at step {result.step}; continue it with resume=True")
        self.result = result


class NotSaved(OSError):
    """The training was stopped by the signal ``number``, and its last checkpoint could not be written."""

    def __init__(self, number: int, error: OSError) -> None:
        super().__init__(f"stopped by a signal, but could not save: {error}")
        self.number = number


def train(
    overlays: str | Path | Iterable[str | Path] = (),
    bindings: str | Iterable[str] = (),
    name: str | None = None,
    runs: str | Path = "runs",
    *,
    base: str | Path | None = None,
    imports: str | Path | Iterable[str | Path] = (),
    resume: bool = False,
    allow_change: bool = False,
    from_checkpoint: str | Path | None = None,
    weights_only: bool = False,
    stop_at: int | None = None,
) -> Result:
    """Train a run, as ``python -m toolkit.run`` does: with the same checks, the same files in the run's folder, and the
    same weights and losses to the last bit.

    overlays         gin files; each overrides ``base`` and the files before it
    bindings         texts such as "GPT.n_layer = 6", which override the files
    name             name of the run's folder; None: the names of the overlays
    runs             the folder that holds the runs
    base             the file to start from; None: gin/default.gin
    imports          modules or Python files with your own parts. A file that was changed is imported again
    resume           continue the run from its newest checkpoint. Without ``base``, ``overlays`` and ``bindings``, it
                     continues with its own config
    allow_change     with ``resume``: accept a changed config
    from_checkpoint  start from another run's checkpoint, with its step, weights and optimizer state
    weights_only     with ``from_checkpoint``: take only the weights, and start at step 0
    stop_at          stop at this step; ``resume`` continues the run

    A run that diverges returns a Result too; its ``state`` says so. Raises ValueError for an error that the user can
    correct, with the message that the command prints (its ``--resume`` is ``resume=True`` here, its ``--from``
    ``from_checkpoint``); OSError if the disk refuses a file; and Preempted after a first Ctrl-C, when what was trained
    is saved. A second Ctrl-C interrupts at once. Signals are noticed in the main thread only."""
    from toolkit.compose import folder_of, listed
    from toolkit.loop.signals import Signals

    overlays, bindings, imports = listed("overlays", overlays), listed("bindings", bindings), listed("imports", imports)
    if not isinstance(name, str | None):
        raise ValueError(f"name: {name!r} is no text; give name={str(name)!r}")
    runs, base = folder_of("runs", runs), None if base is None else folder_of("base", base)
    start = Start(
        resume=resume,
        allow_change=allow_change,
        from_checkpoint=None if from_checkpoint is None else str(folder_of("from_checkpoint", from_checkpoint)),
        weights_only=weights_only,
        stop_at=stop_at,
    )
    if not _training.acquire(blocking=False):
        raise ValueError("this process trains another run already: wait until it ends, or use a process of its own")
    try:
        checked = check(overlays, bindings, start, base=base, name=name, runs=runs, imports=imports)
        if (processes := processes_needed(checked)) > 1:
            command = _command_line(overlays, bindings, checked, base, imports)
            raise ValueError(
                f"Experiment.devices needs {processes} processes, and this is one: bind Experiment.devices = 1, or "
                f"run the command: {command}"
            )
        result = train_checked(checked, Signals(second_ends_process=False))
    finally:
        _training.release()
    if result.state == "preempted":
        raise Preempted(result)
    return result


def check(
    overlays: Sequence[str],
    bindings: Sequence[str],
    start: Start,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    runs: str | Path = "runs",
    imports: Sequence[str] = (),
    code: bool = True,
) -> Checked:
    """Compose and check the config of a run, and build its parts without values. Nothing is written. The arguments are
    those of ``train``; with ``code`` False, the files in the code/ folder of a run are refused. Raises ValueError."""
    from toolkit.compose import compose, try_build
    from toolkit.config.layers import BASE, ConfigError
    from toolkit.registry import CATALOG
    from toolkit.rundir.folder import RunDir, run_name

    run = RunDir(Path(runs), run_name(overlays) if name is None else name, start.resume)
    if start.resume and not (base or overlays or bindings):
        base = run.path / "config.gin" if run.exists() else BASE
    config, files = compose(overlays, bindings, base or BASE, imports, code)
    if own := [name for _, name in config.parts if CATALOG[name].module == "__main__"]:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(own))}: defined in the notebook or the script itself, of which a run can keep "
            "no copy; write the class into a file, in a notebook by the first line %%writefile my_part.py of the "
            "cell, and pass imports=['my_part.py']"
        )
    experiment, blank = try_build(config)
    return Checked(run, config, files, experiment, blank, start)


def processes_needed(checked: Checked) -> int:
    """The number of processes that must be started to train a run; 1 if this process can train it. Raises ValueError
    if there are too few GPUs, or if the checkpoint that the run starts from leaves no step to train."""
    from toolkit.parallel import distributed

    _check_steps_left(checked)
    processes = distributed.process_count(checked.experiment.devices)
    distributed.check_devices(processes)
    return 1 if "RANK" in os.environ else processes


def train_checked(checked: Checked, signals: Signals) -> Result:
    """Open the run's folder, train, and write into status.json how the training ended. ``signals`` says what a second
    signal does. Raises ValueError, and OSError if the disk refuses a file."""
    from toolkit.cpu import openmp
    from toolkit.loop.signals import Interrupted
    from toolkit.parallel import distributed
    from toolkit.rundir import facts, report
    from toolkit.store import checkpoint
    from toolkit.training import Diverged, train

    run, config, experiment, start = checked.run, checked.config, checked.experiment, checked.start
    main_process = distributed.rank() == 0
    lock = run.opened(config, start.allow_change) if main_process else contextlib.nullcontext()

    def report_lost_rank(reason: str) -> None:
        run.write_status("failed", reason=reason, kind="RankLost")

    joined = distributed.joined(experiment.rank_timeout, report_lost_rank)
    with openmp.threads(experiment.threads), lock, signals, joined as device:
        if run.finished(experiment.steps):
            if main_process:
                _draw(run.path)
            report.say(f"{run.path} is done; nothing to resume")
            return _result(run, "done")
        try:
            if main_process:
                run.write_config(config, checked.code)
            with signals.droppable(distributed.world_size() == 1):  # ``train`` stops several processes together
                parts, progress, source = _prepare(checked, device)
            distributed.agree("the step to start from", progress["step"], device)
            if main_process:
                facts_at_start = facts.at_start(run, config, experiment, checked.blank, parts, device, source)
                run.write_start(parts.tokenizer, facts_at_start, progress["step"])
                report.header(run.path, facts_at_start, checked.blank.model, parts.optimizer)
                run.write_status("running", progress["step"])
            peak = facts_at_start["peak_tokens_per_s"] if main_process else None
            outcome = train(experiment, parts, run.path, device, progress, signals, start.stop_at, peak)
            if main_process:
                newest = checkpoint.newest(run.path / "checkpoints")
                run.write_end(outcome, facts.peak_memory(device), checkpoint.digest(newest) if newest else None)
        except Interrupted:  # nothing is lost: a resumed run repeats the interrupted work
            if main_process:
                run.write_status("preempted")
                report.say(
                    f"preempted before there was anything to save; continue with {report.resume_flags(run.path)}"
                )
            return _result(run, "preempted")
        except Diverged as error:
            if main_process:
                run.write_status("diverged", reason=str(error))
                print(escape.block(f"error: diverged at {error}"), file=sys.stderr)
            return _result(run, "diverged", str(error))
        except BaseException as error:
            if main_process:
                run.write_status("failed", reason=clean(error), kind=kind_of(error))
            if signals.caught and isinstance(error, OSError):
                raise NotSaved(signals.caught, error) from error
            raise
        if main_process:
            _show_end(run.path, outcome, experiment.sample_prompt)
    return _result(run, str(outcome["state"]))


def _result(run: RunDir, state: str, reason: str = "") -> Result:
    """The result of a run whose training has ended in ``state``, from the files in its folder."""
    from toolkit.store import journal

    metrics: dict[str, float] = {}
    for row in journal.read(run.path / "metrics.jsonl"):
        metrics |= {name: value for name, value in row.items() if name != "step"}
    return Result(run.path, state, run.read("status.json").get("step", 0), metrics, reason)


def _show_end(folder: Path, outcome: Mapping[str, Any], prompt: str) -> None:
    """Draw the pictures of the run and print the results."""
    from toolkit.rundir import report

    _draw(folder)
    _try_each(folder, {"the results": lambda: report.footer(folder, outcome, prompt)})


def _draw(folder: Path) -> None:
    """Draw the loss curve, and the page of the probes if the run has any."""
    from toolkit.rundir import curve, probes

    _try_each(folder, {"curve.png": lambda: curve.draw(folder), "probes.html": lambda: probes.draw(folder)})


def _try_each(folder: Path, outputs: Mapping[str, Callable[[], object]]) -> None:
    """Make each output. An error is only logged, because training has ended already."""
    for output, show in outputs.items():
        try:
            show()
        except Exception as error:
            reason = clean(error) or type(error).__name__
            logging.getLogger("toolkit").warning("%s: %s can't be shown: %s", folder, output, reason)


def _check_steps_left(checked: Checked) -> None:
    """Raise ValueError if the checkpoint that the run starts from leaves no step to train. Call this before text or
    weights are read, which takes long."""
    from toolkit.store import checkpoint

    start, run, steps = checked.start, checked.run, checked.experiment.steps
    end = min(start.stop_at or steps, steps)
    limit = f"--stop-at {end}" if end == start.stop_at else f"Experiment.steps = {end}"
    if start.resume:
        source, step, min_steps_left = str(run.path), checkpoint.newest_step(run.path / "checkpoints") or 0, 0
    elif start.from_checkpoint and not start.weights_only:
        folder = checkpoint.find(start.from_checkpoint)[1]
        source, step, min_steps_left = f"--from {folder}", checkpoint.read_manifest(folder)["step"], 1
    else:
        return
    if step > end - min_steps_left:
        relation = "at" if step == end else "past"
        raise ValueError(
            f"{source}: the checkpoint is at step {step}, {relation} {limit}: no step is left; "
            + ("give a later --stop-at, or leave it out" if end == start.stop_at else "raise Experiment.steps")
            + ("" if start.resume else "; or add --weights-only to start at step 0 with its weights")
        )


def _prepare(checked: Checked, device: torch.device) -> tuple[Parts, dict[str, Any], Path | None]:
    """Prepare the data and build the parts. If the run continues from a checkpoint, load its weights. Returns (parts,
    progress, checkpoint folder or None); ``progress["step"]`` is the first step."""
    from toolkit.experiment import build
    from toolkit.parallel import distributed
    from toolkit.rundir import report
    from toolkit.store import checkpoint, factsfile

    run, config, blank, start = checked.run, checked.config, checked.blank, checked.start
    for evaluator in (blank.evaluators | blank.final_evaluators).values():
        evaluator.prepare()  # a wrong item is found before any text is encoded
    blank.data.prepare()
    parts = build(checked.experiment, device, blank.tokenizer, blank.data)
    parts.evaluators, parts.final_evaluators, parts.probes = blank.evaluators, blank.final_evaluators, blank.probes
    sources = {"data": parts.data.fingerprint(), "tokenizer": parts.tokenizer.fingerprint()}
    progress, source = {"step": 0, "best": float("inf")}, None
    if start.resume:
        run.check_sources(sources, factsfile.read(run.path))
        source = checkpoint.newest(run.path / "checkpoints", set_aside=distributed.rank() == 0)
        if source is None:
            report.say(f"{run.path} has no checkpoint, so it starts at step 0")
        run.check_journal(source)
    elif start.from_checkpoint:
        source = checkpoint.find(start.from_checkpoint)[1]
    if source is not None and start.weights_only:
        checkpoint.load_weights(source, parts.model)
    elif source is not None:
        progress = checkpoint.load(source, parts.model, parts.optimizer)
    if start.resume:
        run.check_sources(sources, progress)
        if not (factsfile.read(run.path) or start.allow_change):  # facts.json is lost: the checkpoint has the digest
            run.check_config_digest(config, progress)
        progress["best"] = min(progress["best"], checkpoint.best_score(run.path / "checkpoints"))
    elif source is not None:
        progress["best"] = float("inf")  # a new run has no best score yet
    return parts, progress | {"config": config.digest} | sources, source


def _command_line(
    overlays: Sequence[str], bindings: Sequence[str], checked: Checked, base: str | Path | None, imports: Sequence[str]
) -> str:
    """The command that does what a call of ``train`` asks for."""
    words = ["python", "-m", "toolkit.run", *overlays, *(word for text in bindings for word in ("-p", text))]
    words += ["--base", str(base)] if base else []
    words += [word for each in imports for word in ("--import", each)]
    words += ["--runs", str(checked.run.path.parent), "--name", checked.run.path.name]
    start = checked.start
    words += [flag for flag, given in (("--resume", start.resume), ("--allow-change", start.allow_change)) if given]
    words += ["--from", start.from_checkpoint] if start.from_checkpoint else []
    words += ["--weights-only"] if start.weights_only else []
    words += ["--stop-at", str(start.stop_at)] if start.stop_at else []
    return shlex.join(words)
