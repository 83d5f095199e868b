"""``register(kind)`` puts a part on the shelf: gin can then name it, and the catalogue lists, checks and tests it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from dataclasses import dataclass

import gin

from toolkit.protocols import KINDS


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
