"""The frame: the kinds of part, the registry, checks of configs, the model, the training loop and the commands.

The frame does not depend on any single part in components/ (the shelf)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from toolkit.protocols import Tokenizer


def load(run: str, imports: tuple[str, ...] = ()) -> tuple[nn.Module, Tokenizer]:
    """Load a run, or one checkpoint of a run, for use in a notebook. Returns (model, tokenizer), with the model in
    evaluation mode. ``imports`` names modules or files with parts that the run needs but has no copy of."""
    from toolkit.compose import open_run

    opened = open_run(run, imports=imports)
    return opened.model, opened.tokenizer


def __getattr__(name: str) -> object:
    """Import the registry only for ``from toolkit import register``, so that --help stays fast."""
    if name == "register":
        from toolkit.registry import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
