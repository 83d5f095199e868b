"""How every command ends: a readable message and an exit code that a script can rely on."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable

from toolkit.output import escape
from toolkit.output.errors import BAD_INPUT, STORAGE, clean, kind_of

LESS_MEMORY = (
    "use a smaller Experiment.batch_size, or raise Experiment.accumulate, which keeps the batch and takes its parts in "
    "turn; checkpoints are as they were: --resume goes on from the newest"
)
OURS = ("toolkit", "components", "argparse")


def run_command(main: Callable[[], int]) -> None:
    """Run a command and leave the process: 0 done, 2 bad config or input, 3 diverged, 4 storage, 130 interrupted.

    An error that we raised is its message alone; one from elsewhere, such as a part of the user's own, comes with its
    traceback, and the part and its file are named. TOOLKIT_DEBUG=1 shows the traceback always."""
    handler = logging.StreamHandler()
    handler.setFormatter(escape.LogFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        code = main()
    except Exception as error:
        culprit = _culprit(error)
        if kind_of(error) == "OutOfMemoryError":
            error = OSError(f"out of memory: {clean(error)}\n{LESS_MEMORY}")
        if culprit is None and not isinstance(error, ValueError | OSError):
            raise
        if os.environ.get("TOOLKIT_DEBUG") or not _is_ours(error):
            print(escape.block(traceback.format_exc()), end="", file=sys.stderr)
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        message = f"error: {culprit + ': ' if culprit else ''}{kind}{clean(error)}"
        print(escape.block(message), file=sys.stderr)  # it may quote a file
        code = STORAGE if isinstance(error, OSError) else BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more, or its disk is full; Python would try again, and fail, at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def take_imports(parser: argparse.ArgumentParser) -> None:
    """The flag of the commands that read a run: what it may import beyond what it keeps, ``arguments.imports``."""
    told = "module or file with parts that the run does not keep itself"
    parser.add_argument("--import", dest="imports", metavar="M|F.py", action="append", default=[], help=told)
    refuse_code(parser)


def refuse_code(parser: argparse.ArgumentParser) -> None:
    """The flag that refuses to run what a run keeps in its ``code/``, ``arguments.no_code``."""
    told = "refuse to run the Python files that a run keeps in its code/ folder"
    parser.add_argument("--no-code", action="store_true", help=told)


def _culprit(error: BaseException) -> str | None:
    """The part of somebody's own in whose code an error arose, with file and line; None where there is none."""
    catalog = getattr(sys.modules.get("toolkit.registry"), "CATALOG", {})
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for cls in type(frame.f_locals.get("self")).__mro__:
            entry = catalog.get(cls.__name__)
            if entry and entry.cls is cls and entry.module.split(".")[0] not in OURS:
                return f"{entry.name} ({frame.f_code.co_filename}:{line})"
    return None


def _is_ours(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    deepest = next((name for name in reversed(names) if not name.startswith("gin.")), "")
    return deepest.split(".")[0] in (*OURS, "__main__")
