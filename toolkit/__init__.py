"""The frame: the kinds of part, the registry, checks of configs, the model, the training loop and the commands.

The frame does not depend on any single part in components/ (the shelf). The names in ``__all__`` are for notebooks and
scripts; docs/notebook.md shows them. They are imported when they are first used, so that --help stays fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.comparison.frame import runs
    from toolkit.notebook import build, load, read, reader
    from toolkit.registry import register
    from toolkit.start import train

__all__ = ["build", "load", "read", "reader", "register", "runs", "train"]

_MODULES = {
    "build": "toolkit.notebook",
    "load": "toolkit.notebook",
    "read": "toolkit.notebook",
    "reader": "toolkit.notebook",
    "register": "toolkit.registry",
    "runs": "toolkit.comparison.frame",
    "train": "toolkit.start",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = vars(importlib.import_module(_MODULES[name]))[name]
    return value


def __dir__() -> list[str]:
    return __all__
