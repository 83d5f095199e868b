"""``python -m toolkit.run [OVERLAY.gin ...]``: train the experiment that gin/default.gin and the overlays describe."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.command import add_no_code_flag, run_command
from toolkit.output import escape
from toolkit.output.errors import DIVERGED, PREEMPTED, clean, kind_of

if TYPE_CHECKING:
    import torch

    from toolkit.config.layers import Config
    from toolkit.experiment import Experiment, Parts
    from toolkit.rundir.folder import RunDir


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)  # before the slow imports, so that --help is quick
    if arguments.safe_config:
        return _list_effects(arguments)
    from toolkit.compose import compose, try_build
    from toolkit.config.layers import BASE
    from toolkit.parallel import distributed
    from toolkit.rundir import report
    from toolkit.rundir.folder import RunDir, run_name

    name = run_name(arguments.overlays) if arguments.name is None else arguments.name
    run = RunDir(Path(arguments.runs), name, arguments.resume)
    base = arguments.base or BASE
    if arguments.resume and not (arguments.base or arguments.overlays or arguments.bindings):
        base = run.path / "config.gin" if run.exists() else BASE
    config, code = compose(arguments.overlays, arguments.bindings, base, arguments.imports, not arguments.no_code)
    experiment, blank = try_build(config)
    if arguments.dry_run:
        return report.dry_run(config, experiment, blank, arguments.json)
    _check_steps_left(arguments, experiment.steps, run)
    processes = distributed.process_count(experiment.devices)
    distributed.check_devices(processes)
    if processes > 1 and "RANK" not in os.environ:
        distributed.launch(processes, "toolkit.run", sys.argv[1:] if argv is None else argv)
        return run.exit_code()
    return _train(arguments, config, code, experiment, blank, run)


def _check_steps_left(arguments: argparse.Namespace, steps: int, run: RunDir) -> None:
    """Raise ValueError if the checkpoint that the run starts from leaves no step to train. Call this before text or
    weights are read, which takes long."""
    from toolkit.store import checkpoint

    end = min(arguments.stop_at or steps, steps)
    limit = f"--stop-at {end}" if end == arguments.stop_at else f"Experiment.steps = {end}"
    if arguments.resume:
        source, step, min_steps_left = str(run.path), checkpoint.newest_step(run.path / "checkpoints") or 0, 0
    elif arguments.branch and not arguments.weights_only:
        folder = checkpoint.find(arguments.branch)[1]
        source, step, min_steps_left = f"--from {folder}", checkpoint.read_manifest(folder)["step"], 1
    else:
        return
    if step > end - min_steps_left:
        relation = "at" if step == end else "past"
        raise ValueError(
            f"{source}: the checkpoint is at step {step}, {relation} {limit}: no step is left; "
            + ("give a later --stop-at, or leave it out" if end == arguments.stop_at else "raise Experiment.steps")
            + ("" if arguments.resume else "; or add --weights-only to start at step 0 with its weights")
        )


def _list_effects(arguments: argparse.Namespace) -> int:
    """Print what the config files would import and bind (--safe-config). Raises ConfigError for statements that are
    not allowed in an untrusted file."""
    from toolkit.config import safety
    from toolkit.config.layers import BASE, ConfigError
    from toolkit.rundir import report

    effects, refusals = safety.scan(arguments.overlays, arguments.bindings, arguments.base or BASE, arguments.imports)
    report.say("\n".join(effects))
    if refusals:
        raise ConfigError("\n".join(refusals))
    report.say("nothing was imported or run; --dry-run checks names and values")
    return 0


def _train(
    arguments: argparse.Namespace, config: Config, code: list[Path], experiment: Experiment, blank: Parts, run: RunDir
) -> int:
    """Open the run's folder, train, and write into status.json how the training ended. Returns the exit code."""
    from toolkit.cpu import openmp
    from toolkit.loop.signals import Interrupted, Signals
    from toolkit.parallel import distributed
    from toolkit.rundir import facts, report
    from toolkit.store import checkpoint
    from toolkit.train import Diverged, train

    main_process = distributed.rank() == 0
    openmp.use_threads(experiment.threads)
    lock = run.opened(config, arguments.allow_change) if main_process else contextlib.nullcontext()

    def report_lost_rank(reason: str) -> None:
        run.write_status("failed", reason=reason, kind="RankLost")

    with lock, Signals() as signals, distributed.joined(experiment.rank_timeout, report_lost_rank) as device:
        if run.finished(experiment.steps):
            if main_process:
                _draw(run.path)
            report.say(f"{run.path} is done; nothing to resume")
            return 0
        try:
            if main_process:
                run.write_config(config, code)
            with signals.droppable(distributed.world_size() == 1):  # ``train`` stops several processes together
                parts, progress, source = _prepare(arguments, config, experiment, blank, run, device)
            distributed.agree("the step to start from", progress["step"], device)
            if main_process:
                facts_at_start = facts.at_start(run, config, experiment, blank, parts, device, source)
                run.write_start(parts.tokenizer, facts_at_start, progress["step"])
                report.header(run.path, facts_at_start, blank.model, parts.optimizer)
                run.write_status("running", progress["step"])
            peak = facts_at_start["peak_tokens_per_s"] if main_process else None
            outcome = train(experiment, parts, run.path, device, progress, signals, arguments.stop_at, peak)
            if main_process:
                newest = checkpoint.newest(run.path / "checkpoints")
                run.write_end(outcome, facts.peak_memory(device), checkpoint.digest(newest) if newest else None)
        except Interrupted:  # nothing is lost: a resumed run repeats the interrupted work
            if main_process:
                run.write_status("preempted")
                report.say(
                    f"preempted before there was anything to save; continue with {report.resume_flags(run.path)}"
                )
            return PREEMPTED
        except Diverged as error:
            if main_process:
                run.write_status("diverged", reason=str(error))
                print(escape.block(f"error: diverged at {error}"), file=sys.stderr)
            return DIVERGED
        except BaseException as error:
            if main_process:
                run.write_status("failed", reason=clean(error), kind=kind_of(error))
            if signals.caught and isinstance(error, OSError):
                print(escape.block(f"error: stopped by a signal, but could not save: {error}"), file=sys.stderr)
                return 128 + signals.caught
            raise
        if main_process:
            _show_end(run.path, outcome, experiment.sample_prompt)
    return PREEMPTED if outcome["state"] == "preempted" else 0


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


def _prepare(
    arguments: argparse.Namespace,
    config: Config,
    experiment: Experiment,
    blank: Parts,
    run: RunDir,
    device: torch.device,
) -> tuple[Parts, dict[str, Any], Path | None]:
    """Prepare the data and build the parts. If the run continues from a checkpoint, load its weights. Returns (parts,
    progress, checkpoint folder or None); ``progress["step"]`` is the first step."""
    from toolkit.experiment import build
    from toolkit.parallel import distributed
    from toolkit.rundir import report
    from toolkit.store import checkpoint, factsfile

    for evaluator in (blank.evaluators | blank.final_evaluators).values():
        evaluator.prepare()  # a wrong item is found before any text is encoded
    blank.data.prepare()
    parts = build(experiment, device, blank.tokenizer, blank.data)
    parts.evaluators, parts.final_evaluators, parts.probes = blank.evaluators, blank.final_evaluators, blank.probes
    sources = {"data": parts.data.fingerprint(), "tokenizer": parts.tokenizer.fingerprint()}
    progress, source = {"step": 0, "best": float("inf")}, None
    if arguments.resume:
        run.check_sources(sources, factsfile.read(run.path))
        source = checkpoint.newest(run.path / "checkpoints", set_aside=distributed.rank() == 0)
        if source is None:
            report.say(f"{run.path} has no checkpoint, so it starts at step 0")
        run.check_journal(source)
    elif arguments.branch:
        source = checkpoint.find(arguments.branch)[1]
    if source is not None and arguments.weights_only:
        checkpoint.load_weights(source, parts.model)
    elif source is not None:
        progress = checkpoint.load(source, parts.model, parts.optimizer)
    if arguments.resume:
        run.check_sources(sources, progress)
        if not (
            factsfile.read(run.path) or arguments.allow_change
        ):  # facts.json is lost: the checkpoint has the digest
            run.check_config_digest(config, progress)
        progress["best"] = min(progress["best"], checkpoint.best_score(run.path / "checkpoints"))
    elif source is not None:
        progress["best"] = float("inf")  # a new run has no best score yet
    return parts, progress | {"config": config.digest} | sources, source


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.run",
        description="Train the experiment in gin/default.gin, changed by overlays: each overrides the ones before it.",
        epilog="Exit codes: 0 done, 2 bad config or input, 3 diverged, 4 storage, 75 preempted and resumable.",
    )
    add = parser.add_argument
    add("overlays", metavar="OVERLAY.gin", nargs="*", help="gin files; each overrides the base and the files before it")
    add(
        "--gin_file",
        dest="gin_files",
        metavar="OVERLAY.gin",
        action="append",
        default=[],
        help="another overlay; the same flag as in other programs that use gin",
    )
    add(
        "-p",
        "--gin_param",
        dest="bindings",
        metavar="BINDING",
        action="append",
        default=[],
        help="set one knob after all files: 'GPT.n_layer = 6'",
    )
    add(
        "--base",
        metavar="FILE",
        help="use this file instead of gin/default.gin; runs/NAME/config.gin repeats a run",
    )
    add(
        "--import",
        dest="imports",
        metavar="M|F.py",
        action="append",
        default=[],
        help="module or Python file with your own parts",
    )
    add_no_code_flag(parser)
    add("--name", help="name of the run's folder (default: the names of the overlays)")
    add("--runs", metavar="DIR", default="runs", help="folder that holds the runs (default: runs)")
    add(
        "--resume",
        action="store_true",
        help="continue the run from its newest checkpoint; on a CPU, the result equals that of a run without a stop",
    )
    add(
        "--allow-change",
        action="store_true",
        help="with --resume: accept a changed config, and record the change in facts.json",
    )
    add(
        "--from",
        dest="branch",
        metavar="CHECKPOINT",
        help="start a new run from another run's checkpoint, with its step, weights and optimizer state",
    )
    add("--weights-only", action="store_true", help="with --from: take only the weights, and start at step 0")
    add(
        "--stop-at",
        metavar="STEP",
        type=int,
        help="stop at this step; the learning-rate schedule does not change, and --resume continues the run",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print config, parameters, FLOPs and memory, and stop; reads no data",
    )
    add(
        "--safe-config",
        action="store_true",
        help="list what the files would import and bind, run nothing, and stop; an import in a file is an error "
        "unless --import names it too",
    )
    add("--json", action="store_true", help="with --dry-run: print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overlays += arguments.gin_files
    required_flags = {
        "allow_change": ("resume", "--resume"),
        "weights_only": ("branch", "--from"),
        "json": ("dry_run", "--dry-run"),
    }
    for flag, (required, required_flag) in required_flags.items():
        if getattr(arguments, flag) and not getattr(arguments, required):
            parser.error(f"--{flag.replace('_', '-')} can only be used with {required_flag}")
    if arguments.safe_config and arguments.resume:
        parser.error("--safe-config can't be used with --resume; to read a run's config, use --base RUN/config.gin")
    if arguments.resume and arguments.branch:
        parser.error("--resume continues a run, --from starts a new one: give only one of them")
    if arguments.stop_at is not None and arguments.stop_at < 1:
        parser.error("--stop-at must be 1 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
