"""``register(kind)`` adds a part to the catalogue: gin can then name it, and the toolkit lists, checks and tests it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gin.config

from toolkit.protocols import KINDS


@dataclass(frozen=True, eq=False)
class Entry:
    """A part in the catalogue: its kind, name and class, and the knobs that gin may bind.

    source     SHA-256, hex, of the file with the class when the class was registered; None for the toolkit's own parts,
               and for a class in a notebook or in the script that Python runs
    execution  the ``__spec__`` of the class's module: a module that is executed again gets another one
    """

    kind: str
    name: str
    cls: type
    knobs: dict[str, inspect.Parameter]
    source: str | None = None
    execution: object = None

    @property
    def module(self) -> str:
        """The name of the module that defines the part."""
        return self.cls.__module__

    @property
    def summary(self) -> str:
        """The first sentence of the part's docstring."""
        text = " ".join(inspect.cleandoc(self.cls.__doc__ or self.name).split())
        return re.split(r"(?<!al\.)(?<!eq\.)(?<=[.:])\s", text, maxsplit=1)[0].rstrip(".:;")

    @functools.cached_property
    def hints(self) -> dict[str, object]:
        """The resolved annotations of the knobs, including ``Annotated``."""
        is_dataclass = "__dataclass_fields__" in vars(self.cls)
        target = self.cls if is_dataclass else self.cls.__init__  # type: ignore[misc]  # the class itself, no instance
        return typing.get_type_hints(target, include_extras=True)


CATALOG: dict[str, Entry] = {}


@functools.cache
def supplied(kind: str) -> tuple[str, ...]:
    """The names of the constructor arguments that the toolkit passes to parts of a kind, by position."""
    return tuple(inspect.signature(KINDS[kind]).parameters)


def able(kind: str, feature: str) -> str:
    """Name up to three parts of a kind that support ``feature``, for an error message: "@A or @B"."""
    names = [f"@{e.name}" for e in CATALOG.values() if e.kind == kind and feature in getattr(e.cls, "supports", ())]
    return " or ".join(names[:3])


def register(kind: str) -> Callable[[type], type]:
    """Class decorator that adds a part to the catalogue and to gin. Raises ValueError for a class that ``entry_of``
    refuses, and for a name that is already taken. A class replaces its former definition if its module is executed
    again, and a class from a notebook is replaced by any other of its name."""

    def add(cls: type) -> type:
        entry = entry_of(kind, cls)
        existing = CATALOG.get(entry.name)
        if existing and not _is_former_definition(existing, cls):
            raise ValueError(
                f"{_label(cls)}: the name is taken by the {existing.kind} in {existing.module}; choose another name"
            )
        if existing:
            _remove(existing)
        gin.config.register(cls, denylist=list(supplied(kind)) or None)
        CATALOG[entry.name] = entry
        return cls

    return add


def forget(module: str) -> None:
    """Remove the parts that a module has registered."""
    for entry in [entry for entry in CATALOG.values() if entry.module == module]:
        _remove(entry)


def _remove(entry: Entry) -> None:
    del CATALOG[entry.name]
    gin.config._REGISTRY.pop(f"{entry.module}.{entry.name}")  # gin has no public function for this


def _is_former_definition(entry: Entry, cls: type) -> bool:
    """Whether a new class of the same name replaces a part."""
    module = sys.modules.get(entry.module)
    if entry.module == "__main__" and not Path(getattr(module, "__file__", "")).is_file():
        return True  # a cell of a notebook, which was run again or moved into a file
    return entry.module == cls.__module__ and entry.execution is not getattr(module, "__spec__", None)


def digest_of(module: str) -> str | None:
    """SHA-256, hex, of a loaded module's file. None for the toolkit's own modules, for the script that Python runs, and
    for a module whose file is missing."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.split(".")[0] in ("toolkit", "components", "__main__") or not file or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _label(cls: type) -> str:
    """A class's name with the file that defines it, for error messages."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return f"{cls.__name__} in {file or cls.__module__}"


def entry_of(kind: str, cls: type) -> Entry:
    """Return the catalogue entry for a class. Raises ValueError for a class that would otherwise fail later, or not
    work without an error: an unknown kind, ``*args`` or ``**kwargs`` (which accept misspelt knobs), a constructor that
    does not take the arguments of its kind first, a missing method, or a slot with a default."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
    name, required = cls.__name__, supplied(kind)
    label = _label(cls)
    parameters = list(inspect.signature(cls).parameters.values())
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise ValueError(
            f"{label}: a part must define its own __init__ without *args or **kwargs, which would accept misspelt knobs"
        )
    leading, knobs = parameters[: len(required)], parameters[len(required) :]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(leading) < len(required) or any(parameter.kind not in positional for parameter in leading):
        raise ValueError(
            f"{label}: the toolkit builds {kind} parts as {name}({', '.join(required)}), with positional arguments; "
            "the constructor must take these first"
        )
    for method in (name for name, value in vars(KINDS[kind]).items() if inspect.isfunction(value)):
        if not callable(getattr(cls, method, None)):
            raise ValueError(f"{label}: a part of kind {kind} must have a method {method}(); see toolkit/protocols.py")
    for knob in knobs:
        if knob.name in KINDS and knob.default is not knob.empty:
            raise ValueError(f"{label}: the slot {knob.name!r} must have no default; choose its part in gin")
        # A class as a default would be built without its bindings in gin.
        if isinstance(knob.default, type) and knob.default is not knob.empty:
            raise ValueError(f"{label}: {knob.name} must have no default, or None; choose its part in gin")
    execution = getattr(sys.modules.get(cls.__module__), "__spec__", None)
    return Entry(kind, name, cls, {knob.name: knob for knob in knobs}, digest_of(cls.__module__), execution)
