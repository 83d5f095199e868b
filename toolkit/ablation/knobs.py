"""The knobs that a plan sets itself: learning rates to try, and widths that give arms equal sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.ablation import match
from toolkit.ablation.planfile import Ablation, Arm
from toolkit.config import keys
from toolkit.config.guard import resolve
from toolkit.config.layers import Config, ConfigError
from toolkit.config.safety import read_bindings
from toolkit.config.spelling import suggest
from toolkit.output.errors import clean
from toolkit.registry import CATALOG

if TYPE_CHECKING:
    from toolkit.ablation.plan import Plan


def listed(value: str | dict[str, str] | None) -> list[str]:
    """The knobs that a plan names, for all arms or for each."""
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
        which = f"several knobs {knob!r} of kind {kind} ({', '.join(candidates)})"
        reason = f"has {which if candidates else f'no knob {knob!r} of kind {kind}'}"
        remedy = f"write Ablation.{field_name} = {{{arm.name!r}: 'Part.{knob}'}}"
        raise ConfigError(f"Ablation.{field_name}: arm {arm.name!r} {reason}; {remedy}")
    return candidates[0]


def learning_rates(
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
            f"{where_grid}: Ablation.lr_grid: arms have unequal numbers of rates ({listed}); give all the same number"
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


def match_widths(plan: Plan, where: dict[str, str], problems: list[str]) -> None:
    """Find the width that gives each arm the baseline's count. An arm that already has this count is not changed."""
    quantity = plan.ablation.match
    if quantity is None:
        return
    target = match.count(plan.baseline.config, quantity)
    for arm in plan.arms.values():
        try:
            knob = _find_knob(plan.ablation.match_knob, arm, "ffn", "hidden", "match_knob")
            if any(keys.bound_by(binding) == knob for binding in arm.bindings) and arm is not plan.baseline:
                raise ConfigError(f"arm {arm.name!r} binds {knob}, which Ablation.match solves for; leave it out there")
            arm.width = (knob, None, match.count(arm.config, quantity) - target)
            if arm.width[2] != 0:
                _match_width(plan, arm, knob, quantity, target)
        except ValueError as error:
            problems.append(f"{where['match']}: Ablation.match: arm {arm.name!r}: {clean(error)}")


def _match_width(plan: Plan, arm: Arm, knob: str, quantity: str, target: int) -> None:
    """Set the arm's width, and its config with it, so that its count is nearest to the target."""
    layers = plan.layers(arm)

    def config_with(width: int) -> Config:
        return resolve([*layers, read_bindings([*arm.bindings, f"{knob} = {width}"])])

    def count_with(width: int) -> int:
        return match.count(config_with(width), quantity)

    current = arm.config.flat[knob]
    guess = current if isinstance(current, int) else 64
    width, residual = match.solve(count_with, target, plan.ablation.match_multiple, guess)
    arm.width, arm.config = (knob, width, residual), config_with(width)
