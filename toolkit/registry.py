"""``register(kind)`` puts a part on the shelf: gin can then name it, and the catalogue lists, checks and tests it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from dataclasses import dataclass
from pathlib import Path

import gin

from toolkit.protocols import KINDS
from toolkit.root import ROOT

ENTRY_POINTS = "toolkit.components"  # the group under which an installed package names its modules


@dataclass(frozen=True, eq=False)
class Entry:
    """One part: its kind, its class, and the knobs that gin may bind."""

    kind: str
    name: str
    cls: type
    knobs: dict[str, inspect.Parameter]

    @property
    def module(self) -> str:
        return self.cls.__module__

    @property
    def summary(self) -> str:
        """The first sentence of the part's docstring."""
        text = " ".join(inspect.cleandoc(self.cls.__doc__ or self.name).split())
        return re.split(r"(?<!al\.)(?<!eq\.)(?<=[.:])\s", text, maxsplit=1)[0].rstrip(".:;")

    @functools.cached_property
    def hints(self) -> dict[str, object]:
        """Annotations of the knobs, resolved, ``Annotated`` kept."""
        target = self.cls if "__dataclass_fields__" in vars(self.cls) else self.cls.__init__
        return typing.get_type_hints(target, include_extras=True)


CATALOG: dict[str, Entry] = {}


@functools.cache
def supplied(kind: str) -> tuple[str, ...]:
    """The constructor arguments that the toolkit passes to parts of a kind, positionally."""
    return tuple(inspect.signature(KINDS[kind].__init__).parameters)[1:]


def able(kind: str, what: str) -> str:
    """The parts of a kind that support something, to name in an error: "@A or @B", three at most."""
    names = [f"@{e.name}" for e in CATALOG.values() if e.kind == kind and what in getattr(e.cls, "supports", ())]
    return " or ".join(names[:3])


def register(kind: str):
    """Class decorator: the part goes into the catalogue, and gin can name it. Refuses, with ValueError, what
    ``entry_of`` refuses, and a name already on the shelf."""

    def add(cls: type) -> type:
        entry = entry_of(kind, cls)
        if entry.name in CATALOG:
            taken = CATALOG[entry.name]
            raise ValueError(f"{_place(cls)}: the name is taken by the {taken.kind} in {taken.module}; choose another")
        gin.register(cls, denylist=list(supplied(kind)) or None)
        CATALOG[entry.name] = entry
        return cls

    return add


def _place(cls: type) -> str:
    """A class with the file that it stands in."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return f"{cls.__name__} in {file or cls.__module__}"


def entry_of(kind: str, cls: type) -> Entry:
    """The entry that a class would have. Raises ValueError for what would fail later or in silence: an unknown kind,
    ``*args`` or ``**kwargs`` (typos would pass), too few leading arguments, a missing method, a slot with a default."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; kinds are {', '.join(KINDS)}")
    name, wanted = cls.__name__, supplied(kind)
    where = _place(cls)
    parameters = list(inspect.signature(cls).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(
            f"{where}: a part has an __init__ of its own, without *args or **kwargs, where typos would pass unseen"
        )
    leading, knobs = parameters[: len(wanted)], parameters[len(wanted) :]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(leading) < len(wanted) or any(p.kind not in positional for p in leading):
        raise ValueError(f"{where}: the toolkit builds {kind} parts as {name}({', '.join(wanted)}), positionally")
    for method in (m for m, f in vars(KINDS[kind]).items() if inspect.isfunction(f) and m != "__init__"):
        if not callable(getattr(cls, method, None)):
            raise ValueError(f"{where}: parts of kind {kind} have a method {method}(); see toolkit/protocols.py")
    for knob in knobs:
        if knob.name in KINDS and knob.default is not knob.empty:
            raise ValueError(f"{where}: the slot {knob.name!r} needs to be without a default; gin names its part")
        if isinstance(knob.default, type) and knob.default is not knob.empty:  # gin would ignore its bindings
            raise ValueError(f"{where}: {knob.name} takes None or nothing as its default; gin names the part")
    return Entry(kind, name, cls, {p.name: p for p in knobs})


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
