"""Runs a command and ends it with a readable message and an exit code that scripts can rely on."""

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
    "use a smaller Experiment.batch_size, or raise Experiment.accumulate, which splits the same batch into smaller "
    "parts; the checkpoints are intact: --resume continues from the newest"
)
OURS = ("toolkit", "components", "argparse")  # an error raised in these packages is shown without a traceback


def run_command(main: Callable[[], int]) -> None:
    """Run ``main`` and exit the process with its exit code, or with the code of the error that it raised.

    Exit codes: 0 done, 2 bad config or input, 3 diverged, 4 storage, 130 interrupted. Of an error that the toolkit
    raised, only the message is printed. Any other error, for example one in a user's part, is printed with its
    traceback, and the message names the part and its file. TOOLKIT_DEBUG=1 prints the traceback of every error."""
    handler = logging.StreamHandler()
    handler.setFormatter(escape.LogFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        code = main()
    except Exception as error:
        user_part = _user_part(error)
        if kind_of(error) == "OutOfMemoryError":
            error = OSError(f"out of memory: {clean(error)}\n{LESS_MEMORY}")
        if user_part is None and not isinstance(error, ValueError | OSError):
            raise
        if os.environ.get("TOOLKIT_DEBUG") or not _is_ours(error):
            print(escape.block(traceback.format_exc()), end="", file=sys.stderr)
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        message = f"error: {user_part + ': ' if user_part else ''}{kind}{clean(error)}"
        print(escape.block(message), file=sys.stderr)  # escaped, since it may quote a file
        code = STORAGE if isinstance(error, OSError) else BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    try:
        sys.stdout.flush()
    except OSError:  # the reader has ended or the disk is full: Python would flush again at exit, and fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def add_import_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that read a run: --import (``arguments.imports``) and --no-code."""
    help_text = "module or Python file with parts that the run needs but has no copy of"
    parser.add_argument("--import", dest="imports", metavar="M|F.py", action="append", default=[], help=help_text)
    add_no_code_flag(parser)


def add_no_code_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag --no-code (``arguments.no_code``), which refuses to run the Python files in a run's ``code/``, and
    the task files of lm-eval that its config names."""
    help_text = "refuse to run the Python files in a run's code/ folder, and LMEval.include_path in its config"
    parser.add_argument("--no-code", action="store_true", help=help_text)


def _user_part(error: BaseException) -> str | None:
    """Name the user's part in whose code an error was raised, with file and line. None if there is no such part."""
    catalog = getattr(sys.modules.get("toolkit.registry"), "CATALOG", {})
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for cls in type(frame.f_locals.get("self")).__mro__:
            entry = catalog.get(cls.__name__)
            if entry and entry.cls is cls and entry.module.split(".")[0] not in OURS:
                return f"{entry.name} ({frame.f_code.co_filename}:{line})"
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether the toolkit raised the error itself, so that its message needs no traceback."""
    if isinstance(error, OSError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    deepest = next((name for name in reversed(names) if not name.startswith("gin.")), "")
    return deepest.split(".")[0] in (*OURS, "__main__")
