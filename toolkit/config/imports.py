"""Modules and files with parts, imported: by name, from a file, from a run's copy, or offered by installed packages."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path

from toolkit.root import ROOT

ENTRY_POINTS = "toolkit.components"  # the group under which an installed package names its modules


def load_module(name: str) -> None:
    """Import a module for the parts it registers. Raises ValueError with the reason when that fails."""
    try:
        importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a script that calls sys.exit, a panic of a compiled module
        raise ValueError(f"can't import {name!r}: {_told(error)}") from error


def load_file(path: str | Path) -> str:
    """Import a Python file; returns its module name. One that the import path reaches is imported under the name it has
    there, never twice. Raises ValueError."""
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"--import {path}: there is no such Python file")
    for root in (Path(p or ".").resolve() for p in sys.path):
        if file.is_relative_to(root) and file.relative_to(root).parts[0] != "site-packages":
            dotted = ".".join(file.relative_to(root).with_suffix("").parts)
            if all(part.isidentifier() for part in dotted.split(".")) and _origin(dotted) == file:
                load_module(dotted)
                return dotted
    loaded = sys.modules.get(file.stem)
    if loaded is None and _origin(file.stem) is None and file.stem.isidentifier():
        _execute(file)
    elif loaded is None or Path(getattr(loaded, "__file__", None) or ".").resolve() != file:
        raise ValueError(
            f"--import {path}: {file.stem!r} can't be its module name (taken, or no identifier); rename it"
        )
    return file.stem


def load_copy(file: Path) -> None:
    """Import a run's copy of a module under the module's name, whatever else the path holds of that name. Raises
    ValueError when that fails, or when a module of that name and another content is loaded already."""
    loaded = sys.modules.get(file.stem)
    if loaded is None:
        _execute(file)
        return
    other = Path(getattr(loaded, "__file__", None) or file.stem)
    if not other.is_file() or other.read_bytes() != file.read_bytes():
        raise ValueError(
            f"{file} can't be imported: another {file.stem!r} is loaded, from {other}; use a process of its own, or "
            f"pass --import {file.stem} to use that one"
        )


def own_file(name: str) -> Path | None:
    """The file of a module that is loaded, is one file, and belongs to no package: what a run keeps a copy of."""
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if "." in name or hasattr(module, "__path__") or name in offered() or not str(file).endswith(".py"):
        return None
    return Path(file).resolve()


def offered() -> set[str]:
    """Top-level names of the modules that installed packages bring under ``toolkit.components``."""
    return {point.module.split(".")[0] for point in _points()}


def _execute(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[file.stem]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"can't import {file}: {_told(error)}") from error


def load_entry_points() -> list[str]:
    """Import the modules that installed packages name under ``toolkit.components``. Returns what failed, a line each:
    one broken package takes nobody else's parts away."""
    failures = []
    for point in _points():
        try:
            point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.append(f"entry point {point.name} = {point.value}: {_told(error)}")
    return failures


@functools.cache  # what is installed does not change while a command runs, and looking costs 20 ms
def _points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _told(error: BaseException) -> str:
    """An error with the line that raised it, unless that is ours, where the message says all."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(ROOT / "toolkit") or "importlib" in frame.filename
    return f"{type(error).__name__}: {error}" + ("" if ours else f" ({frame.filename}:{frame.lineno})")


def _origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None
