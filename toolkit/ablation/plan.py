"""The plan of an ablation: arms composed, compared, matched and counted, and the jobs they make. Nothing trains."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.ablation import match
from toolkit.ablation.planfile import BUDGETS, Ablation, Arm, parse, refuse, refuse_settled, split_entries, unfold
from toolkit.compose import load_shelf
from toolkit.config.guard import resolve, suggest
from toolkit.config.layers import BASE, ConfigError, Layer, find, show
from toolkit.config.safety import read_bindings, read_file
from toolkit.experiment import build_blank
from toolkit.output.errors import clean
from toolkit.registry import CATALOG
from toolkit.rundir import facts


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
    ablation, where = parse(layer, str(path))
    problems, arms = unfold(ablation, where)
    overlays, bindings = split_entries(ablation.common, where["common"], "Ablation.common", problems)
    refuse_settled(bindings, where["common"], problems)
    refuse(problems)
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
    refuse(problems)
    plan.confounds = _confounds(plan, where, problems)
    _match(plan, where, problems)
    refuse(problems)
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
            build_blank(arm.config.build())
        except ValueError as error:
            for line in clean(error).splitlines():
                found.setdefault(line, []).append(arm.name)
    refuse(
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
    model = build_blank(experiment).model
    arm.parameters = facts.parameters(model)["total"]
    arm.flops_per_token = facts.on_meta(facts.flops_per_token, model, experiment.seq_len)
    arm.tokens_per_step = experiment.batch_size * experiment.seq_len
