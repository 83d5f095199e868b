"""Import modules that register parts: by name, from a file, from a run's copy, or from installed packages."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path

from toolkit.registry import CATALOG, digest_of, forget
from toolkit.root import ROOT

ENTRY_POINTS = "toolkit.components"  # the group under which an installed package names its modules
_broken: set[str] = set()  # modules whose changed files could not be imported again


def load_module(name: str) -> None:
    """Import a module for the parts it registers. Raises ValueError with the reason when that fails."""
    try:
        importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit() in a script, or a panic in a compiled module
        raise ValueError(f"can't import {name!r}: {_describe(error)}") from error


def load_file(path: str | Path) -> str:
    """Import a Python file; returns its module name. A file that sys.path can reach is imported under its full dotted
    name, so that it is never imported twice. Raises ValueError."""
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"--import {path}: Python file not found")
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
            f"--import {path}: its module can't be named {file.stem!r} (already taken, or not an identifier); rename it"
        )
    return file.stem


def load_copy(file: Path) -> None:
    """Import a run's copy of a module under the module's name, even if sys.path has another module of that name.
    Raises ValueError if that fails, or if a module of that name but with other content is loaded already."""
    loaded = sys.modules.get(file.stem)
    if loaded is None:
        _execute(file)
        return
    other = Path(getattr(loaded, "__file__", None) or file.stem)
    if not other.is_file() or other.read_bytes() != file.read_bytes():
        raise ValueError(
            f"{file} can't be imported: another {file.stem!r} is already loaded, from {other}; use a separate "
            f"process, or pass --import {file.stem} to use the loaded one"
        )


def reload_changed() -> None:
    """Import the files again that have registered parts and were changed since. In a notebook, a run would otherwise
    train the old code and keep a copy of the new. Raises ValueError with the reason if that fails; the next call tries
    again."""
    sources = {entry.module: entry.source for entry in CATALOG.values() if entry.source} | dict.fromkeys(_broken, "")
    for name, source in sources.items():
        if digest_of(name) in (None, source):
            continue
        module = sys.modules[name]
        file = Path(str(module.__file__))
        forget(name)
        _broken.add(name)
        module.__spec__ = importlib.util.spec_from_file_location(name, file)
        try:  # without Python's cache of compiled files, which goes by the second in which a file was changed
            exec(compile(file.read_bytes(), file, "exec"), vars(module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(f"can't import {file} again: {_describe(error)}") from error
        _broken.remove(name)


def own_file(name: str) -> Path | None:
    """The file of a loaded module that is a single file outside any package, else None. A run keeps copies of these."""
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if "." in name or hasattr(module, "__path__") or name in offered() or not str(file).endswith(".py"):
        return None
    return Path(str(file)).resolve()


def offered() -> set[str]:
    """Top-level names of the modules that installed packages offer as entry points of ``toolkit.components``."""
    return {point.module.split(".")[0] for point in _entry_points()}


def _execute(file: Path) -> None:
    """Import a file as a module named after it. Raises ValueError with the reason when that fails."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, file  # a file that ends in .py has both
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[file.stem]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"can't import {file}: {_describe(error)}") from error


def load_entry_points() -> list[str]:
    """Import the modules that installed packages offer as entry points of ``toolkit.components``. Returns a line for
    each failure: one broken package does not hide the others."""
    failures = []
    for point in _entry_points():
        try:
            point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.append(f"entry point {point.name} = {point.value}: {_describe(error)}")
    return failures


@functools.cache  # installed packages don't change while a command runs, and a search takes 20 ms
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _describe(error: BaseException) -> str:
    """An error with the line that raised it, unless that line is in the toolkit, whose messages need none."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(ROOT / "toolkit") or "importlib" in frame.filename
    return f"{type(error).__name__}: {error}" + ("" if ours else f" ({frame.filename}:{frame.lineno})")


def _origin(module: str) -> Path | None:
    """The file that a module is imported from, or None. Parents of the module are imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None
