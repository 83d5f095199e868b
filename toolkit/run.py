"""``python -m toolkit.run [OVERLAY.gin ...]``: train the experiment that gin/default.gin and the overlays describe."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from toolkit.command import DIVERGED, PREEMPTED, clean, run_command


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code; raises ValueError for what the user can mend."""
    arguments = _arguments(argv)  # first, so that --help is quick
    import torch

    from toolkit import distributed, report
    from toolkit.compose import add_code, compose
    from toolkit.config import BASE
    from toolkit.rundir import RunDir, run_name
    from toolkit.train import build

    run = RunDir(Path(arguments.runs), arguments.name or run_name(arguments.overlays), arguments.resume)
    base = arguments.base or BASE
    if arguments.resume and not (arguments.base or arguments.overlays or arguments.bindings or arguments.imports):
        base = run.path / "config.gin" if run.exists() else BASE
    add_code(Path(base).parent)
    config, code = compose(arguments.overlays, arguments.bindings, base, arguments.imports)
    experiment = config.build()
    try:
        blank = build(experiment, torch.device("meta"))  # finds what can't work before anything is read or written
    except (NotImplementedError, RuntimeError):  # a part that computes with values while it is built: build it in full
        blank = build(experiment, torch.device("cpu"))
    if arguments.dry_run:
        return report.dry_run(config, experiment, blank, arguments.json)
    processes = distributed.devices_wanted(experiment.devices)
    if processes > 1 and "RANK" not in os.environ:
        distributed.launch(processes, "toolkit.run", sys.argv[1:] if argv is None else argv)
        return run.exit_code()
    return _train(arguments, config, code, experiment, blank, run)


def _train(arguments, config, code, experiment, blank, run) -> int:
    """Open the run directory, train, and leave the truth about the end in status.json."""

    from toolkit import checkpoint, curve, distributed, facts, report
    from toolkit.allocator import keep_freed_memory
    from toolkit.train import Diverged, build, train

    device = distributed.setup()
    keeps_memory = device.type == "cpu" and keep_freed_memory()
    main_process = distributed.rank() == 0
    with run.opened(config, arguments.allow_change) if main_process else contextlib.nullcontext():
        if run.finished():
            report.say(f"{run.path} is done; nothing to resume")
            return 0
        try:
            blank.data.prepare()
            parts = build(experiment, device, blank.tokenizer, blank.data)
            progress = {"step": 0, "best": float("inf")}
            source = checkpoint.newest(run.path / "checkpoints") if arguments.resume else None
            if source is None and arguments.branch:
                source = checkpoint.find(arguments.branch)[1]
                if arguments.weights_only:
                    checkpoint.load_weights(source, parts.model)
            if source is not None and not (arguments.branch and arguments.weights_only):
                progress = checkpoint.load(source, parts.model, parts.optimizer)
            if main_process:
                known = facts_before(run, config, experiment, blank, parts, device, source)
                known["keeps_freed_memory"] = keeps_memory
                run.write_start(config, code, parts.tokenizer, known, progress["step"])
                report.header(run.path, known, blank.model, parts.optimizer)
                run.write_status("running", progress["step"])
            ended = train(experiment, parts, run.path, device, progress, arguments.stop_at)
        except Diverged as error:
            if main_process:
                run.write_status("diverged", reason=str(error))
                print(f"error: diverged at {error}", file=sys.stderr)
            return DIVERGED
        except BaseException as error:
            if main_process:
                run.write_status("failed", reason=clean(error), kind=type(error).__name__)
            raise
        finally:
            distributed.close()
        if main_process:
            newest = checkpoint.newest(run.path / "checkpoints")
            run.write_end(ended, facts.peak_memory(device), checkpoint.digest(newest) if newest else None)
            curve.draw(run.path)
            report.footer(run.path, ended, experiment.sample_prompt)
    return PREEMPTED if ended["state"] == "preempted" else 0


def facts_before(run, config, experiment, blank, parts, device, source) -> dict[str, object]:
    """What facts.json says when training starts."""
    from toolkit import distributed, facts
    from toolkit.train import dtype_of, is_compiled

    dtype = dtype_of(experiment, device)
    return {
        "name": run.path.name,
        "steps": experiment.steps,
        "seed": experiment.seed,
        "tokens": experiment.steps * experiment.batch_size * experiment.seq_len,
        "parameters": facts.parameters(blank.model),
        "flops_per_token": facts.on_meta(facts.flops_per_token, blank.model, experiment.seq_len),
        "precision": str(dtype).removeprefix("torch."),
        "compiled": is_compiled(experiment, device),
        "attention": facts.attention_implementation(parts.model, device, dtype),
        "processes": distributed.world_size(),
        **facts.environment(device),
        "data": parts.data.fingerprint(),
        "tokenizer": parts.tokenizer.fingerprint(),
        "windows": {split: parts.data.windows(split) for split in ("train", "val")},
        "from": str(source) if source else None,
        "config": config.flat,
    }


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.run",
        description="Train the experiment that gin/default.gin describes, with the overlays laid over it in order.",
        epilog="Exit codes: 0 done, 2 bad config or input, 3 diverged, 4 storage, 75 preempted and resumable.",
    )
    add = parser.add_argument
    add("overlays", metavar="OVERLAY.gin", nargs="*", help="gin files, laid over the base in this order")
    add("--gin_file", dest="gin_files", metavar="OVERLAY.gin", action="append", default=[], help="the same, gin's way")
    add("-p", "--gin_param", dest="bindings", metavar="BINDING", action="append", default=[], help="'GPT.n_layer = 6'")
    add(
        "--base",
        metavar="FILE",
        help="start from this file instead of gin/default.gin: runs/NAME/config.gin repeats a run",
    )
    add(
        "--import",
        dest="imports",
        metavar="M|F.py",
        action="append",
        default=[],
        help="module or file with parts of yours",
    )
    add("--name", help="the run's folder in --runs; without it, named after the overlays")
    add("--runs", metavar="DIR", default="runs", help="where runs live (default: runs)")
    add("--resume", action="store_true", help="go on from the newest checkpoint of the run, as if it had never stopped")
    add("--allow-change", action="store_true", help="with --resume: accept a config that differs, and record how")
    add(
        "--from",
        dest="branch",
        metavar="CHECKPOINT",
        help="a new run that goes on from another's weights and optimizer",
    )
    add("--weights-only", action="store_true", help="with --from: take the weights alone, and start at step 0")
    add("--stop-at", metavar="STEP", type=int, help="stop there; the schedule keeps its horizon, --resume goes on")
    add("--dry-run", action="store_true", help="print config, parameters, FLOPs and memory, and stop; reads no data")
    add("--json", action="store_true", help="with --dry-run: print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overlays += arguments.gin_files
    needs = {
        "allow_change": ("resume", "--resume"),
        "weights_only": ("branch", "--from"),
        "json": ("dry_run", "--dry-run"),
    }
    for flag, (other, spelled) in needs.items():
        if getattr(arguments, flag) and not getattr(arguments, other):
            parser.error(f"--{flag.replace('_', '-')} goes with {spelled}")
    if arguments.resume and arguments.branch:
        parser.error("--resume continues a run, --from starts a new one: give one of them")
    if arguments.stop_at is not None and arguments.stop_at < 1:
        parser.error("--stop-at takes a step of 1 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
