"""The plan of an ablation: composes, compares, matches and counts the arms, and lists their jobs. Trains nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from toolkit.ablation import knobs
from toolkit.ablation.planfile import (
    BUDGETS,
    Ablation,
    Arm,
    ArmEntries,
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
from toolkit.evaluation import evaluators
from toolkit.experiment import build_blank, build_list
from toolkit.output.errors import clean
from toolkit.probing.places import check_statistic
from toolkit.protocols import Evaluator
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
        return resolve([*self.layers(arm), read_bindings(self.bindings(job, lr))]).flat

    def layers(self, arm: Arm) -> list[Layer]:
        """The layers of an arm's config without the arm's own bindings."""
        return [*_base_layers(self.common_overlays, self.common), *map(read_file, arm.overlays)]

    def set_steps(
        self, seconds_per_step: dict[str, float] | None = None, known_steps: dict[str, int] | None = None
    ) -> None:
        """Set each arm's steps from the budget. ``known_steps`` are kept as they are. A budget in seconds needs
        ``seconds_per_step``: arms without one keep their steps. Raises ConfigError."""
        unit, amount = self.budget
        for arm in self.arms.values():
            if unit == "flops" and not arm.flops_per_token:
                raise ConfigError(f"Ablation.flops: the FLOPs of arm {arm.name!r} are unknown; use Ablation.steps")
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
    budget in seconds, which must be measured first. Raises ConfigError with one line for each problem."""
    load_shelf()
    layer = read_file(path)
    ablation, where = parse(layer, str(path))
    problems, entries = unfold(ablation, where)
    overlays, bindings = split_entries(ablation.common, where["common"], "Ablation.common", problems)
    check_bindings(bindings, where["common"], problems)
    raise_problems(problems)
    common = dataclasses.replace(_layer("Ablation.common", bindings, where["common"]), imports=layer.imports)
    arms, higher_is_better = _compose_arms(entries, overlays, common, where, ablation)
    ablation = dataclasses.replace(ablation, higher_is_better=higher_is_better)
    file = Path(find(path))
    plan = Plan(
        path=file,
        name=file.resolve().parent.name + ("" if file.stem == "plan" else f"-{file.stem}"),
        ablation=ablation,
        common=common,
        common_overlays=overlays,
        common_bindings=bindings,
        arms=arms,
        rates=knobs.learning_rates(ablation, arms, where, problems),
        confounds=[],
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    _check_factor(plan, where["factor"], problems)
    raise_problems(problems)
    plan.confounds = _find_confounds(plan, where, problems)
    knobs.match_widths(plan, where, problems)
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


def _compose_arms(
    entries: dict[str, ArmEntries], overlays: list[str], common: Layer, where: dict[str, str], ablation: Ablation
) -> tuple[dict[str, Arm], bool | None]:
    """Compose and build each arm's config. Returns the arms, and whether a higher metric is better (None: unknown).
    Raises ConfigError; a problem that all arms share is reported once."""
    arms: dict[str, Arm] = {}
    directions: dict[str, bool | None] = {}
    arms_by_problem: dict[str, list[str]] = {}
    base_layers = _base_layers(overlays, common)
    for arm in entries.values():
        try:
            own_layers = [_layer(f"arm {arm.name!r}", arm.bindings, where["arms"])] if arm.bindings else []
            config = resolve([*base_layers, *map(read_file, arm.overlays), *own_layers])
            experiment = config.build()
            model = build_blank(experiment).model
            chosen = evaluators.of(config, experiment)
            for evaluator in chosen.values():
                evaluator.prepare()
            _check_probe(ablation, build_list(config, "probes", experiment.probes), model, where)
            directions[arm.name] = _direction(ablation, chosen, where)
            arms[arm.name] = Arm(arm.name, arm.overlays, arm.bindings, config)
        except ValueError as error:
            for line in clean(error).splitlines():
                arms_by_problem.setdefault(line, []).append(arm.name)
    raise_problems(
        [
            line if len(names) == len(entries) else f"arm {', '.join(map(repr, names))}: {line}"
            for line, names in arms_by_problem.items()
        ]
    )
    if len(set(directions.values())) > 1:
        names = {value: ", ".join(name for name in arms if directions[name] is value) for value in (True, False)}
        raise ConfigError(
            f"{where['metric']}: Ablation.metric = {ablation.metric!r}: its evaluator says that higher is better in "
            f"{names[True]}, and that lower is better in {names[False]}; use the same knobs for it in all arms"
        )
    return arms, next(iter(directions.values()))


def _direction(ablation: Ablation, chosen: Mapping[str, Evaluator], where: dict[str, str]) -> bool | None:
    """Whether a higher metric is better: what the metric's evaluator says, or what the plan says of another metric.
    Raises ConfigError if an arm does not have the evaluator, or if the plan says the opposite."""
    family, _, rest = ablation.metric.partition("/")
    if family != "eval":
        return ablation.higher_is_better
    name, _, metric = rest.partition("/")
    if name not in chosen:
        raise ConfigError(
            f"{where['metric']}: Ablation.metric = {ablation.metric!r}, but no evaluator is called {name!r}"
            f"{suggest(name, chosen)}; add it to Experiment.final_evaluators in Ablation.common"
        )
    direction = evaluators.is_higher_better(chosen[name], metric)
    if ablation.higher_is_better not in (None, direction):
        raise ConfigError(
            f"{where['higher_is_better']}: Ablation.higher_is_better = {ablation.higher_is_better}, but {name} says "
            f"higher_is_better = {direction}; leave it out"
        )
    return direction


def _check_probe(ablation: Ablation, probes: Mapping[str, object], model: nn.Module, where: dict[str, str]) -> None:
    """Raise ConfigError if the plan's metric is of a probe that an arm does not have, or that its probe can't give."""
    family, _, rest = ablation.metric.partition("/")
    name, _, statistic = rest.partition("/")
    if family != "probe":
        return
    if name in probes and statistic:
        try:
            check_statistic(name, probes[name], statistic, model)
        except ValueError as error:
            raise ConfigError(f"{where['metric']}: Ablation.metric = {ablation.metric!r}: {error}") from error
        return
    if name in probes:
        problem = " names no statistic; write probe/NAME/STATISTIC, or probe/NAME/STATISTIC/MODULE"
    else:
        hint = suggest(name, probes)
        problem = f", but no probe is called {name!r}{hint}; add it to Experiment.probes in Ablation.common"
    raise ConfigError(f"{where['metric']}: Ablation.metric = {ablation.metric!r}{problem}")


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
    lines: list[str] = []
    confounding_keys: list[str] = []
    configs: dict[str, dict[str, object]] = {}
    base = plan.baseline.config.flat
    allowed = [*plan.factor, *knobs.listed(plan.ablation.lr_knob), *knobs.listed(plan.ablation.match_knob)]
    for arm in plan.arms.values():
        flat = arm.config.flat
        same = next(
            (name for name, other in configs.items() if keys.differences(other, flat).keys() <= {keys.SEED}), None
        )
        configs[arm.name] = flat
        if same:
            role = "the baseline" if same == plan.baseline.name else "arm"
            problems.append(f"{where['arms']}: arm {arm.name!r} does not differ from {role} {same!r} at all")
        differences = keys.independent_differences(base, flat).items()
        confounds = {key: pair for key, pair in differences if not keys.matches(key, allowed)}
        confounding_keys += confounds
        if confounds:
            listed = "; ".join(f"{key} is {own}, not {of_base}" for key, (of_base, own) in confounds.items())
            lines.append(
                f"{where['arms']}: arm {arm.name!r} is confounded: it differs from the baseline "
                f"{plan.baseline.name!r} beyond the factor: {listed}"
            )
    if lines:
        wider_factor = show(list(dict.fromkeys([*plan.factor, *confounding_keys])))
        lines.append(
            f"give all arms the same values (in Ablation.common) or, if these differences are the question, write "
            f"Ablation.factor = {wider_factor}"
        )
    return lines


def _count_costs(arm: Arm) -> None:
    """Set the arm's parameter count, FLOPs per token and tokens per step from its config."""
    experiment = arm.config.build()
    model = build_blank(experiment).model
    arm.parameters = facts.parameters(model)["total"]
    arm.flops_per_token = facts.on_meta(facts.flops_per_token, model, experiment.seq_len)
    arm.tokens_per_step = experiment.batch_size * experiment.seq_len
