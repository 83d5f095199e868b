"""Sentences and tables about what changed first, shared by all outputs. Nothing here is escaped."""

from __future__ import annotations

from toolkit.comparison import text
from toolkit.comparison.probes import ArmProbes, CellRecord, ProbesRecord
from toolkit.probed.drawing import number

HEAD = ("arm", "step", "module", "statistic", "baseline", "value", "in seed sd", "p (adjusted)")
HUGE = 1000  # in sd of the seeds: larger sizes have no meaning of their own


def sentence(arm: ArmProbes) -> str:
    """What changed first in an arm, in one sentence or two."""
    seeds = str(arm["seeds"]) if arm["paired"] else f"{arm['seeds']} and {arm['baseline_seeds']}"
    if not arm["steps"] or not min(arm["seeds"], arm["baseline_seeds"]):
        return f"{arm['arm']}: nothing to compare."
    steps = (
        f"steps {arm['steps'][0]:,} to {arm['steps'][-1]:,}" if len(arm["steps"]) > 1 else f"step {arm['steps'][0]:,}"
    )
    if min(arm["seeds"], arm["baseline_seeds"]) < 2:
        return f"{arm['arm']}: no verdict, since one seed can't tell a change from noise."
    if arm["origin"]:
        probe = arm["origin"]["probe"]
        before = f"What {probe} saw in earlier modules is equal to the last bit."
        if arm["origin_is_first_module"]:
            before = f"{probe} observes no earlier module."
        return f"{_changed(arm, arm['origin'])} {before}{_beyond_noise(arm)}"
    if not arm["first"]:
        if not arm["cells"]:
            return f"{arm['arm']}: every value is equal to the baseline's ({arm['equal_cells']:,} values, {steps})."
        return (
            f"{arm['arm']}: no change beyond the noise of {seeds} seeds in {arm['cells']:,} values ({steps}). That is "
            "no proof of equality."
        )
    others = f" At that step, {_values(arm['count'] - 1)} as well." if arm["count"] > 1 else ""
    return f"{_changed(arm, arm['first'][0])} It is beyond the noise of {seeds} seeds.{others}"


def _changed(arm: ArmProbes, cell: CellRecord) -> str:
    baseline_mean, arm_mean = means(cell)
    return (
        f"{arm['arm']}: changed first at step {cell['step']:,} in {module(cell)}: {name(cell)} is {arm_mean}, and "
        f"{baseline_mean} in the baseline."
    )


def _beyond_noise(arm: ArmProbes) -> str:
    """What is beyond the noise of seeds in an arm whose origin is known."""
    if not arm["first"]:
        return " No value differs beyond the noise of seeds."
    cell = arm["first"][0]
    return (
        f" Beyond the noise of seeds, {_values(arm['count'])} at step {cell['step']:,}; the first of the largest is in "
        f"{module(cell)}."
    )


def module(cell: CellRecord) -> str:
    """The module of a cell."""
    return cell["module"] or "the whole model"


def name(cell: CellRecord) -> str:
    """The probe and statistic of a cell."""
    return f"{cell['probe']}/{cell['statistic']}"


def means(cell: CellRecord) -> tuple[str, str]:
    """The means of the baseline and of the arm, with as many digits as it takes to tell them apart, up to 8."""
    base, arm = cell["baseline_mean"], cell["arm_mean"]
    shown = number(base), number(arm)
    for digits in range(4, 9):
        if shown[0] == shown[1] and base != arm:
            shown = f"{base:.{digits}g}", f"{arm:.{digits}g}"
    return shown


def _values(count: int) -> str:
    return "one value differs" if count == 1 else f"{count:,} values differ"


def size(cell: CellRecord) -> str:
    """The size of a difference in sd of the seeds: "+4.2", or "> +1000"."""
    if abs(cell["size_sd"]) >= HUGE:
        return f"> {'+' if cell['size_sd'] > 0 else '-'}{HUGE}"
    return f"{cell['size_sd']:+.1f}"


def table(record: ProbesRecord, most: int) -> list[list[str]]:
    """Rows for HEAD: of each arm, at most ``most`` cells of its first step, the location first."""
    return [
        [
            arm["arm"],
            f"{cell['step']:,}",
            module(cell),
            name(cell),
            *means(cell),
            size(cell),
            text.p_value(cell["p_adjusted"]),
        ]
        for arm in record["arms"]
        for cell in arm["first"][:most]
    ]


def notes(record: ProbesRecord) -> list[str]:
    """Sentences below the table: what only one of two arms has, and what limits the answer."""
    out = []
    for arm in record["arms"]:
        if arm["only_in_arm"] or arm["only_in_baseline"]:
            out.append(
                f"{arm['arm']}: only what both arms have is compared; {arm['only_in_arm']} statistics of modules are "
                f"only in this arm, {arm['only_in_baseline']} only in the baseline"
            )
        out += [f"{arm['arm']}: {note}" for note in arm["notes"]]
    return out


def legend(record: ProbesRecord) -> str:
    """What the numbers mean."""
    pairs = {arm["paired"] for arm in record["arms"]}
    how = "paired by seed" if pairs == {True} else "not paired" if pairs == {False} else "paired by seed where possible"
    return (
        f"{how}; for an arm that does not differ, the chance of any false location is at most {record['alpha']:.3g} "
        "over all modules, statistics and steps; in seed sd: the difference over the standard deviation of the seeds; "
        "of the values of one step, the first module in the model among the largest differences comes first"
    )
