"""Which parts a config builds, and which of its bindings take effect.

They are found by walking from Experiment through references, scopes (children inherit them), lists and macros, in the
way gin does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from toolkit.config import keys
from toolkit.config.layers import Binding, ConfigError, Macro, references, show
from toolkit.config.spelling import nearest
from toolkit.config.values import find_part, known_part
from toolkit.protocols import KINDS
from toolkit.registry import CATALOG

ROOT = ("", "Experiment")
UNBOUND = object()  # stands for a knob that has neither binding nor default


def key_of(binding: Binding) -> str:
    """The binding's key with the part's bare name, so that all spellings of a part give the same key."""
    entry = find_part(binding.name) if binding.parameter else None
    return keys.spell(entry.name, binding.parameter, binding.scope) if entry else binding.key


class Walk:
    """All that is built from a merged config: ``parts`` with their knobs, and the keys of the bindings ``used``."""

    def __init__(self, merged: Mapping[str, Binding]):
        self.merged = merged
        self.parts: dict[tuple[str, str], dict[str, object]] = {}
        self.used: set[str] = set()
        self.ignored: dict[str, str] = {}  # slot key -> the part that does not use it
        self.entered: dict[str, str] = {}  # scope -> where a reference opens it
        self._visit(*ROOT)

    def _visit(self, scope: str, name: str) -> None:
        """Record the knobs of a part in a scope, and visit the parts that they refer to."""
        if (scope, name) in self.parts:
            return
        knobs = self.parts[scope, name] = {}
        bound = {knob: self.effective_binding(scope, name, knob) for knob in CATALOG[name].knobs}
        ignored = self._ignored_slots(bound)
        for knob, parameter in CATALOG[name].knobs.items():
            binding = bound[knob]
            if binding is None:
                default = parameter.default
                if default is inspect.Parameter.empty:
                    knobs[knob] = UNBOUND
                elif _is_literal(default):
                    knobs[knob] = default
                continue
            knobs[knob] = value = self._expand(binding.value)
            if knob in ignored:
                self.ignored[key_of(binding)] = ignored[knob]
                continue
            self.used.add(key_of(binding))
            for reference in references(value):
                self.entered.setdefault(reference.scope, binding.where)
                self._visit(reference.scope or scope, known_part(reference.name).name)

    def effective_binding(self, scope: str, name: str, knob: str) -> Binding | None:
        """The binding of a knob that gin uses in a scope: one in a/b overrides one in a, and that one without scope."""
        candidates = [keys.spell(name, knob, each) for each in keys.enclosing(scope)]
        return next((self.merged[key] for key in candidates if key in self.merged), None)

    def _ignored_slots(self, bound: Mapping[str, Binding | None]) -> dict[str, str]:
        """{slot: part} of the slots that have no effect: all parts in another slot of ``bound`` list them in their
        ``ignores``. ``part`` is the first of those parts."""
        ignored = {}
        for slot, binding in bound.items():
            if slot not in KINDS or binding is None:
                continue
            parts = [known_part(reference.name) for reference in references(self._expand(binding.value))]
            for sibling in bound:
                if parts and all(sibling in getattr(part.cls, "ignores", ()) for part in parts):
                    ignored[sibling] = parts[0].name
        return ignored

    def _expand(self, value: object, seen: tuple[str, ...] = ()) -> object:
        """The value with its macros replaced by their values; the macros count as used. ``seen``: the macros whose
        definitions contain this value. Raises ConfigError for a macro that refers to itself."""
        if isinstance(value, Macro):
            if value.name in seen:
                raise ConfigError(f"{self.merged[value.name].where}: macro {value.name} refers to itself")
            if value.name not in self.merged:  # a later layer defines it
                return value
            self.used.add(value.name)
            return self._expand(self.merged[value.name].value, (*seen, value.name))
        if isinstance(value, list | tuple):
            return type(value)(self._expand(item, seen) for item in value)
        if isinstance(value, dict):
            return {key: self._expand(item, seen) for key, item in value.items()}
        return value

    def why_unused(self, binding: Binding) -> str:
        """Why a binding changes nothing, in words."""
        if not binding.parameter:
            return f"macro {binding.name} is never used"
        name = known_part(binding.name).name
        if key_of(binding) in self.ignored:
            return f"{binding.key} changes nothing: {self.ignored[key_of(binding)]} does not use it"
        scopes = [scope for scope, part in self.parts if part == name]
        if not scopes:
            return f"{binding.key} changes nothing: no {name} is built{self._slots_note(CATALOG[name].kind)}"
        if not any(binding.scope in keys.enclosing(scope) for scope in scopes):
            near = nearest(binding.scope, scopes)
            hint = f"; did you mean {near!r}, as at {self.entered.get(near)}?" if near else ""
            return f"no {name} is built in the scope {binding.scope!r}{hint}"
        return f"{binding.key} changes nothing: a binding in a narrower scope overrides it wherever {name} is built"

    def _slots_note(self, kind: str) -> str:
        """What the slots of a kind hold instead, in parentheses; "" if there are no such slots."""
        slots = [
            f"{keys.spell(part, knob, scope)} is {show(value)}"
            for (scope, part), knobs in self.parts.items()
            for knob, value in knobs.items()
            if knob == kind
        ]
        return f" ({', '.join(slots)})" if slots else ""


def _is_literal(value: object) -> bool:
    """Whether gin can write a default as it is."""
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str)
