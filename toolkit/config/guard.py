"""Check a config before data is read: names, kinds, types, ranges, and that each binding changes something.

A binding must change something at the moment its layer is applied; later layers may override it. Which bindings take
effect is found by walking from Experiment through references, scopes (children inherit them), lists and macros, in the
way gin does."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import typing
from collections.abc import Iterable

from pydantic import ConfigDict, TypeAdapter, ValidationError

from toolkit.config import keys
from toolkit.config.layers import Binding, Config, ConfigError, Layer, Macro, Reference, references, show
from toolkit.protocols import KINDS
from toolkit.registry import CATALOG, Entry, supplied

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
ROOT = ("", "Experiment")
LARGEST = 2**63 - 1
TOO_LARGE = f"an integer lies between {-LARGEST} and {LARGEST}, which is what torch and numpy can hold"
UNBOUND = object()  # stands for a knob that has neither binding nor default


def resolve(layers: list[Layer]) -> Config:
    """Check and merge the layers, base first; later ones override. Raises ConfigError with a line for each problem."""
    problems = [problem for layer in layers for problem in _check_layer(layer, layers)]
    _raise(problems)
    final = _Walk({_key(b): b for layer in layers for b in layer.bindings})
    merged: dict[str, Binding] = {}
    for layer in layers:
        merged |= {_key(binding): binding for binding in layer.bindings}
        walk = _Walk(merged)
        for binding in layer.bindings:
            required = layer is layers[0] and _key(binding) in walk.ignored and _is_required(binding)
            if _key(binding) not in walk.used and not required:
                problems.append(f"{binding.where}: {walk.why_unused(binding)}{_order_hint(binding, final)}")
    places = {}
    for (scope, name), knobs in final.parts.items():
        for knob, value in knobs.items():
            source = final._effective_binding(scope, name, knob)
            if value is UNBOUND:
                problems.append(f"{name}.{knob} is not bound, and has no default; bind it in {layers[0].title}")
            elif source:
                origins = "".join(f"; {macro} is at {final.merged[macro].where}" for macro in _macros(source.value))
                places[keys.spell(name, knob, scope)] = source.where + origins
                if origins:
                    value_problems = _check_value(CATALOG[name], knob, value)
                    problems += [f"{source.where}: {problem}{origins}" for problem in value_problems]
    _raise(problems)
    written = [b for layer in layers[1:] for b in layer.bindings if merged[_key(b)] is b]
    modules = [each.module for layer in layers for each in layer.imports]
    modules += [CATALOG[name].module for _, name in final.parts]
    foreign = [m for m in dict.fromkeys(modules) if m.split(".")[0] not in ("components", "toolkit")]
    return Config(final.parts, written, foreign, places)


class _Walk:
    """All that is built from a merged config: ``parts`` with their knobs, and the keys of the bindings ``used``."""

    def __init__(self, merged: dict[str, Binding]):
        self.merged, self.used, self.parts = merged, set(), {}
        self.ignored: dict[str, str] = {}  # slot key -> the part that does not use it
        self.entered: dict[str, str] = {}  # scope -> where a reference opens it
        self._visit(*ROOT)

    def _visit(self, scope: str, name: str) -> None:
        """Record the knobs of a part in a scope, and visit the parts that they refer to."""
        if (scope, name) in self.parts:
            return
        knobs = self.parts[scope, name] = {}
        bound = {knob: self._effective_binding(scope, name, knob) for knob in CATALOG[name].knobs}
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
                self.ignored[_key(binding)] = ignored[knob]
            else:
                self.used.add(_key(binding))
            for reference in references(value):
                if knob not in ignored:
                    self.entered.setdefault(reference.scope, binding.where)
                    self._visit(reference.scope or scope, _entry(reference.name).name)

    def _effective_binding(self, scope: str, name: str, knob: str) -> Binding | None:
        """The binding of a knob that gin uses in a scope: one in a/b overrides one in a, and that one without scope."""
        candidates = [keys.spell(name, knob, each) for each in keys.enclosing(scope)]
        return next((self.merged[key] for key in candidates if key in self.merged), None)

    def _ignored_slots(self, bound: dict[str, Binding | None]) -> dict[str, str]:
        """{slot: part} of the slots that have no effect: all parts in another slot of ``bound`` list them in their
        ``ignores``. ``part`` is the first of those parts."""
        ignored = {}
        for slot, binding in bound.items():
            names = (
                [_entry(r.name) for r in references(self._expand(binding.value))] if slot in KINDS and binding else []
            )
            for sibling in bound:
                if names and all(sibling in getattr(entry.cls, "ignores", ()) for entry in names):
                    ignored[sibling] = names[0].name
        return ignored

    def _expand(self, value: object, seen: tuple[str, ...] = ()) -> object:
        """The value with its macros replaced by their values; the macros count as used. ``seen``: the macros whose
        definitions contain this value. Raises ConfigError for a macro that is defined by itself."""
        if isinstance(value, Macro):
            if value.name in seen:
                raise ConfigError(f"{self.merged[value.name].where}: macro {value.name} is defined by itself")
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
            return f"macro {binding.name} is used nowhere"
        name = _entry(binding.name).name
        if _key(binding) in self.ignored:
            return f"{binding.key} changes nothing: {self.ignored[_key(binding)]} does not use it"
        scopes = [scope for scope, part in self.parts if part == name]
        if not scopes:
            kind = CATALOG[name].kind
            slots = {keys.spell(p, k, s): v for (s, p), ks in self.parts.items() for k, v in ks.items() if k == kind}
            slot_values = ", ".join(f"{slot} is {show(value)}" for slot, value in slots.items())
            return f"{binding.key} changes nothing: no {name} is built" + (f" ({slot_values})" if slot_values else "")
        if not any(binding.scope in keys.enclosing(scope) for scope in scopes):
            near = nearest(binding.scope, scopes)
            hint = f"; did you mean {near!r}, as at {self.entered.get(near)}?" if near else ""
            return f"no {name} is built in the scope {binding.scope!r}{hint}"
        return f"{binding.key} changes nothing: a binding in a closer scope wins wherever {name} is built"


def _check_layer(layer: Layer, layers: list[Layer]) -> Iterable[str]:
    """Problems of single bindings: duplicate, unknown name, parameter or macro, wrong kind, type or range."""
    macros = {b.name: b.where for each in layers for b in each.bindings if not b.parameter}
    first: dict[str, Binding] = {}
    for binding in layer.bindings:
        key, where = _key(binding), binding.where
        if key in first:
            yield f"{where}: {binding.key} is bound twice in {layer.title}; the first is at {first[key].where}"
        first.setdefault(key, binding)
        undefined = [m for m in _macros(binding.value) if m not in macros]
        if undefined:
            near = nearest(undefined[0], macros)
            place = f"; did you mean {near!r}, as at {macros[near]}?" if near else ""
            yield f"{where}: there is no macro {undefined[0]!r}{place}"
        elif not binding.parameter:
            if binding.name in CATALOG:
                yield f"{where}: {binding.name} = binds no parameter of {binding.name}; write {binding.name}.X = "
            yield from (f"{where}: {problem}" for problem in _check_references(binding))
        elif _entry(binding.name) is None:
            place = binding.header or where
            yield f"{place}: there is no part {binding.name!r}{suggest(binding.name, CATALOG)}"
        else:
            yield from (f"{where}: {problem}" for problem in _check_binding(binding, _entry(binding.name)))


def _check_binding(binding: Binding, entry: Entry) -> Iterable[str]:
    """Problems of a binding's parameter and value, for the part ``entry``."""
    if binding.parameter in supplied(entry.kind):
        knobs = f"; its knobs are {', '.join(entry.knobs)}" if entry.knobs else "; it has no knobs"
        yield f"{entry.name}.{binding.parameter} can't be bound: the toolkit supplies it{knobs}"
        return
    if binding.parameter not in entry.knobs:
        near = suggest(binding.parameter, entry.knobs)
        knob_list = "" if near else f"; its knobs are {', '.join(entry.knobs)}" if entry.knobs else "; it has no knobs"
        yield f"{entry.name} has no parameter {binding.parameter!r}{near}{knob_list}"
        return
    problems = list(_check_references(binding))
    if not problems and not list(_macros(binding.value)):
        problems = list(_check_value(entry, binding.parameter, binding.value))
    yield from problems


def _check_references(binding: Binding) -> Iterable[str]:
    """Problems of the references in a binding's value: unknown names, and parentheses."""
    for reference in references(binding.value):
        if _entry(reference.name) is None:
            owner = _entry(binding.name) if binding.parameter else None
            kind = _kind(owner, binding.parameter) if owner else None
            yield f"there is no part {reference.name!r}{suggest(reference.name, _names_of(kind) or CATALOG)}"
        elif reference.called:
            yield f"{binding.key} takes the class itself: write {str(reference)}, without parentheses"


def _check_value(entry: Entry, knob: str, value: object) -> Iterable[str]:
    """Problems of a value. A slot is checked by the kind that its name says, any other knob by its annotation."""
    kind, name = _kind(entry, knob), f"{entry.name}.{knob}"
    if too_large(value):
        yield f"{name} = {show(value)[:40]}: {TOO_LARGE}"
        return
    if not _is_text(value):
        yield f"{name} = {show(value)[:40]}: the text holds half a surrogate pair, which no file can; leave it out"
        return
    if kind and not (value is None and _fits(entry, knob, None)):
        example = next(iter(_names_of(kind)), "Name")
        fault = None
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, Reference):
                fault = f"{name} takes a reference to a {kind}, such as @{example}, not {show(item)}"
            elif _entry(item.name).kind != kind:
                other = _entry(item.name).kind
                fault = f"{name} = {item}: that is of kind {other}; of kind {kind} are {', '.join(_names_of(kind))}"
        if fault is None and value == []:
            fault = f"{name} = [] is empty; it needs at least one {kind}"
        elif fault is None and not _fits(entry, knob, value):
            expected = f"one {kind}, not a list" if isinstance(value, list) else f"a list: write [{show(value)}]"
            fault = f"{name} = {show(value)}: it takes {expected}"
        if fault:
            yield fault
        return
    try:
        _adapter(entry, knob).validate_python(_classes(value))
    except ValidationError as error:
        reasons = dict.fromkeys(e["msg"].removeprefix("Input ").removeprefix("Value ") for e in error.errors())
        yield f"{name} = {show(value)}: it {', or '.join(reasons)}"


def too_large(value: object) -> bool:
    """Whether a value has an integer that torch and numpy can't hold; lists, tuples and dicts are searched."""
    if isinstance(value, list | tuple):
        return any(map(too_large, value))
    if isinstance(value, dict):
        return any(map(too_large, [*value, *value.values()]))
    return isinstance(value, int) and not -LARGEST <= value <= LARGEST


def _is_text(value: object) -> bool:
    """Whether all text in a value can be written as UTF-8; lists, tuples and dicts are searched."""
    if isinstance(value, list | tuple):
        return all(map(_is_text, value))
    if isinstance(value, dict):
        return all(map(_is_text, [*value, *value.values()]))
    return not (isinstance(value, str) and re.search("[\ud800-\udfff]", value))


def _fits(entry: Entry, knob: str, value: object) -> bool:
    """Whether a value has the type of the knob's annotation."""
    try:
        _adapter(entry, knob).validate_python(_classes(value))
    except ValidationError:
        return False
    return True


@functools.cache
def _adapter(entry: Entry, knob: str) -> TypeAdapter:
    """pydantic's strict check of a knob's annotation; a knob without one accepts anything."""
    return TypeAdapter(entry.hints.get(knob, object), config=STRICT)


def _kind(entry: Entry, knob: str) -> str | None:
    """The kind of part that a knob holds, or None. A knob with the name of a kind, or its plural, holds that kind; so
    does one whose name ends in a kind, if its annotation is a class (qk_norm)."""
    for name in (knob, knob.removesuffix("s")):
        if name in KINDS:
            return name
    kind = knob.rpartition("_")[2]
    return kind if kind in KINDS and type in typing.get_args(entry.hints.get(knob)) else None


def _names_of(kind: str | None) -> list[str]:
    """The names of all registered parts of a kind."""
    return [entry.name for entry in CATALOG.values() if entry.kind == kind]


def _entry(name: str) -> Entry | None:
    """The part of a name, or None. The part's module, or the end of it, may precede the name: ``attention.Name``."""
    entry = CATALOG.get(keys.bare(name))
    return entry if entry and f".{entry.module}.{entry.name}".endswith(f".{name}") else None


def _key(binding: Binding) -> str:
    """The binding's key with the part's bare name, so that all spellings of a part give the same key."""
    entry = _entry(binding.name) if binding.parameter else None
    return keys.spell(entry.name, binding.parameter, binding.scope) if entry else binding.key


def _is_required(binding: Binding) -> bool:
    """Whether the knob has no default. The base must bind such a knob even if no other slot uses it."""
    entry = _entry(binding.name) if binding.parameter else None
    return entry is not None and entry.knobs[binding.parameter].default is inspect.Parameter.empty


def _order_hint(binding: Binding, final: _Walk) -> str:
    """A hint for a binding that changes nothing in its own layer, but would after the later ones; else ""."""
    return "; a later file names it, so put this one after that" if _key(binding) in final.used else ""


def _macros(value: object) -> Iterable[str]:
    """The names of the macros in a value; lists, tuples and the values of dicts are searched."""
    if isinstance(value, Macro):
        yield value.name
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _macros(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _macros(item)


def _classes(value: object) -> object:
    """The value with references, alone or in a list, replaced by their classes."""
    if isinstance(value, Reference):
        return _entry(value.name).cls
    return [_classes(item) for item in value] if isinstance(value, list) else value


def _is_literal(value: object) -> bool:
    """Whether gin can write a default as it is."""
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str)


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the nearest known word; "" if none is near."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to ``word``, ignoring case; None if none is similar. A word that differs by one slip of
    the fingers comes before the most similar one. Of several slips, swapped letters come before a letter too many or
    too few, and these before a replaced one."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    slips = [name for name in by_lower if _is_one_slip(word.lower(), name)]
    slips.sort(key=lambda name: (sorted(name) != sorted(word.lower()), len(name) == len(word), name not in near))
    closest = next(iter([*slips, *near]), None)
    return by_lower[closest] if closest else None


def _is_one_slip(one: str, other: str) -> bool:
    """Whether two words differ by one slip: a letter too many, too few or replaced, or two neighbours swapped."""
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    middle, others = one[start : len(one) - end], other[start : len(other) - end]
    return max(len(middle), len(others)) <= 1 or (len(middle) == 2 and middle[::-1] == others)


def _raise(problems: list[str]) -> None:
    """Raise ConfigError with all problems, if there are any."""
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
