"""Checks of a probe: what its values may depend on, what it may change, and which models it can look at.

Its models are small GPTs in which one step was made, and a model without parts that the toolkit knows."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.conformance.bench import LONGEST, VOCAB, Bench, plain_part, tokens
from toolkit.conformance.lines import Broken, Gauge, check
from toolkit.conformance.purity import generator_states, generators_restored, is_same, state_of
from toolkit.context import Context
from toolkit.model import Head
from toolkit.objective import Objective
from toolkit.probing.capture import Capture, Precision, capture
from toolkit.probing.prober import Observation, sort_values
from toolkit.probing.views import NEEDS, Views
from toolkit.registry import CATALOG

SLOTS = ("block", "mixer", "ffn", "norm", "attention")
Result = Mapping[str, object]


@dataclass
class Scene:
    """What a probe looks at: the copy of an objective that was run, the model after the step, and what was captured."""

    copied: Objective
    after: nn.Module
    batch: tuple[Tensor, Tensor]
    captured: Capture
    precision: Precision

    def views(self, cls: type[Views] = Views) -> Views:
        """The views of a probe that has asked for all of them."""
        return cls("observe()", NEEDS, self.copied.model, self.after, self.batch, self.captured, self.precision)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was captured, by name."""
        seen = {"activations": self.captured.activations, "inputs": self.captured.inputs}
        found = {f"views.{view}[{name!r}]": s.tensor for view, each in seen.items() for name, s in each.items()}
        found |= {f"views.gradients[{name!r}]": tensor for name, tensor in self.captured.gradients.items()}
        return found | {"views.ids": self.batch[0], "views.targets": self.batch[1]}


class Unknown(nn.Module):
    """A model without a part that the toolkit knows: no mixers, no attention, plain layers in a list."""

    class Layer(nn.Module):
        """A layer that looks at the token before."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm, self.near, self.wide = nn.LayerNorm(dim), nn.Linear(2 * dim, dim), nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:  # (B,T,C) -> (B,T,C)
            y = self.norm(x)
            y = torch.relu(self.near(torch.cat((y, y.roll(1, 1)), dim=-1)))
            return x + self.wide(y)

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.max_len, self.table = LONGEST, nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList(self.Layer(dim) for _ in range(2))

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple[Tensor, Head]:  # (B,T) -> (B,T,C), head
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return x, Head(self.table.weight, VOCAB, None)


def scene_of(model: nn.Module, half: bool = False, seed: int = 1) -> Scene:
    """Copy a model, change its weights as a step does, and run the copy; ``half``: in bfloat16."""
    objective = Objective(model, plain_part("loss")())
    copied = copy.deepcopy(objective).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001).add_(1e-4)

    def precision() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    ids = tokens(2, 33, seed)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Scene(copied, model, batch, capture(copied, *batch, set(NEEDS), precision), precision)


def look(part: object, views: Views) -> Result:
    """The result of ``observe``, as a run calls it. Raises Broken unless it is a dict."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = part.observe(views)  # type: ignore[attr-defined]  # a part of kind probe
    if not isinstance(result, dict):
        raise Broken(f"observe() returned {result!r:.80}, and must return {{'STATISTIC/MODULE': number or array}}")
    return result


@check("returns named, finite numbers", "probe")
def form(bench: Bench) -> Gauge:
    """observe() returns {STATISTIC or STATISTIC/MODULE: number, small array or None}; in a small GPT, all are finite
    and some are numbers or arrays. Names have no white space and no further slash."""
    result, observation = look(bench.cls(), scene_of(bench.model()).views()), Observation()
    try:
        sort_values(observation, "it", result)
    except ValueError as error:
        raise Broken(f"{str(error).replace('it.observe', 'observe()')}; look at what observe() returns") from error
    not_finite = [name for name, reason in observation.left_out.items() if "finite" in reason]
    if not_finite:
        raise Broken(
            f"{not_finite[0].removeprefix('probe/it/')} is not a finite number in a small GPT, and must be; look at "
            "divisions by 0 and logarithms of 0"
        )
    measured = [*observation.row, *observation.distributions]
    if not measured:
        raise Broken("it measures nothing in a small GPT, and must return at least one number; look at observe()")
    gauge = Gauge(note=", ".join(dict.fromkeys(name.split("/")[2] for name in measured)))
    gauge.record(0, f"{len(measured)} values")
    return gauge


@check("names are modules or parameters", "probe")
def names(bench: Bench) -> Gauge:
    """What follows the slash in a name is the dotted name of a module or parameter of the model, so that tables and
    pages can order the values by depth."""
    scene = scene_of(bench.model())
    known = {name for name, _ in (*scene.after.named_modules(), *scene.after.named_parameters())}
    places = [name.partition("/")[2] for name in look(bench.cls(), scene.views()) if "/" in str(name)]
    for place in places:
        if place.partition("#")[0] not in known:
            raise Broken(
                f"{place!r} is neither a module nor a parameter of the model, and must be one; use the keys of the "
                "views, such as views.activations or views.places, after the slash"
            )
    gauge = Gauge(note=f"{len(set(places))} modules and parameters")
    gauge.record(0, f"{len(places)} names")
    return gauge


@check("observing changes nothing", "probe")
def unchanged(bench: Bench) -> Gauge:
    """observe() changes no weight, buffer, gradient, mode or hook of the model, none of the captured tensors, which
    other probes read too, and no setting of torch."""
    scene = scene_of(bench.model())
    before = {name: tensor.clone() for name, tensor in scene.tensors().items()} | state_of(scene.copied.model)
    after_step = state_of(scene.after)
    look(bench.cls(), scene.views())
    after = scene.tensors() | state_of(scene.copied.model)
    changed = [name for name in before | after if not is_same(before.get(name), after.get(name))]
    changed += [name for name, value in state_of(scene.after).items() if not is_same(after_step.get(name), value)]
    if changed:
        raise Broken(
            f"observe() changes {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}, and must change "
            "nothing; look at operations that end in _, at train(), eval() and hooks"
        )
    gauge = Gauge(note=f"{len(before)} tensors, modes, hooks and settings")
    gauge.record(0, "one call")
    return gauge


@check(
    "values do not depend on earlier calls",
    "probe",
    look_at="attributes that observe() changes, and random generators that are kept between calls",
)
def afresh(bench: Bench) -> Gauge:
    """The values are the same in a second call, after another model, and in another instance."""
    gauge, part = Gauge(0, "values that differ"), bench.cls()
    scene, other = scene_of(bench.model()), scene_of(bench.model(seed=1), seed=2)
    expected = look(part, scene.views())
    gauge.record(_differences(look(part, scene.views()), expected), "second call")
    look(part, other.views())
    gauge.record(_differences(look(part, scene.views()), expected), "after another model")
    gauge.record(_differences(look(bench.cls(), scene.views()), expected), "another instance")
    return gauge


@check("values depend on the model", "probe")
def sees_the_model(bench: Bench) -> Gauge:
    """Two models have other values: one as drawn, one with other weights, half of the rows of each matrix 0."""
    drawn, halved = bench.model(), bench.model(seed=1)
    with torch.no_grad():
        for matrix in (parameter for parameter in halved.parameters() if parameter.ndim == 2):
            matrix[: len(matrix) // 2] = 0
    one, other = (look(bench.cls(), scene_of(model).views()) for model in (drawn, halved))
    if not _differences(one, other):
        raise Broken(
            "two models with other weights have the same values, and must not; look at whether observe() reads the "
            "views, and at thresholds that nothing passes"
        )
    gauge = Gauge(note=f"{_differences(one, other)} of {len(one)} values differ")
    gauge.record(0, "two models")
    return gauge


@check("keeps no tensors between calls", "probe")
def keeps_nothing(bench: Bench) -> Gauge:
    """After observe(), nothing that the part holds leads to a tensor or module of the model, which would keep its
    memory."""
    part, scene = bench.cls(), scene_of(bench.model())
    look(part, scene.views())
    targets = {id(tensor) for tensor in (*scene.tensors().values(), *scene.copied.parameters())}
    targets |= {tensor.untyped_storage().data_ptr() for tensor in scene.tensors().values()}
    for kept in _reachable(part):
        is_theirs = isinstance(kept, Tensor) and {id(kept), kept.untyped_storage().data_ptr()} & targets
        if is_theirs or isinstance(kept, nn.Module | Views):
            raise Broken(
                f"it keeps a {type(kept).__name__} of the model after observe(), and must not: its memory could not be "
                "used until the next call; look at assignments to self"
            )
    gauge = Gauge(note="no tensor or module of the model")
    gauge.record(0, "one call")
    return gauge


def _reachable(part: object) -> Iterator[object]:
    """What the attributes of an object hold, and the items of lists, tuples, sets and dicts in them."""
    try:
        waiting: list[object] = [vars(part)]
    except TypeError:  # it has no attributes
        return
    seen: set[int] = set()
    while waiting:
        each: object = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, dict):
            waiting += list(each.values())
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += list(each)


@check("declares the views that it reads", "probe")
def declares(bench: Bench) -> Gauge:
    """``needs`` has the views that observe() reads, and no others, since each of them takes time."""
    part, read = bench.cls(), set[str]()
    needs = set(part.needs)

    class Watched(Views):
        """Views that record which of them are read."""

        def _check(self, view: str) -> None:
            read.add(view)

    look(part, scene_of(bench.model()).views(Watched))
    if read - needs:
        raise Broken(
            f"observe() reads views.{min(read - needs)}, which is not in needs, and must be: a run captures only what "
            f"probes ask for; write needs = {sorted(read)}"
        )
    if needs - read:
        raise Broken(
            f"needs has {min(needs - read)!r}, which observe() does not read in a small GPT, and must not have it: it "
            f"takes time at each observation; write needs = {sorted(read) or 'set()'}"
        )
    gauge = Gauge(note=", ".join(sorted(read)) or "weights alone")
    gauge.record(0, "a small GPT")
    return gauge


@check("draws no global random numbers", "probe", look_at="torch.rand, np.random and random")
def no_global_draws(bench: Bench) -> Gauge:
    """observe() leaves the global random generators of torch, numpy and Python as they were."""
    scene = scene_of(bench.model())
    with generators_restored():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        before = generator_states()
        with torch.no_grad():
            bench.cls().observe(scene.views())
        moved = [name for name, state in generator_states().items() if state != before[name]]
    if moved:
        raise Broken(
            f"it draws from the global generator of {' and '.join(moved)}, which training uses, and must leave it as "
            "it was; use a generator of its own with a fixed seed, such as torch.Generator().manual_seed(0)"
        )
    gauge = Gauge(note="torch, numpy and Python")
    gauge.record(0, "one call")
    return gauge


@check("works with any part and model", "probe")
def works(bench: Bench) -> Gauge:
    """observe() raises no error in a GPT with each block, mixer, ffn, norm and attention kernel that is registered, nor
    in a model without parts that the toolkit knows."""
    gauge, cls = Gauge(note="no error"), bench.cls
    models = {
        entry.name: (entry.kind, entry.cls)
        for entry in CATALOG.values()
        if entry.kind in SLOTS and entry.module.split(".")[0] in ("components", "toolkit")
    }
    for name, (slot, part) in models.items():
        try:
            slots: dict[str, Any] = {slot: part}
            model = bench.model(**slots)
        except (ValueError, TypeError):  # it needs knobs, or other parts
            continue
        _try(cls, model, name, gauge)
    _try(cls, Unknown(), "plain layers", gauge)
    return gauge


def _try(cls: type, model: nn.Module, what: str, gauge: Gauge) -> None:
    scene = scene_of(model)
    try:
        look(cls(), scene.views())
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        raise Broken(
            f"in a model with {what}, observe() raised {reason[:160]}, and must not; take names from the views, and "
            "return None for what does not apply"
        ) from error
    gauge.record(0, what)


@check("works in bfloat16", "probe")
def half(bench: Bench) -> Gauge:
    """observe() has the same names in a run in bfloat16, in which many tensors have 16 bits, and numbers are finite."""
    expected = look(bench.cls(), scene_of(bench.model()).views())
    try:
        result = look(bench.cls(), scene_of(bench.model(), half=True).views())
    except (TypeError, RuntimeError) as error:
        raise Broken(
            f"in bfloat16, observe() raised {type(error).__name__}: {str(error)[:120]}; call .float() on tensors first"
        ) from error
    if result.keys() != expected.keys():
        raise Broken(
            f"in bfloat16 it has other names: {sorted(result.keys() ^ expected.keys())[:3]}; look at comparisons with "
            "dtypes"
        )
    gauge = Gauge(note=f"{len(result)} values")
    gauge.record(0, "a small GPT")
    return gauge


def _differences(one: Result, other: Result) -> int:
    """How many names differ in their values, or are in only one result; NaN equals NaN."""

    def number(value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        return torch.as_tensor(value).detach().double()

    return sum(
        name not in one or name not in other or not is_same(number(one[name]), number(other[name]))
        for name in one.keys() | other.keys()
    )
