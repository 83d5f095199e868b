"""Check a config before data is read: names, kinds, types, ranges, and that each binding changes something.

A binding must change something at the moment its layer is applied; later layers may override it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from toolkit.config import keys
from toolkit.config.layers import Binding, Config, Layer, Macro, raise_problems, references
from toolkit.config.spelling import nearest, suggest
from toolkit.config.values import check_value, find_part, kind_held, known_part, names_of
from toolkit.config.walk import UNBOUND, Walk, key_of
from toolkit.registry import CATALOG, Entry, supplied


def resolve(layers: list[Layer]) -> Config:
    """Check and merge the layers, base first; later ones override. Raises ConfigError with a line for each problem."""
    raise_problems([problem for layer in layers for problem in _check_layer(layer, layers)])
    merged = {key_of(binding): binding for layer in layers for binding in layer.bindings}
    final = Walk(merged)
    problems = list(_unused_bindings(layers, final))
    places: dict[str, str] = {}
    for (scope, name), knobs in final.parts.items():
        for knob, value in knobs.items():
            source = final.effective_binding(scope, name, knob)
            if value is UNBOUND:
                key = keys.spell(name, knob)
                problems.append(f"{key} is not bound and has no default; bind it in {layers[0].title}")
            elif source:
                origins = "".join(f"; {macro} is at {merged[macro].where}" for macro in _macros(source.value))
                places[keys.spell(name, knob, scope)] = source.where + origins
                if origins:
                    value_problems = check_value(CATALOG[name], knob, value)
                    problems += [f"{source.where}: {problem}{origins}" for problem in value_problems]
    raise_problems(problems)
    written = [b for layer in layers[1:] for b in layer.bindings if merged[key_of(b)] is b]
    modules = [each.module for layer in layers for each in layer.imports]
    modules += [CATALOG[name].module for _, name in final.parts]
    foreign = [m for m in dict.fromkeys(modules) if m.split(".")[0] not in ("components", "toolkit")]
    return Config(final.parts, written, foreign, places)


def _unused_bindings(layers: list[Layer], final: Walk) -> Iterator[str]:
    """Bindings that change nothing at the moment their layer is applied. ``final``: the walk of all layers. The base
    must bind a knob without default even if no other slot uses it."""
    merged: dict[str, Binding] = {}
    for layer in layers:
        merged |= {key_of(binding): binding for binding in layer.bindings}
        walk = Walk(merged)
        for binding in layer.bindings:
            key = key_of(binding)
            is_required = layer is layers[0] and key in walk.ignored and not _has_default(binding)
            if key not in walk.used and not is_required:
                hint = "; a later file makes it take effect: put its file after that one" if key in final.used else ""
                yield f"{binding.where}: {walk.why_unused(binding)}{hint}"


def _check_layer(layer: Layer, layers: list[Layer]) -> Iterator[str]:
    """Problems of single bindings: duplicate, unknown name, parameter or macro, wrong kind, type or range."""
    macros = {b.name: b.where for each in layers for b in each.bindings if not b.parameter}
    first: dict[str, Binding] = {}
    for binding in layer.bindings:
        key, where = key_of(binding), binding.where
        if key in first:
            yield f"{where}: {binding.key} is bound twice in {layer.title}; the first is at {first[key].where}"
        first.setdefault(key, binding)
        undefined = [m for m in _macros(binding.value) if m not in macros]
        if undefined:
            near = nearest(undefined[0], macros)
            place = f"; did you mean {near!r}, as at {macros[near]}?" if near else ""
            yield f"{where}: macro not found: {undefined[0]!r}{place}"
        elif not binding.parameter:
            if binding.name in CATALOG:
                yield f"{where}: {binding.name} = ... names no knob of {binding.name}; write {binding.name}.KNOB = ..."
            yield from (f"{where}: {problem}" for problem in _check_references(binding))
        elif entry := find_part(binding.name):
            yield from (f"{where}: {problem}" for problem in _check_binding(binding, entry))
        else:
            yield f"{binding.header or where}: part not found: {binding.name!r}{suggest(binding.name, CATALOG)}"


def _check_binding(binding: Binding, entry: Entry) -> Iterator[str]:
    """Problems of a binding's parameter and value, for the part ``entry``."""
    knob_list = f"; its knobs are {', '.join(entry.knobs)}" if entry.knobs else "; it has no knobs"
    if binding.parameter in supplied(entry.kind):
        yield f"{keys.spell(entry.name, binding.parameter)} can't be bound: the toolkit supplies it{knob_list}"
        return
    if binding.parameter not in entry.knobs:
        hint = suggest(binding.parameter, entry.knobs) or knob_list
        yield f"{entry.name} has no parameter {binding.parameter!r}{hint}"
        return
    problems = list(_check_references(binding))
    if not problems and not list(_macros(binding.value)):
        problems = list(check_value(entry, binding.parameter, binding.value))
    yield from problems


def _check_references(binding: Binding) -> Iterator[str]:
    """Problems of the references in a binding's value: unknown names, and parentheses."""
    for reference in references(binding.value):
        if find_part(reference.name) is None:
            owner = find_part(binding.name) if binding.parameter else None
            kind = kind_held(owner, binding.parameter) if owner else None
            yield f"part not found: {reference.name!r}{suggest(reference.name, names_of(kind) or CATALOG)}"
        elif reference.called:
            yield f"{binding.key} takes the class itself: write {reference}, without parentheses"


def _has_default(binding: Binding) -> bool:
    """Whether the bound knob has a default."""
    return known_part(binding.name).knobs[binding.parameter].default is not inspect.Parameter.empty


def _macros(value: object) -> Iterator[str]:
    """The names of the macros in a value; lists, tuples and the values of dicts are searched."""
    if isinstance(value, Macro):
        yield value.name
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _macros(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _macros(item)
