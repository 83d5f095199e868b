"""The plan of an ablation: a gin file of one object, read, checked, and unfolded into arms and jobs. Nothing trains."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Len
from pydantic import TypeAdapter, ValidationError

from toolkit import facts, match
from toolkit.command import clean
from toolkit.compose import load_shelf
from toolkit.config import BASE, Config, ConfigError, Layer, Reference, find, show
from toolkit.guard import STRICT, resolve, suggest
from toolkit.registry import CATALOG
from toolkit.safety import read_bindings, read_file
from toolkit.train import build

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
    metric           of the last row of metrics.jsonl; lower is better
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
    alpha: Annotated[float, Gt(0), Le(0.5)] = 0.05
    steps: Annotated[int, Gt(0)] | None = None
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


@dataclass(frozen=True)
class Job:
    """One run: an arm at a seed. ``lr`` is None where there is no grid, or where it is chosen on other seeds first."""

    arm: str
    seed: int
    lr: float | None
    run: str
    purpose: Literal["judged", "selection"]


@dataclass
class Plan:
    """A plan that can run: arms composed and counted. ``confounds`` says in what arms differ beyond the factor."""

    path: Path
    name: str
    ablation: Ablation
    common: Layer
    common_overlays: list[str]
    common_bindings: list[str]
    arms: dict[str, Arm]  # the baseline first
    rates: dict[str, list[float]]  # empty without a grid
    confounds: list[str]
    sha256: str

    @property
    def baseline(self) -> Arm:
        return next(iter(self.arms.values()))

    @property
    def factor(self) -> list[str]:
        return list(dict.fromkeys([*self.ablation.factor, *self.ablation.grid]))

    @property
    def budget(self) -> tuple[str, float]:
        return next((of, getattr(self.ablation, of)) for of in BUDGETS if getattr(self.ablation, of) is not None)

    @property
    def jobs(self) -> list[Job]:
        """Every job, seed by seed with all arms of each, so that an early stop leaves the arms equally far."""
        jobs = []
        for seed in self.ablation.selection_seeds if self.rates else ():
            for place in range(len(self.rates[self.baseline.name])):
                for arm in self.arms:
                    rate = self.rates[arm][place]
                    jobs.append(Job(arm, seed, rate, f"{arm}-s{seed}-lr{rate:g}", "selection"))
        return jobs + [Job(arm, s, None, f"{arm}-s{s}", "judged") for s in self.ablation.seeds for arm in self.arms]

    def bindings(self, job: Job, lr: float | None) -> list[str]:
        """What a job's command line binds: the arm's own, and what the plan settles."""
        arm = self.arms[job.arm]
        rate = [f"{arm.lr_knob} = {lr!r}"] if lr is not None else []
        return [*arm.settled, *rate, f"Experiment.steps = {arm.steps}", f"Experiment.seed = {job.seed}"]

    def flat(self, job: Job, lr: float | None) -> dict[str, object]:
        """The config that a job's facts.json should hold."""
        arm = self.arms[job.arm]
        layers = [*_base_layers(self.common_overlays, self.common), *map(read_file, arm.overlays)]
        return resolve([*layers, read_bindings(self.bindings(job, lr))]).flat

    def set_steps(self, seconds_per_step: dict[str, float] | None = None, known: dict[str, int] | None = None) -> None:
        """Turn the budget into each arm's steps; ``known`` ones stay as they are. Raises ConfigError."""
        of, amount = self.budget
        for arm in self.arms.values():
            if of == "flops" and not arm.flops_per_token:
                raise ConfigError(f"Ablation.flops: the FLOPs of arm {arm.name!r} are not known; use Ablation.steps")
            cost = {
                "steps": 1,
                "tokens": arm.tokens_per_step,
                "flops": arm.tokens_per_step * (arm.flops_per_token or 0),
                "seconds": (seconds_per_step or {}).get(arm.name),
            }[of]
            if cost:
                arm.steps = (known or {}).get(arm.name) or round(amount / cost)
                if arm.steps < 1:
                    raise ConfigError(f"Ablation.{of} = {amount:g} is less than half a step of arm {arm.name!r}")


def read(path: str | Path) -> Plan:
    """Read a plan, compose and check every arm, and solve for matched widths. Steps are set but for a budget in
    seconds, which has to be measured. Raises ConfigError, a line for each problem."""
    load_shelf()
    layer = read_file(path)
    ablation, where = _ablation(layer, str(path))
    problems, arms = _unfold(ablation, where)
    overlays, bindings = _entries(ablation.common, where["common"], "Ablation.common", problems)
    _settled(bindings, where["common"], problems)
    _raise(problems)
    common = dataclasses.replace(_layer("Ablation.common", bindings, where["common"]), imports=layer.imports)
    _compose(arms, overlays, common, where)
    file = Path(find(path))
    plan = Plan(
        path=file,
        name=file.resolve().parent.name + ("" if file.stem == "plan" else f"-{file.stem}"),
        ablation=ablation,
        common=common,
        common_overlays=overlays,
        common_bindings=bindings,
        arms=arms,
        rates=_rates(ablation, arms, where, problems),
        confounds=[],
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    _known_factors(plan, where["factor"], problems)
    _raise(problems)
    plan.confounds = _confounds(plan, where, problems)
    _match(plan, where, problems)
    _raise(problems)
    for arm in arms.values():
        _count(arm)
    plan.set_steps()
    return plan


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The config keys that differ. Knobs of a part that only one side builds follow from the slot that names it, and
    are no difference of their own."""
    parts = [{key.rpartition(".")[0] for key in flat} for flat in (one, other)]
    both = [key for key in {**one, **other} if key.rpartition(".")[0] in parts[0] & parts[1]]
    return [key for key in both if one.get(key, "absent") != other.get(key, "absent")]


def beyond(factor: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The keys that no pattern of the factor covers."""
    patterns = list(factor)
    return [key for key in keys if not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]


def _ablation(layer: Layer, title: str) -> tuple[Ablation, dict[str, str]]:
    """The plan's object, and where each field is bound. Raises ConfigError."""
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
    _raise(problems)
    return Ablation(**values), where


def _misfits(hint: object, value: object) -> list[str]:
    """Why a value does not fit an annotation, strictly."""
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


def _unfold(ablation: Ablation, where: dict[str, str]) -> tuple[list[str], dict[str, Arm]]:
    """The problems that the fields have among themselves, and the arms, the baseline first."""
    problems, arms = [], {}

    def add(name, entries, field):
        place = f"Ablation.{field}: arm {name!r}"
        if not re.fullmatch(NAME, name):
            problems.append(f"{where[field]}: {place}: its runs' folders bear its name: letters, digits and _.+=,@-")
        if name in arms:
            problems.append(f"{where[field]}: {place} is there already; choose another name")
        overlays, bindings = _entries(entries, where[field], place, problems)
        _settled(bindings, where[field], problems)
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
    return problems, arms


def _entries(entries: Sequence[str], place: str, owner: str, problems: list[str]) -> tuple[list[str], list[str]]:
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


def _settled(bindings: list[str], place: str, problems: list[str]) -> None:
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


def _layer(title: str, bindings: Sequence[str], place: str) -> Layer:
    """Bindings in quotes as a layer whose problems are found in the plan."""
    try:
        layer = read_bindings(bindings)
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix('-p ')}") from error
    written = [dataclasses.replace(b, where=f"{place}: {b.where.removeprefix('-p ')}") for b in layer.bindings]
    return Layer(title, written, layer.imports)


def _base_layers(overlays: Sequence[str], common: Layer) -> list[Layer]:
    return [read_file(BASE), *map(read_file, overlays), *([common] if common.bindings or common.imports else [])]


def _compose(arms: dict[str, Arm], overlays: list[str], common: Layer, where: dict[str, str]) -> None:
    """Each arm's config; a problem that all arms have is told once."""
    found: dict[str, list[str]] = {}
    below = _base_layers(overlays, common)
    for arm in arms.values():
        try:
            own = [_layer(f"arm {arm.name!r}", arm.bindings, where["arms"])] if arm.bindings else []
            arm.config = resolve([*below, *map(read_file, arm.overlays), *own])
            build(arm.config.build(), torch.device("meta"))
        except (NotImplementedError, RuntimeError):
            pass  # a part that computes with values while it is built; the run builds it in full
        except ValueError as error:
            for line in clean(error).splitlines():
                found.setdefault(line, []).append(arm.name)
    _raise(
        [
            line if len(names) == len(arms) else f"arm {', '.join(map(repr, names))}: {line}"
            for line, names in found.items()
        ]
    )


def _known_factors(plan: Plan, place: str, problems: list[str]) -> None:
    """A pattern of the factor that names nothing is a typo."""
    keys = {key for arm in plan.arms.values() for key in arm.config.flat}
    for pattern in plan.factor:
        if beyond([pattern], keys) == list(keys) and pattern.rpartition(".")[0].rpartition("/")[2] not in CATALOG:
            problems.append(f"{place}: Ablation.factor: no arm has a config key {pattern!r}{suggest(pattern, keys)}")
        elif beyond([pattern], keys) == list(keys) and not pattern.endswith("*"):
            problems.append(f"{place}: Ablation.factor: no arm has a config key {pattern!r}{suggest(pattern, keys)}")


def _confounds(plan: Plan, where: dict[str, str], problems: list[str]) -> list[str]:
    """Differences beyond the factor, a line for each arm; arms that are the same config are problems."""
    lines, stray, seen = [], [], {}
    base = plan.baseline.config.flat
    allowed = [*plan.factor, *_knobs_of(plan.ablation.lr_knob), *_knobs_of(plan.ablation.match_knob)]
    for arm in plan.arms.values():
        flat = arm.config.flat
        same = next((name for name, other in seen.items() if other == flat), None)
        seen[arm.name] = flat
        if same:
            other = "the baseline" if same == plan.baseline.name else "arm"
            problems.append(f"{where['arms']}: arm {arm.name!r} does not differ from {other} {same!r} at all")
        keys = beyond(allowed, differing(base, flat))
        stray += keys
        told = "; ".join(f"{key}: {base.get(key, 'absent')} there, {flat.get(key, 'absent')} here" for key in keys)
        if keys:
            lines.append(
                f"{where['arms']}: arm {arm.name!r} is confounded, it differs from the baseline "
                f"{plan.baseline.name!r} beyond the factor: {told}"
            )
    if lines:
        whole = show(list(dict.fromkeys([*plan.factor, *stray])))
        lines.append(
            f"give all arms the same values (in Ablation.common), or, if these are the question: "
            f"Ablation.factor = {whole}"
        )
    return lines


def _knobs_of(value: str | dict[str, str] | None) -> list[str]:
    return list(value.values()) if isinstance(value, dict) else [value] if value else []


def _knob(given: str | dict[str, str] | None, arm: Arm, kind: str, knob: str, field_name: str) -> str:
    """A knob of an arm: as the plan says, or that of the one part of its kind. Raises ConfigError."""
    named = given.get(arm.name) if isinstance(given, dict) else given
    if named:
        if named not in arm.config.flat:
            near = suggest(named, arm.config.flat)
            raise ConfigError(f"Ablation.{field_name}: arm {arm.name!r} has no knob {named!r}{near}")
        return named
    found = [
        f"{scope}/{name}.{knob}".lstrip("/")
        for (scope, name), knobs in arm.config.parts.items()
        if CATALOG[name].kind == kind and knob in knobs
    ]
    if len(found) != 1:
        held = f"several: {', '.join(found)}" if found else "none"
        raise ConfigError(
            f"Ablation.{field_name}: which knob? arm {arm.name!r} has {held} of a {kind}; "
            f"write Ablation.{field_name} = {{{arm.name!r}: 'Part.{knob}'}}"
        )
    return found[0]


def _rates(ablation: Ablation, arms: dict[str, Arm], where, problems: list[str]) -> dict[str, list[float]]:
    """Each arm's learning rates; every arm gets as many tries as any other."""
    grid, place = ablation.lr_grid, where["lr_grid"]
    if not grid:
        return {}
    rates = {arm: grid.get(arm, []) if isinstance(grid, dict) else grid for arm in arms}
    sizes = {arm: len(given) for arm, given in rates.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
        problems.append(
            f"{place}: Ablation.lr_grid: arms have unequal numbers of rates ({listed}): give all as many tries"
        )
    for arm, given in rates.items():
        if len({f"{rate:g}" for rate in given}) < len(given):
            problems.append(f"{place}: Ablation.lr_grid: arm {arm!r} has a rate twice")
        try:
            arms[arm].lr_knob = _knob(ablation.lr_knob, arms[arm], "optimizer", "lr", "lr_knob")
        except ConfigError as error:
            problems.append(f"{where['lr_knob']}: {error}")
            continue
        if any(binding.split("=")[0].strip() == arms[arm].lr_knob for binding in arms[arm].bindings):
            problems.append(f"{place}: arm {arm!r} binds {arms[arm].lr_knob}, which Ablation.lr_grid sets")
    return rates


def _match(plan: Plan, where: dict[str, str], problems: list[str]) -> None:
    """Solve each arm's width for the baseline's count; an arm that has it already stays as it is."""
    of, below = plan.ablation.match, _base_layers(plan.common_overlays, plan.common)
    if of is None:
        return
    target = match.count(plan.baseline.config, of)
    for arm in plan.arms.values():
        try:
            knob = _knob(plan.ablation.match_knob, arm, "ffn", "hidden", "match_knob")
            if any(binding.split("=")[0].strip() == knob for binding in arm.bindings) and arm is not plan.baseline:
                raise ConfigError(f"arm {arm.name!r} binds {knob}, which Ablation.match solves for; leave it out there")
            arm.width = (knob, None, match.count(arm.config, of) - target)
            if arm.width[2] == 0:
                continue
            layers = [*below, *map(read_file, arm.overlays)]

            def config(width, layers=layers, arm=arm, knob=knob):
                return resolve([*layers, read_bindings([*arm.bindings, f"{knob} = {width}"])])

            now = arm.config.flat[knob]
            width, residual = match.solve(
                lambda value, at=config: match.count(at(value), of),
                target,
                plan.ablation.match_multiple,
                now if isinstance(now, int) else 64,
            )
            arm.width, arm.config = (knob, width, residual), config(width)
        except ValueError as error:
            problems.append(f"{where['match']}: Ablation.match: arm {arm.name!r}: {clean(error)}")


def _count(arm: Arm) -> None:
    """What the arm's config comes to."""
    experiment = arm.config.build()
    try:
        model = build(experiment, torch.device("meta")).model
    except (NotImplementedError, RuntimeError):
        model = build(experiment, torch.device("cpu")).model
    arm.parameters = facts.parameters(model)["total"]
    arm.flops_per_token = facts.on_meta(facts.flops_per_token, model, experiment.seq_len)
    arm.tokens_per_step = experiment.batch_size * experiment.seq_len


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
