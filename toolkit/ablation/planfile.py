"""A plan as it is written: the fields of an ablation, read from a gin file, checked, and unfolded into arms."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import TypeAdapter, ValidationError

from toolkit.comparison.runs import direction
from toolkit.config.guard import STRICT, TOO_LARGE, suggest, too_large
from toolkit.config.layers import Config, ConfigError, Layer, Reference, show

Seeds = list[Annotated[int, Ge(0)]]
Rates = Annotated[list[Annotated[float, Gt(0)]], Len(min_length=1)]
BUDGETS = ("steps", "tokens", "flops", "seconds")
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]{0,79}"
SETTLED = {"Experiment.steps": "the budget (Ablation.steps, tokens, flops or seconds)", "Experiment.seed": "the seeds"}


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What a plan says. An entry of a list is an overlay's path or a binding in quotes.

    question         what the plan asks, in a sentence
    arms             {name: entries}; the baseline's may be empty
    leave_one_out    {part: entries}: the arm "all" has every part, and "without-PART" all but one
    grid             {key: values}: an arm for each combination, named after its values, such as "SwiGLU-RMSNorm"
    baseline         the arm that the others are compared with; without it, the first
    common           entries that every arm has, laid under its own
    factor           config keys, as patterns, in which arms may differ; those of ``grid`` are added
    metric           of the last row of metrics.jsonl
    higher_is_better  of a metric that the toolkit does not write itself: False where lower is better
    effect           the smallest difference of the metric that matters to you
    steps            the budget of each arm; or tokens, or flops, or seconds of training
    lr_grid          learning rates to try, for all arms or {arm: rates}, on ``selection_seeds``; judged on ``seeds``
    lr_knob          the knob of the rate, for all arms or {arm: knob}; without it, ``lr`` of the arm's optimizer
    match            makes arms equal to the baseline in "params" or "flops" per token
    match_knob       the width that does, for all arms or {arm: knob}; without it, ``hidden`` of the arm's ffn
    match_multiple   the width is a multiple of this
    """

    question: str
    effect: Annotated[float, Gt(0)]
    arms: dict[str, list[str]] = field(default_factory=dict)
    leave_one_out: dict[str, list[str]] = field(default_factory=dict)
    grid: dict[str, Annotated[list[object], Len(min_length=1)]] = field(default_factory=dict)
    baseline: str | None = None
    common: list[str] = field(default_factory=list)
    factor: list[str] = field(default_factory=list)
    seeds: Annotated[Seeds, Len(min_length=1)] = field(default_factory=lambda: [0, 1, 2])
    metric: str = "val_full/loss_nats"
    higher_is_better: bool | None = None
    alpha: Annotated[float, Gt(0), Le(0.5)] = 0.05
    steps: Annotated[int, Gt(0), Le(99_999_999)] | None = None  # a checkpoint's name has eight digits
    tokens: Annotated[int, Gt(0)] | None = None
    flops: Annotated[float, Gt(0)] | None = None
    seconds: Annotated[float, Gt(0)] | None = None
    lr_grid: Rates | dict[str, Rates] | None = None
    lr_knob: str | dict[str, str] | None = None
    selection_seeds: Seeds = field(default_factory=list)
    match: Literal["params", "flops"] | None = None
    match_knob: str | dict[str, str] | None = None
    match_multiple: Annotated[int, Gt(0)] = 1


@dataclass
class Arm:
    """One arm: its entries, its config, and what that comes to."""

    name: str
    overlays: list[str]
    bindings: list[str]
    config: Config | None = None
    width: tuple[str, int | None, int] | None = None  # (knob, value, residual) where the plan matches
    parameters: int = 0
    flops_per_token: int | None = None
    tokens_per_step: int = 0
    steps: int | None = None
    lr_knob: str | None = None

    @property
    def settled(self) -> list[str]:
        """The bindings that this arm has in every job."""
        knob, value, _ = self.width or (None, None, 0)
        width = [f"{knob} = {value}"] if value is not None else []
        return [*self.bindings, *width]


def parse(layer: Layer, title: str) -> tuple[Ablation, dict[str, str]]:
    """The plan's object out of the bindings of a file called ``title``, and where each field is bound. Raises
    ConfigError."""
    fields = {field.name: field for field in dataclasses.fields(Ablation)}
    hints = typing.get_type_hints(Ablation, include_extras=True)
    values, where, problems = {}, dict.fromkeys(fields, title), []
    for binding in layer.bindings:
        place, name = binding.where, binding.parameter
        if binding.name != "Ablation" or binding.scope or not name:
            remedy = "what every arm has goes into Ablation.common, in quotes"
            problems.append(f"{place}: {binding.key}: a plan binds Ablation alone; {remedy}")
        elif name not in fields:
            known = f"; its fields are {', '.join(fields)}"
            problems.append(f"{place}: Ablation has no field {name!r}{suggest(name, fields) or known}")
        elif name in values:
            problems.append(f"{place}: Ablation.{name} is bound twice; the first is at {where[name]}")
        else:
            where[name], values[name] = place, _spelled(binding.value)
            problems += [f"{place}: Ablation.{name}: {reason}" for reason in _misfits(hints[name], values[name])]
    for name, remedy in (("question", "'Which position encoding?'"), ("effect", "0.02, in units of the metric")):
        if name not in values:
            problems.append(f"{title}: Ablation.{name} is not bound; write Ablation.{name} = {remedy}")
    given = [f"Ablation.{of}" for of in BUDGETS if values.get(of) is not None]
    if len(given) != 1:
        held = f"has {len(given)} budgets, {', '.join(given)}" if given else "has no budget"
        problems.append(f"{title}: the plan {held}; give one of steps, tokens, flops, seconds")
    refuse(problems)
    return Ablation(**values), where


def _misfits(hint: object, value: object) -> list[str]:
    """Why a value does not fit an annotation, strictly."""
    if too_large(value):
        return [TOO_LARGE]
    try:
        TypeAdapter(hint, config=STRICT).validate_python(value)
    except ValidationError as error:
        return list(dict.fromkeys(_reason(one) for one in error.errors()))
    return []


def _reason(error: dict) -> str:
    inside = [repr(step) for step in error["loc"] if not re.search(r"[\[(]|^(list|dict|str|function)", str(step))]
    message = error["msg"].removeprefix("Input ").removeprefix("Value ")
    value = error["input"]
    shown = f"{value!r} {message}" if isinstance(value, bool | int | float | str | None) else message
    return f"at {', '.join(inside)}: {shown}" if inside else shown


def _spelled(value: object) -> object:
    """A value with references as their spelling, so that @SwiGLU and '@SwiGLU' are one."""
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    if isinstance(value, dict):
        return {_spelled(key): _spelled(item) for key, item in value.items()}
    return value


def unfold(ablation: Ablation, where: dict[str, str]) -> tuple[list[str], dict[str, Arm]]:
    """The problems that the fields have among themselves, and the arms, the baseline first."""
    problems, arms = [], {}

    def add(name, entries, field):
        place = f"Ablation.{field}: arm {name!r}"
        if not re.fullmatch(NAME, name):
            problems.append(f"{where[field]}: {place}: its runs' folders bear its name: letters, digits and _.+=,@-")
        if name in arms:
            problems.append(f"{where[field]}: {place} is there already; choose another name")
        overlays, bindings = split_entries(entries, where[field], place, problems)
        refuse_settled(bindings, where[field], problems)
        arms[name] = Arm(name, overlays, bindings)

    for name, entries in ablation.arms.items():
        add(name, entries, "arms")
    parts = ablation.leave_one_out
    for absent in [None, *parts] if parts else []:
        entries = [entry for part, given in parts.items() if part != absent for entry in given]
        add(f"without-{absent}" if absent else "all", entries, "leave_one_out")
    for values in itertools.product(*ablation.grid.values()) if ablation.grid else []:
        chosen = dict(zip(ablation.grid, values, strict=True))
        add("-".join(_value_name(*pair) for pair in chosen.items()), [_bound(*p) for p in chosen.items()], "grid")

    baseline = ablation.baseline or next(iter(arms), None)
    if len(arms) < 2:
        problems.append(
            f"{where['arms']}: the plan has {len(arms)} arms; a comparison needs two or more in Ablation.arms"
        )
    elif baseline not in arms:
        known = suggest(baseline, arms) or f"; arms are {', '.join(arms)}"
        problems.append(f"{where['baseline']}: Ablation.baseline = {baseline!r} is none of the arms{known}")
    else:
        arms = {baseline: arms[baseline]} | arms
    return problems + _at_odds(ablation, where, arms), arms


def _at_odds(ablation: Ablation, where: dict[str, str], arms: dict[str, Arm]) -> list[str]:
    """Fields that don't go with each other, or with the arms."""
    problems = []
    try:
        direction(ablation.metric, ablation.higher_is_better)
    except ValueError as error:
        problems.append(f"{where['metric']}: {error}")
    for field_name in ("seeds", "selection_seeds"):
        seeds = getattr(ablation, field_name)
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            listed = ", ".join(map(str, repeated))
            problems.append(
                f"{where[field_name]}: Ablation.{field_name} repeats {listed}: a repeated seed is no new run"
            )
    shared = sorted(set(ablation.seeds) & set(ablation.selection_seeds))
    if shared:
        listed = ", ".join(map(str, shared))
        problems.append(
            f"{where['selection_seeds']}: Ablation.selection_seeds and seeds share {listed}: "
            "what chose the learning rate can't judge it too"
        )
    if bool(ablation.lr_grid) != bool(ablation.selection_seeds):
        problems.append(
            f"{where['lr_grid']}: Ablation.lr_grid and selection_seeds go together: rates are chosen on "
            "seeds that are not judged, such as Ablation.selection_seeds = [100, 101]"
        )
    for name in ("lr_knob", "match_knob"):
        owner = "lr_grid" if name == "lr_knob" else "match"
        if getattr(ablation, name) and not getattr(ablation, owner):
            problems.append(f"{where[name]}: Ablation.{name} goes with Ablation.{owner}")
    for name in ("lr_grid", "lr_knob", "match_knob"):
        value = getattr(ablation, name)
        for arm in value if isinstance(value, dict) else ():
            if arm not in arms:
                problems.append(f"{where[name]}: Ablation.{name}: there is no arm {arm!r}{suggest(arm, arms)}")
    return problems


def split_entries(entries: Sequence[str], place: str, owner: str, problems: list[str]) -> tuple[list[str], list[str]]:
    """Overlays and bindings of a list that holds both."""
    overlays = [entry for entry in entries if entry.endswith(".gin") and "=" not in entry]
    bindings = [entry for entry in entries if "=" in entry]
    for entry in entries:
        if entry not in overlays and entry not in bindings:
            problems.append(
                f"{place}: {owner}: {entry!r} is neither an overlay (gin/norm/rmsnorm.gin) nor a binding "
                f"('GPT.norm = @RMSNorm')"
            )
    return overlays, bindings


def refuse_settled(bindings: list[str], place: str, problems: list[str]) -> None:
    """Add a problem for each binding of what the plan itself settles."""
    for binding in bindings:
        key = binding.split("=")[0].strip()
        if key in SETTLED:
            problems.append(f"{place}: {binding!r}: {key} is set by {SETTLED[key]} of the plan; leave it out here")


def _value_name(key: str, value: object) -> str:
    """How a value of a grid shows in an arm's name: a part by its name, anything else with its knob."""
    text = value.removeprefix("@") if isinstance(value, str) else f"{key.rpartition('.')[2]}{value}"
    return re.sub(r"[^A-Za-z0-9_.+=,@-]+", "_", text).strip("_")


def _bound(key: str, value: object) -> str:
    """A binding of a grid; a string that begins with @ is a reference."""

    def spell(item):
        if isinstance(item, list):
            return "[" + ", ".join(map(spell, item)) + "]"
        return item if isinstance(item, str) and item.startswith("@") else show(item)

    return f"{key} = {spell(value)}"


def refuse(problems: list[str]) -> None:
    """Raise ConfigError where there are problems, a line for each."""
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
