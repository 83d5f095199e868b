"""Finds the blocks, mixers and ffns of a model by name, and checks the names of statistics."""

from __future__ import annotations

from torch import nn

from toolkit.config.spelling import suggest
from toolkit.registry import CATALOG

KINDS = ("block", "mixer", "ffn")


def places(model: nn.Module) -> dict[str, str]:
    """{module name: "block", "mixer" or "ffn"} of the model's layers, in the order of the model.

    Found are the registered parts of these kinds, and ``model.mixers``. A part inside a part of its kind, or inside a
    mixer or ffn, is left out: it belongs to the outer one. In a model without registered blocks, the items of its
    ModuleList or Sequential with the most parameters count as blocks, and the modules in each block that are neither
    mixer nor ffn as "part". {} for a model without any of this."""
    kinds = {entry.cls: entry.kind for entry in CATALOG.values() if entry.kind in KINDS}
    mixers = {id(mixer) for mixer in getattr(model, "mixers", ())}
    named: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = next((kinds[cls] for cls in type(module).__mro__ if cls in kinds), None)
        kind = "mixer" if id(module) in mixers else kind
        if kind and not any(_is_inside(name, outer) and (named[outer] in (kind, "mixer", "ffn")) for outer in named):
            named[name] = kind
    return named if "block" in named.values() else _unregistered(model, named)


def check_statistic(name: str, probe: object, statistic: str, model: nn.Module) -> None:
    """Raise ValueError if the probe ``name`` can't give ``statistic``, written STATISTIC or STATISTIC/MODULE: if the
    probe lists its ``statistics`` and has no such one, or if the model has no such module or parameter."""
    kind, _, module = statistic.partition("/")
    known = {each.partition("/")[0]: "/" in each for each in getattr(probe, "statistics", ())}
    names = [*dict(model.named_modules()), *dict(model.named_parameters(remove_duplicate=False))]
    if known and kind not in known:
        raise ValueError(f"{name} has no number {kind!r}{suggest(kind, known) or '; it has ' + ', '.join(known)}")
    if known and known[kind] and not module:
        example = next((place for place in places(model)), "MODULE")
        raise ValueError(f"{name} gives {kind} of several modules; name one, as in probe/{name}/{kind}/{example}")
    if known and module and not known[kind]:
        raise ValueError(f"{name} gives {kind} once, for no module; write probe/{name}/{kind}")
    if module and module.partition("#")[0] not in names:
        raise ValueError(f"the model has no module or parameter {module!r}{suggest(module, names)}")


def _unregistered(model: nn.Module, named: dict[str, str]) -> dict[str, str]:
    """The places of a model whose blocks are not registered."""
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(_is_inside(name, part) for part in named)
    }
    if not stacks:
        return named
    largest = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    kind_of: dict[str, str] = {}
    for index, block in stacks[largest].named_children():
        name = f"{largest}.{index}" if largest else index
        kind_of[name] = named.get(name, "block")
        if name in named:
            continue
        kind_of |= {part: kind for part, kind in named.items() if _is_inside(part, name)}
        for child in (f"{name}.{child}" for child, module in block.named_children() if list(module.parameters())):
            if not any(part == child or _is_inside(part, child) for part in named):
                kind_of[child] = "part"
    return kind_of


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}." if outer else "") and name != outer
