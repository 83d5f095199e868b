"""``register(kind)`` adds a part to the catalogue: gin can then name it, and the toolkit lists, checks and tests it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass

import gin.config

from toolkit.protocols import KINDS


@dataclass(frozen=True, eq=False)
class Entry:
    """A part in the catalogue: its kind, name and class, and the knobs that gin may bind."""

    kind: str
    name: str
    cls: type
    knobs: dict[str, inspect.Parameter]

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
    refuses, and for a name that is already taken."""

    def add(cls: type) -> type:
        entry = entry_of(kind, cls)
        if entry.name in CATALOG:
            existing = CATALOG[entry.name]
            raise ValueError(
                f"{_label(cls)}: the name is taken by the {existing.kind} in {existing.module}; choose another name"
            )
        gin.config.register(cls, denylist=list(supplied(kind)) or None)
        CATALOG[entry.name] = entry
        return cls

    return add


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
    return Entry(kind, name, cls, {parameter.name: parameter for parameter in knobs})
