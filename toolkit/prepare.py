"""``python -m toolkit.prepare [OVERLAY.gin ...]``: download and tokenise an experiment's text, without training."""

from __future__ import annotations

import argparse

from toolkit.command import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.compose import compose
    from toolkit.rundir import report

    config, _ = compose(arguments.overlays, arguments.bindings, imports=arguments.imports)
    experiment = config.build()
    data = experiment.data(experiment.tokenizer(), experiment.seq_len, experiment.seed)
    data.prepare()
    for split in ("train", "val"):
        report.say(f"{split}: {data.windows(split):,} windows of {experiment.seq_len:,} tokens")
    report.say(f"fingerprint: {data.fingerprint()}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.prepare",
        description="Download and tokenise the text of an experiment. All runs with the same text and tokenizer use "
        "the same token files.",
        epilog="Token files are stored in $TOOLKIT_CACHE if it is set, else in the user's cache folder.",
    )
    parser.add_argument(
        "overlays",
        metavar="OVERLAY.gin",
        nargs="*",
        help="gin files; each overrides gin/default.gin and the files before it",
    )
    parser.add_argument(
        "-p", "--gin_param", dest="bindings", metavar="BINDING", action="append", default=[], help="set one knob"
    )
    parser.add_argument("--import", dest="imports", metavar="M|F.py", action="append", default=[], help="your parts")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_command(main)
