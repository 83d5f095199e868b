"""The plan file: reads the fields of an Ablation from a gin file, checks them, and expands them into arms."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from toolkit.comparison.runs import higher_is_better
from toolkit.config import keys
from toolkit.config.layers import Config, Layer, Reference, raise_problems, show
from toolkit.config.spelling import suggest
from toolkit.config.values import STRICT, TOO_LARGE, too_large

Seeds = list[Annotated[int, Ge(0)]]
Rates = Annotated[list[Annotated[float, Gt(0)]], Len(min_length=1)]
WRITTEN = ("val_full/loss_nats", "val_full/bits_per_byte", "val/loss_nats", "val/bits_per_byte", "train/loss_nats")
BUDGETS = ("steps", "tokens", "flops", "seconds")
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]{0,79}"
SETTLED = {"Experiment.steps": "the budget (Ablation.steps, tokens, flops or seconds)", "Experiment.seed": "the seeds"}


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The fields of a plan file. Each entry of a list is the path of an overlay or a quoted binding.

    question         the question that the plan answers, in one sentence
    arms             {name: entries}; the list of the baseline may be empty
    leave_one_out    {part: entries}: the arm "all" has every part, and "without-PART" all but one
    grid             {key: values}: an arm for each combination, named after its values, such as "SwiGLU-RMSNorm"
    baseline         the arm that the others are compared with; default: the first arm
    common           entries that every arm has; an arm's own entries override them
    factor           patterns of the config keys in which arms may differ; the keys of ``grid`` are added
    metric           a column of metrics.jsonl; its last row counts
    higher_is_better  needed for a metric that neither the toolkit nor an evaluator writes; False if lower is better
    effect           the smallest difference of the metric that matters to you
    looks            numbers of seeds at which the arms are judged, such as [3, 5, 8]; the last is that of all seeds. An
                     arm with a verdict stops there. Default: one look at all seeds
    spending         "obrien-fleming" keeps nearly all of alpha for the last look, "pocock" shares it more evenly
    steps            the training budget of each arm; give one of steps, tokens, flops and seconds
    lr_grid          learning rates to try on ``selection_seeds``, for all arms or {arm: rates}
    lr_knob          the rate's knob, for all arms or {arm: knob}; default: ``lr`` of the arm's optimizer
    match            "params" or "flops" (per token): give every arm as many as the baseline has
    match_knob       the width to change for it, for all arms or {arm: knob}; default: ``hidden`` of the arm's ffn
    match_multiple   widths are multiples of this
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
    looks: list[Annotated[int, Ge(2)]] = field(default_factory=list)
    spending: Literal["obrien-fleming", "pocock"] = "obrien-fleming"
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


@dataclass(frozen=True)
class ArmEntries:
    """One arm as the plan file has it."""

    name: str
    overlays: list[str]
    bindings: list[str]


@dataclass
class Arm:
    """One arm: its entries, its config, and the sizes computed from it."""

    name: str
    overlays: list[str]
    bindings: list[str]
    config: Config
    width: tuple[str, int | None, int] | None = None  # (knob, value or None if kept, count minus the baseline's)
    parameters: int = 0
    flops_per_token: int | None = None
    tokens_per_step: int = 0
    steps: int = 0  # 0 until a budget in seconds is measured
    lr_knob: str | None = None

    @property
    def settled(self) -> list[str]:
        """The arm's bindings in every job: its own, and its matched width."""
        knob, value, _ = self.width or (None, None, 0)
        width = [f"{knob} = {value}"] if value is not None else []
        return [*self.bindings, *width]


def parse(layer: Layer, title: str) -> tuple[Ablation, dict[str, str]]:
    """Build an Ablation from the bindings of a plan file. Returns it with the place (file and line) of each field's
    binding; fields that aren't bound have the place ``title``, the file's name. Raises ConfigError."""
    fields = {field.name: field for field in dataclasses.fields(Ablation)}
    hints = typing.get_type_hints(Ablation, include_extras=True)
    values: dict[str, Any] = {}
    where, problems = dict.fromkeys(fields, title), []
    for binding in layer.bindings:
        place, name = binding.where, binding.parameter
        if binding.name != "Ablation" or binding.scope or not name:
            remedy = "bindings for every arm go into Ablation.common, in quotes"
            problems.append(f"{place}: {binding.key}: a plan binds only Ablation; {remedy}")
        elif name not in fields:
            all_fields = f"; its fields are {', '.join(fields)}"
            problems.append(f"{place}: Ablation has no field {name!r}{suggest(name, fields) or all_fields}")
        elif name in values:
            problems.append(f"{place}: Ablation.{name} is bound twice; the first is at {where[name]}")
        else:
            where[name], values[name] = place, _references_as_text(binding.value)
            problems += [f"{place}: Ablation.{name}: {reason}" for reason in _type_errors(hints[name], values[name])]
    for name, remedy in (("question", "'Which position encoding?'"), ("effect", "0.02, in units of the metric")):
        if name not in values:
            problems.append(f"{title}: Ablation.{name} is not bound; write Ablation.{name} = {remedy}")
    budgets = [f"Ablation.{unit}" for unit in BUDGETS if values.get(unit) is not None]
    if len(budgets) != 1:
        found_budgets = f"has {len(budgets)} budgets, {', '.join(budgets)}" if budgets else "has no budget"
        problems.append(f"{title}: the plan {found_budgets}; give one of steps, tokens, flops, seconds")
    raise_problems(problems)
    return Ablation(**values), where


def _type_errors(hint: Any, value: object) -> list[str]:
    """Reasons why a value does not fit a type annotation, with pydantic's strict rules; empty if it fits."""
    if too_large(value):
        return [TOO_LARGE]
    try:
        TypeAdapter(hint, config=STRICT).validate_python(value)
    except ValidationError as error:
        return list(dict.fromkeys(_describe_error(one) for one in error.errors()))
    return []


def _describe_error(error: ErrorDetails) -> str:
    """An error of pydantic in words, with the place in the value where it is."""
    path = [repr(step) for step in error["loc"] if not re.search(r"[\[(]|^(list|dict|str|function)", str(step))]
    message = error["msg"].removeprefix("Input ").removeprefix("Value ")
    value = error["input"]
    description = f"{value!r} {message}" if isinstance(value, bool | int | float | str | None) else message
    return f"at {', '.join(path)}: {description}" if path else description


def _references_as_text(value: object) -> object:
    """The value with every reference replaced by its text, so that @SwiGLU and '@SwiGLU' mean the same."""
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, list | tuple):
        return [_references_as_text(item) for item in value]
    if isinstance(value, dict):
        return {_references_as_text(key): _references_as_text(item) for key, item in value.items()}
    return value


def unfold(ablation: Ablation, where: dict[str, str]) -> tuple[list[str], dict[str, ArmEntries]]:
    """Expand ``arms``, ``leave_one_out`` and ``grid`` into arms, the baseline first. Returns (problems, arms), where
    the problems include fields that contradict each other."""
    problems: list[str] = []
    arms: dict[str, ArmEntries] = {}

    def add(name: str, entries: list[str], field: str) -> None:
        place = f"Ablation.{field}: arm {name!r}"
        if not re.fullmatch(NAME, name):
            problems.append(
                f"{where[field]}: {place}: its runs' folders are named after it, so a name is 1 to 80 letters of the "
                "English alphabet, digits and the characters _.+=,@- and begins with a letter, a digit or _"
            )
        if name in arms:
            problems.append(f"{where[field]}: {place} already exists; choose another name")
        overlays, bindings = split_entries(entries, where[field], place, problems)
        check_bindings(bindings, where[field], problems)
        arms[name] = ArmEntries(name, overlays, bindings)

    for name, entries in ablation.arms.items():
        add(name, entries, "arms")
    parts = ablation.leave_one_out
    for absent in [None, *parts] if parts else []:
        entries = [entry for part, part_entries in parts.items() if part != absent for entry in part_entries]
        add(f"without-{absent}" if absent else "all", entries, "leave_one_out")
    for values in itertools.product(*ablation.grid.values()) if ablation.grid else []:
        chosen = list(zip(ablation.grid, values, strict=True))
        add("-".join(_name_of_value(*pair) for pair in chosen), [_as_binding(*pair) for pair in chosen], "grid")

    baseline = ablation.baseline or next(iter(arms), "")
    if len(arms) < 2:
        problems.append(
            f"{where['arms']}: the plan has {len(arms)} arms; a comparison needs two or more in Ablation.arms"
        )
    elif baseline not in arms:
        known = suggest(baseline, arms) or f"; arms are {', '.join(arms)}"
        problems.append(f"{where['baseline']}: Ablation.baseline = {baseline!r} is not an arm{known}")
    else:
        arms = {baseline: arms[baseline]} | arms
    return problems + _contradictions(ablation, where, arms), arms


def _contradictions(ablation: Ablation, where: dict[str, str], arms: dict[str, ArmEntries]) -> list[str]:
    """Problems with fields that contradict each other or name an unknown arm."""
    problems = []
    family, families = ablation.metric.partition("/")[0], {metric.partition("/")[0] for metric in WRITTEN}
    if ablation.higher_is_better is None and family in families and ablation.metric not in WRITTEN:
        hint = suggest(ablation.metric, WRITTEN) or f"; a run measures {', '.join(WRITTEN)}"
        problems.append(f"{where['metric']}: Ablation.metric = {ablation.metric!r} is not measured{hint}")
    elif ablation.higher_is_better and ablation.metric in WRITTEN:
        problems.append(
            f"{where['higher_is_better']}: Ablation.higher_is_better = True, but {ablation.metric} is a loss, and "
            "lower is better; leave it out"
        )
    elif family != "eval":  # an evaluator says which direction is better
        try:
            higher_is_better(ablation.metric, ablation.higher_is_better)
        except ValueError as error:
            problems.append(f"{where['metric']}: {error}")
    for field_name in ("seeds", "selection_seeds"):
        seeds = getattr(ablation, field_name)
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            listed = ", ".join(map(str, repeated))
            problems.append(
                f"{where[field_name]}: Ablation.{field_name} repeats {listed}: a repeated seed gives no new run"
            )
    problems += _wrong_looks(ablation, where)
    shared = sorted(set(ablation.seeds) & set(ablation.selection_seeds))
    if shared:
        listed = ", ".join(map(str, shared))
        problems.append(
            f"{where['selection_seeds']}: Ablation.selection_seeds and seeds share {listed}: "
            "the seeds that choose the learning rate can't judge it too"
        )
    if bool(ablation.lr_grid) != bool(ablation.selection_seeds):
        problems.append(
            f"{where['lr_grid']}: Ablation.lr_grid and selection_seeds go together: rates are chosen on "
            "seeds that are not judged, such as Ablation.selection_seeds = [100, 101]"
        )
    for name in ("lr_knob", "match_knob"):
        owner = "lr_grid" if name == "lr_knob" else "match"
        if getattr(ablation, name) and not getattr(ablation, owner):
            problems.append(f"{where[name]}: Ablation.{name} needs Ablation.{owner}")
    for name in ("lr_grid", "lr_knob", "match_knob"):
        value = getattr(ablation, name)
        for arm in value if isinstance(value, dict) else ():
            if arm not in arms:
                problems.append(f"{where[name]}: Ablation.{name}: arm not found: {arm!r}{suggest(arm, arms)}")
    return problems


def _wrong_looks(ablation: Ablation, where: dict[str, str]) -> list[str]:
    looks, seeds = ablation.looks, len(ablation.seeds)
    if not looks:
        default = "obrien-fleming"
        return [] if ablation.spending == default else [f"{where['spending']}: Ablation.spending needs Ablation.looks"]
    problem = ""
    if any(late <= early for early, late in zip(looks, looks[1:], strict=False)):
        problem = "the numbers of seeds must increase"
    elif looks[-1] != seeds:
        problem = f"the last look must be at all {seeds} seeds of Ablation.seeds"
    return [f"{where['looks']}: Ablation.looks = {looks}: {problem}"] if problem else []


def split_entries(entries: Sequence[str], place: str, owner: str, problems: list[str]) -> tuple[list[str], list[str]]:
    """Split a list of entries into (overlays, bindings); add a problem for each entry that is neither."""
    overlays = [entry for entry in entries if entry.endswith(".gin") and "=" not in entry]
    bindings = [entry for entry in entries if "=" in entry]
    for entry in entries:
        if entry not in overlays and entry not in bindings:
            problems.append(
                f"{place}: {owner}: {entry!r} is neither an overlay (gin/norm/rmsnorm.gin) nor a binding "
                f"('GPT.norm = @RMSNorm')"
            )
    return overlays, bindings


def check_bindings(bindings: list[str], place: str, problems: list[str]) -> None:
    """Add a problem for each binding of a key that the plan itself sets, such as the seed."""
    for binding in bindings:
        key = keys.bound_by(binding)
        if key in SETTLED:
            problems.append(f"{place}: {binding!r}: {key} is set by {SETTLED[key]} of the plan; leave it out here")


def _name_of_value(key: str, value: object) -> str:
    """A grid value as part of an arm's name: "SwiGLU" for a part, else knob and value, such as "hidden64"."""
    text = value.removeprefix("@") if isinstance(value, str) else f"{keys.split(key).knob}{value}"
    return re.sub(r"[^A-Za-z0-9_.+=,@-]+", "_", text).strip("_")


def _as_binding(key: str, value: object) -> str:
    """The binding of one grid value. A string that begins with @ is a reference."""

    def spelling(item: object) -> str:
        if isinstance(item, list):
            return "[" + ", ".join(map(spelling, item)) + "]"
        return item if isinstance(item, str) and item.startswith("@") else show(item)

    return f"{key} = {spelling(value)}"
