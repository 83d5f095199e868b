"""The figures of a comparison: PNG for papers, SVG for the HTML page."""

from __future__ import annotations

import logging
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from toolkit.comparison.drawing import (
    GREY,
    INK,
    ROUND,
    STYLE,
    WORDS,
    add_legend,
    arm_handles,
    arm_styles,
    band,
    curve_points,
    draw_line,
    new_figure,
    render,
    set_loss_limits,
    show_exclusions,
)
from toolkit.comparison.results import ArmResult, Comparison, unit
from toolkit.comparison.statistics import Difference, Verdict
from toolkit.output.escape import label, line, shorten
from toolkit.store.factsfile import Facts

log = logging.getLogger("toolkit")
WITHIN_EFFECT = " Between the dashed lines, a difference is too small to matter."
FAR = 4  # the forest plot cuts off an arm that is this many times as far from zero as the next one


def draw(comparison: Comparison) -> dict[str, tuple[str, bytes, str]]:
    """Draw every picture that has data. Returns {file stem: (caption, PNG, SVG)}. A picture that fails is left out with
    a warning, since the tables don't need it."""
    pictures = {}
    with rc_context(STYLE):
        for name, caption, make in _PICTURES:
            try:
                figure = make(comparison)
                if figure is not None:
                    show_exclusions(figure, comparison)
                    effect = "" if comparison.effect is None else WITHIN_EFFECT
                    text = caption.format(c=comparison, metric=comparison.curve_metric, within_effect=effect)
                    pictures[name] = (text, *render(figure))
            except Exception as error:  # matplotlib can raise anything
                log.warning("the figure %s failed: %s: %s", name, type(error).__name__, shorten(line(error), 200))
    return pictures


def forest(comparison: Comparison) -> Figure | None:
    """Forest plot: each arm's paired differences, mean difference and interval, with noise and smallest effect."""
    rows = [
        (arm, arm.judgement.verdict, arm.judgement.evidence.difference)
        for arm in comparison.arms
        if arm.judgement and arm.judgement.evidence
    ]
    if not rows:
        return None
    figure = new_figure(1.5 + 0.44 * len(rows))
    axes = figure.add_subplot()
    if comparison.noise:
        axes.axvspan(-comparison.noise, comparison.noise, color=GREY, alpha=0.22, linewidth=0)
    for x in () if comparison.effect is None else (-comparison.effect, comparison.effect):
        axes.axvline(x, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    axes.axvline(0, color=INK, linewidth=1)
    clipped_at = _clipped_at([difference for _, _, difference in rows], comparison.effect or 0.0)
    if clipped_at is not None:
        axes.set_xlim(-clipped_at, clipped_at)
    for y, (arm, verdict, difference) in enumerate(rows):
        color = WORDS.get(verdict.word, GREY)
        if clipped_at is not None and abs(difference.mean) > clipped_at:
            _mark_outside(axes, y, 1 if difference.mean > 0 else -1, clipped_at, color)
        _draw_row(axes, y, arm, verdict, difference, comparison.baseline, color)
    axes.set_yticks(range(len(rows)), [label(arm.name) for arm, _, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    better = "right" if comparison.plan.higher_is_better else "left"
    quantity = f"{label(comparison.metric)} minus that of {label(comparison.baseline.name)}"
    axes.set_xlabel(f"{quantity}   ({better} of zero is better)")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=ROUND))
    looks = [arm.judgement.look for arm in comparison.arms if arm.judgement and arm.judgement.look]
    repeated = "repeated " if any(look.history for look in looks) else ""
    handles: list[Artist] = [
        Line2D(
            [], [], color=INK, marker="o", linewidth=2.4, label=f"mean, {1 - comparison.alpha:.0%} {repeated}interval"
        ),
        Line2D([], [], color=INK, marker="|", linestyle="", label="one seed"),
    ]
    if comparison.effect is not None:
        text = f"smallest effect ±{comparison.effect:.3g}"
        handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 3)), label=text))
    if comparison.noise:
        handles.append(Patch(color=GREY, alpha=0.3, linewidth=0, label=f"noise between seeds ±{comparison.noise:.2g}"))
    add_legend(figure, handles)
    return figure


def _clipped_at(differences: list[Difference], effect: float) -> float | None:
    """Where the forest plot is cut off on both sides, if one arm lies so far out that the others would shrink to dots.
    None if all arms fit."""
    extents = sorted(max(abs(end) for end in (d.low or d.mean, d.high or d.mean)) for d in differences)
    largest_shown = max(extents[-2:][0], 1.5 * effect)
    return 1.3 * largest_shown if extents[-1] > FAR * largest_shown else None


def _mark_outside(axes: Axes, y: int, side: int, clipped_at: float, color: str) -> None:
    """An arrow at the edge of the forest plot for an arm that lies outside. ``side``: -1 is left, 1 is right."""
    axes.plot([side * 0.97 * clipped_at], [y], ">" if side > 0 else "<", color=color, markersize=10)
    position, alignment = (side * 0.92 * clipped_at, y), "right" if side > 0 else "left"
    axes.annotate("outside the plot", position, va="center", ha=alignment, fontsize=9, color=color)


def _draw_row(
    axes: Axes, y: int, arm: ArmResult, verdict: Verdict, difference: Difference, baseline: ArmResult, color: str
) -> None:
    """A row of the forest plot: an arm's interval, mean and single seeds, and its verdict in words."""
    if difference.low is not None and difference.high is not None:
        axes.plot([difference.low, difference.high], [y, y], color=color, linewidth=2.4, solid_capstyle="round")
    axes.plot([difference.mean], [y], "o", color=color, markersize=7.5, zorder=3)
    pairs = _paired_differences(arm, baseline) if difference.paired else []
    axes.plot(pairs, [y + 0.27] * len(pairs), "|", color=color, markersize=6, alpha=0.8)
    text = f"{difference.mean:+.4f}  {verdict.word}" + (" *" if arm.conditional else "")
    axes.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9.5)


def _paired_differences(arm: ArmResult, base: ArmResult) -> list[float]:
    """Those of the seeds that were judged."""
    theirs, look = dict(base.values), arm.judgement.look if arm.judgement else None
    judged = theirs.keys() & set(look.seeds) if look else theirs.keys()
    return [value - theirs[seed] for seed, value in arm.values if seed in judged]


def curves(comparison: Comparison) -> Figure | None:
    """Left: loss; right: difference from the baseline. Lines are means over seeds, bands are their ranges."""
    figure = new_figure(4.0)
    left, right = figure.subplots(1, 2)
    base = {run.seed: curve_points(run, comparison.curve_metric) for run in comparison.baseline.runs}
    loss_bands, difference_bands = [], []
    for arm, style in arm_styles(comparison):
        points = [(run.seed, curve_points(run, comparison.curve_metric)) for run in arm.runs]
        loss = band([curve for _, curve in points])
        if not len(loss.steps):
            continue
        draw_line(left, *loss, style)
        loss_bands.append(loss)
        difference = band(
            [
                {step: value - base[seed][step] for step, value in curve.items() if step in base[seed]}
                for seed, curve in points
                if seed in base
            ]
        )
        if arm is not comparison.baseline and len(difference.steps):
            draw_line(right, *difference, style)
            difference_bands.append(difference)
    if not loss_bands:
        return None
    last_step = max(float(loss.steps[-1]) for loss in loss_bands)
    if not last_step:  # a table without steps
        return None
    left.set(
        title=f"{label(comparison.curve_metric)}, mean and range over seeds",
        ylabel=label(unit(comparison.curve_metric)),
    )
    right.set(title=f"difference from {label(comparison.baseline.name, 20)} at the same seed")
    right.axhline(0, color=INK, linewidth=1)
    if not difference_bands:
        right.text(0.5, 0.5, "no seeds in common", transform=right.transAxes, ha="center", va="bottom")
    for axes, bands in ((left, loss_bands), (right, difference_bands)):
        axes.set_xlabel("step")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, last_step)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
        set_loss_limits(axes, bands, last_step)
    add_legend(figure, arm_handles(comparison))
    return figure


def flops(comparison: Comparison) -> Figure | None:
    """Validation loss against training FLOPs, on logarithmic axes."""
    figure, is_empty = new_figure(3.8), True
    axes = figure.add_subplot()
    for arm, style in arm_styles(comparison):
        facts = next((run.facts for run in arm.runs if run.facts.get("flops_per_token")), Facts())
        flops_per_token = facts.get("flops_per_token")
        steps, mean, low, high = band([curve_points(run, comparison.curve_metric) for run in arm.runs])
        later = steps > 0
        if not flops_per_token or not later.any():
            continue
        spent = steps[later] * facts["tokens"] / max(1, facts["steps"]) * flops_per_token
        draw_line(axes, spent, mean[later], low[later], high[later], style)
        is_empty = False
    if is_empty:
        return None
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="training FLOPs", ylabel=label(unit(comparison.curve_metric)), title=label(comparison.curve_metric))
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    add_legend(figure, arm_handles(comparison))
    return figure


def rates(comparison: Comparison) -> Figure | None:
    """Loss against learning rate on the selection seeds. A ring marks the chosen rate, a cross unfinished runs."""
    if not any(arm.tuned for arm in comparison.arms):
        return None
    figure = new_figure(3.8)
    axes = figure.add_subplot()
    for arm, style in arm_styles(comparison):
        if arm.tuned is None:
            continue
        means = {point.lr: point.mean for point in arm.tuned.points if point.mean is not None}
        axes.plot(list(means), list(means.values()), markersize=5.5, linewidth=1.6, **style)
        for point in arm.tuned.points:
            axes.plot([point.lr] * len(point.values), point.values, ".", color=style["color"], alpha=0.45, markersize=5)
        if arm.tuned.best is not None:
            best = arm.tuned.best
            axes.plot([best], [means[best]], "o", markersize=13, markerfacecolor="none", color=style["color"])
        unfinished = [point.lr for point in arm.tuned.points if len(point.values) < point.runs]
        axes.plot(
            unfinished,
            [0.97] * len(unfinished),
            "x",
            color=style["color"],
            markersize=8,
            markeredgewidth=2,
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xscale("log")
    tried = sorted({point.lr for arm in comparison.arms if arm.tuned for point in arm.tuned.points})
    axes.set_xticks(tried, [f"{lr:g}" for lr in tried])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="learning rate", ylabel=label(comparison.unit))
    axes.set_title(f"{label(comparison.metric)} on the selection seeds")
    axes.margins(y=0.12)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    handles = arm_handles(comparison)
    handles.append(
        Line2D([], [], color=INK, marker="o", markersize=11, markerfacecolor="none", linestyle="", label="chosen")
    )
    handles.append(Line2D([], [], color=INK, marker="x", linestyle="", label="a run did not finish"))
    add_legend(figure, handles)
    return figure


_PICTURES: tuple[tuple[str, str, Callable[[Comparison], Figure | None]], ...] = (
    (
        "forest",
        "{c.metric}: each arm's difference from {c.baseline.name}. Dots are means over seeds with their intervals, in "
        "the colour of the verdict. Ticks are single seeds. The grey band is the noise between seeds (one standard "
        "deviation).{within_effect} An asterisk marks an arm "
        "with runs that did not finish.",
        forest,
    ),
    (
        "curves",
        "{metric} during training, and its difference from {c.baseline.name} at the same seed: mean and range over "
        "seeds. The verdict uses only the value at the end.",
        curves,
    ),
    ("flops", "{metric} against training FLOPs. An arm that costs more per token lies further to the right.", flops),
    (
        "lr",
        "{c.metric} against the learning rate, on the selection seeds, which are not judged. A ring marks the rate "
        "that was chosen for the arm.",
        rates,
    ),
)
