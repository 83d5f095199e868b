"""The plan of an ablation: composes, compares, matches and counts the arms, and lists their jobs. Trains nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.ablation import match
from toolkit.ablation.planfile import (
    BUDGETS,
    Ablation,
    Arm,
    check_bindings,
    parse,
    split_entries,
    unfold,
)
from toolkit.compose import load_shelf
from toolkit.config import keys
from toolkit.config.guard import resolve
from toolkit.config.layers import BASE, ConfigError, Layer, find, raise_problems, show
from toolkit.config.safety import read_bindings, read_file
from toolkit.config.spelling import suggest
from toolkit.experiment import build_blank
from toolkit.output.errors import clean
from toolkit.registry import CATALOG
from toolkit.rundir import facts


@dataclass(frozen=True)
class Job:
    """One run: an arm at a seed. ``lr`` is None without a learning-rate grid, and for judged jobs, whose rate is chosen
    on the selection seeds first."""

    arm: str
    seed: int
    lr: float | None
    run: str
    purpose: Literal["judged", "selection"]


@dataclass
class Plan:
    """A checked plan, with its arms composed and counted. ``confounds`` are sentences about differences between arms
    that the factor does not cover."""

    path: Path
    name: str
    ablation: Ablation
    common: Layer
    common_overlays: list[str]
    common_bindings: list[str]
    arms: dict[str, Arm]  # the baseline first
    rates: dict[str, list[float]]  # learning rates to try for each arm; empty without a grid
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
        return next(
            (unit, getattr(self.ablation, unit)) for unit in BUDGETS if getattr(self.ablation, unit) is not None
        )

    @property
    def jobs(self) -> list[Job]:
        """Every job, ordered by seed, then by arm: after an early stop all arms have about the same number of runs."""
        jobs = []
        for seed in self.ablation.selection_seeds if self.rates else ():
            for index in range(len(self.rates[self.baseline.name])):
                for arm in self.arms:
                    rate = self.rates[arm][index]
                    jobs.append(Job(arm, seed, rate, f"{arm}-s{seed}-lr{rate:g}", "selection"))
        return jobs + [Job(arm, s, None, f"{arm}-s{s}", "judged") for s in self.ablation.seeds for arm in self.arms]

    def bindings(self, job: Job, lr: float | None) -> list[str]:
        """The bindings on a job's command line: the arm's own, the learning rate, the steps and the seed."""
        arm = self.arms[job.arm]
        rate = [f"{arm.lr_knob} = {lr!r}"] if lr is not None else []
        return [*arm.settled, *rate, f"Experiment.steps = {arm.steps}", f"Experiment.seed = {job.seed}"]

    def flat(self, job: Job, lr: float | None) -> dict[str, object]:
        """The flat config that a job's facts.json should hold."""
        arm = self.arms[job.arm]
        layers = [*_base_layers(self.common_overlays, self.common), *map(read_file, arm.overlays)]
        return resolve([*layers, read_bindings(self.bindings(job, lr))]).flat

    def set_steps(
        self, seconds_per_step: dict[str, float] | None = None, known_steps: dict[str, int] | None = None
    ) -> None:
        """Set each arm's steps from the budget. ``known_steps`` are kept as they are. A budget in seconds needs
        ``seconds_per_step``: arms without one keep their steps. Raises ConfigError."""
        unit, amount = self.budget
        for arm in self.arms.values():
            if unit == "flops" and not arm.flops_per_token:
                raise ConfigError(f"Ablation.flops: the FLOPs of arm {arm.name!r} are not known; use Ablation.steps")
            cost = {
                "steps": 1,
                "tokens": arm.tokens_per_step,
                "flops": arm.tokens_per_step * (arm.flops_per_token or 0),
                "seconds": (seconds_per_step or {}).get(arm.name),
            }[unit]
            if cost:
                arm.steps = (known_steps or {}).get(arm.name) or round(amount / cost)
                if arm.steps < 1:
                    raise ConfigError(f"Ablation.{unit} = {amount:g} is less than half a step of arm {arm.name!r}")


def read(path: str | Path) -> Plan:
    """Read a plan file, compose and check every arm, and find the matched widths. Steps are set too, except for a
    budget in seconds, which has to be measured first. Raises ConfigError with one line for each problem."""
    load_shelf()
    layer = read_file(path)
    ablation, where = parse(layer, str(path))
    problems, arms = unfold(ablation, where)
    overlays, bindings = split_entries(ablation.common, where["common"], "Ablation.common", problems)
    check_bindings(bindings, where["common"], problems)
    raise_problems(problems)
    common = dataclasses.replace(_layer("Ablation.common", bindings, where["common"]), imports=layer.imports)
    _compose_arms(arms, overlays, common, where)
    file = Path(find(path))
    plan = Plan(
        path=file,
        name=file.resolve().parent.name + ("" if file.stem == "plan" else f"-{file.stem}"),
        ablation=ablation,
        common=common,
        common_overlays=overlays,
        common_bindings=bindings,
        arms=arms,
        rates=_learning_rates(ablation, arms, where, problems),
        confounds=[],
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    _check_factor(plan, where["factor"], problems)
    raise_problems(problems)
    plan.confounds = _find_confounds(plan, where, problems)
    _match_widths(plan, where, problems)
    raise_problems(problems)
    for arm in arms.values():
        _count_costs(arm)
    plan.set_steps()
    return plan


def _layer(title: str, bindings: Sequence[str], place: str) -> Layer:
    """Turn the plan's quoted bindings into a layer. Problems with it name ``place``, the line in the plan."""
    try:
        layer = read_bindings(bindings)
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix('-p ')}") from error
    bindings_of_plan = [dataclasses.replace(b, where=f"{place}: {b.where.removeprefix('-p ')}") for b in layer.bindings]
    return Layer(title, bindings_of_plan, layer.imports)


def _base_layers(overlays: Sequence[str], common: Layer) -> list[Layer]:
    return [read_file(BASE), *map(read_file, overlays), *([common] if common.bindings or common.imports else [])]


def _compose_arms(arms: dict[str, Arm], overlays: list[str], common: Layer, where: dict[str, str]) -> None:
    """Compose and build each arm's config. Raises ConfigError; a problem that all arms share is reported once."""
    arms_by_problem: dict[str, list[str]] = {}
    base_layers = _base_layers(overlays, common)
    for arm in arms.values():
        try:
            own_layers = [_layer(f"arm {arm.name!r}", arm.bindings, where["arms"])] if arm.bindings else []
            arm.config = resolve([*base_layers, *map(read_file, arm.overlays), *own_layers])
            build_blank(arm.config.build())
        except ValueError as error:
            for line in clean(error).splitlines():
                arms_by_problem.setdefault(line, []).append(arm.name)
    raise_problems(
        [
            line if len(names) == len(arms) else f"arm {', '.join(map(repr, names))}: {line}"
            for line, names in arms_by_problem.items()
        ]
    )


def _check_factor(plan: Plan, place: str, problems: list[str]) -> None:
    """Add a problem for each pattern of the factor that matches no config key: it is probably a typo. ``Part.*`` may
    name a part that no arm builds."""
    known = {key for arm in plan.arms.values() for key in arm.config.flat}
    for pattern in plan.factor:
        is_whole_part = pattern.endswith("*") and keys.split(pattern).part in CATALOG
        if not is_whole_part and not any(keys.matches(key, [pattern]) for key in known):
            problems.append(f"{place}: Ablation.factor: no arm has a config key {pattern!r}{suggest(pattern, known)}")


def _find_confounds(plan: Plan, where: dict[str, str], problems: list[str]) -> list[str]:
    """The arms' differences beyond the factor, one line for each arm. Adds a problem for each arm whose config equals
    that of another arm."""
    lines, confounding_keys, configs = [], [], {}
    base = plan.baseline.config.flat
    allowed = [*plan.factor, *_listed_knobs(plan.ablation.lr_knob), *_listed_knobs(plan.ablation.match_knob)]
    for arm in plan.arms.values():
        flat = arm.config.flat
        same = next((name for name, other in configs.items() if not keys.differences(other, flat)), None)
        configs[arm.name] = flat
        if same:
            other = "the baseline" if same == plan.baseline.name else "arm"
            problems.append(f"{where['arms']}: arm {arm.name!r} does not differ from {other} {same!r} at all")
        differences = keys.independent_differences(base, flat).items()
        confounds = {key: pair for key, pair in differences if not keys.matches(key, allowed)}
        confounding_keys += confounds
        listed = "; ".join(f"{key}: {before} there, {now} here" for key, (before, now) in confounds.items())
        if confounds:
            lines.append(
                f"{where['arms']}: arm {arm.name!r} is confounded, it differs from the baseline "
                f"{plan.baseline.name!r} beyond the factor: {listed}"
            )
    if lines:
        wider_factor = show(list(dict.fromkeys([*plan.factor, *confounding_keys])))
        lines.append(
            f"give all arms the same values (in Ablation.common), or, if these are the question: "
            f"Ablation.factor = {wider_factor}"
        )
    return lines


def _listed_knobs(value: str | dict[str, str] | None) -> list[str]:
    return list(value.values()) if isinstance(value, dict) else [value] if value else []


def _find_knob(chosen: str | dict[str, str] | None, arm: Arm, kind: str, knob: str, field_name: str) -> str:
    """The key of an arm's knob: the plan's choice, or ``knob`` of the arm's only part of that kind. Raises ConfigError
    if the chosen knob does not exist, or if there is no choice and not exactly one such part."""
    chosen_knob = chosen.get(arm.name) if isinstance(chosen, dict) else chosen
    if chosen_knob:
        if chosen_knob not in arm.config.flat:
            suggestion = suggest(chosen_knob, arm.config.flat)
            raise ConfigError(f"Ablation.{field_name}: arm {arm.name!r} has no knob {chosen_knob!r}{suggestion}")
        return chosen_knob
    candidates = [
        keys.spell(name, knob, scope)
        for (scope, name), knobs in arm.config.parts.items()
        if CATALOG[name].kind == kind and knob in knobs
    ]
    if len(candidates) != 1:
        found_text = f"several: {', '.join(candidates)}" if candidates else "none"
        raise ConfigError(
            f"Ablation.{field_name}: which knob? arm {arm.name!r} has {found_text} of a {kind}; "
            f"write Ablation.{field_name} = {{{arm.name!r}: 'Part.{knob}'}}"
        )
    return candidates[0]


def _learning_rates(
    ablation: Ablation, arms: dict[str, Arm], where: dict[str, str], problems: list[str]
) -> dict[str, list[float]]:
    """The learning rates to try for each arm; sets ``lr_knob`` of each arm. Adds a problem if the arms have unequal
    numbers of rates."""
    grid, where_grid = ablation.lr_grid, where["lr_grid"]
    if not grid:
        return {}
    rates = {arm: grid.get(arm, []) if isinstance(grid, dict) else grid for arm in arms}
    sizes = {arm: len(arm_rates) for arm, arm_rates in rates.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
        problems.append(
            f"{where_grid}: Ablation.lr_grid: arms have unequal numbers of rates ({listed}): give all as many tries"
        )
    for arm, arm_rates in rates.items():
        if len({f"{rate:g}" for rate in arm_rates}) < len(arm_rates):
            problems.append(f"{where_grid}: Ablation.lr_grid: arm {arm!r} has a rate twice")
        try:
            arms[arm].lr_knob = _find_knob(ablation.lr_knob, arms[arm], "optimizer", "lr", "lr_knob")
        except ConfigError as error:
            problems.append(f"{where['lr_knob']}: {error}")
            continue
        if any(keys.bound_by(binding) == arms[arm].lr_knob for binding in arms[arm].bindings):
            problems.append(f"{where_grid}: arm {arm!r} binds {arms[arm].lr_knob}, which Ablation.lr_grid sets")
    return rates


def _match_widths(plan: Plan, where: dict[str, str], problems: list[str]) -> None:
    """Find the width that gives each arm the baseline's count. An arm that already has this count is not changed."""
    quantity, base_layers = plan.ablation.match, _base_layers(plan.common_overlays, plan.common)
    if quantity is None:
        return
    target = match.count(plan.baseline.config, quantity)
    for arm in plan.arms.values():
        try:
            knob = _find_knob(plan.ablation.match_knob, arm, "ffn", "hidden", "match_knob")
            if any(keys.bound_by(binding) == knob for binding in arm.bindings) and arm is not plan.baseline:
                raise ConfigError(f"arm {arm.name!r} binds {knob}, which Ablation.match solves for; leave it out there")
            arm.width = (knob, None, match.count(arm.config, quantity) - target)
            if arm.width[2] == 0:
                continue
            layers = [*base_layers, *map(read_file, arm.overlays)]

            def config_with(width, layers=layers, arm=arm, knob=knob):
                return resolve([*layers, read_bindings([*arm.bindings, f"{knob} = {width}"])])

            current = arm.config.flat[knob]
            width, residual = match.solve(
                lambda value, config_at=config_with: match.count(config_at(value), quantity),
                target,
                plan.ablation.match_multiple,
                current if isinstance(current, int) else 64,
            )
            arm.width, arm.config = (knob, width, residual), config_with(width)
        except ValueError as error:
            problems.append(f"{where['match']}: Ablation.match: arm {arm.name!r}: {clean(error)}")


def _count_costs(arm: Arm) -> None:
    """Set the arm's parameter count, FLOPs per token and tokens per step from its config."""
    experiment = arm.config.build()
    model = build_blank(experiment).model
    arm.parameters = facts.parameters(model)["total"]
    arm.flops_per_token = facts.on_meta(facts.flops_per_token, model, experiment.seq_len)
    arm.tokens_per_step = experiment.batch_size * experiment.seq_len
