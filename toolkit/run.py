"""``python -m toolkit.run [OVERLAY.gin ...]``: train the experiment that gin/default.gin and the overlays describe."""

from __future__ import annotations

import argparse
import sys

from toolkit import start
from toolkit.command import add_no_code_flag, run_command
from toolkit.output import escape


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)  # before the slow imports, so that --help is quick
    if arguments.safe_config:
        return _list_effects(arguments)
    checked = start.check(
        arguments.overlays,
        arguments.bindings,
        arguments.start,
        base=arguments.base,
        name=arguments.name,
        runs=arguments.runs,
        imports=arguments.imports,
        code=not arguments.no_code,
    )
    from toolkit.loop.signals import Signals
    from toolkit.parallel import distributed
    from toolkit.rundir import report
    from toolkit.rundir.folder import EXIT_CODES

    if arguments.dry_run:
        return report.dry_run(checked.config, checked.experiment, checked.blank, arguments.json)
    processes = start.processes_needed(checked)
    if processes > 1:
        distributed.launch(processes, "toolkit.run", sys.argv[1:] if argv is None else argv)
        return checked.run.exit_code()
    try:
        return EXIT_CODES[start.train_checked(checked, Signals()).state]
    except start.NotSaved as error:
        print(escape.block(f"error: {error}"), file=sys.stderr)
        return 128 + error.number


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
        dest="from_checkpoint",
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
    if arguments.json and not arguments.dry_run:
        parser.error("--json can only be used with --dry-run")
    if arguments.safe_config and arguments.resume:
        parser.error("--safe-config can't be used with --resume; to read a run's config, use --base RUN/config.gin")
    try:
        arguments.start = start.Start(
            resume=arguments.resume,
            allow_change=arguments.allow_change,
            from_checkpoint=arguments.from_checkpoint,
            weights_only=arguments.weights_only,
            stop_at=arguments.stop_at,
        )
    except ValueError as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    run_command(main)
