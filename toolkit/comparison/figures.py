"""The figures of a comparison: PNG for papers, SVG for the HTML page. The colours are those of Okabe and Ito, which
colour-blind readers can tell apart (the blue is lighter, for dark pages). Each arm also has a line style and a
marker."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from toolkit.comparison.assemble import IDENTICAL, ArmResult, Comparison
from toolkit.comparison.runs import Run
from toolkit.output.escape import label, line, shorten
from toolkit.store.factsfile import Facts

log = logging.getLogger("toolkit")
INK, GREY = "#333333", "#888888"  # the HTML page replaces INK by its text colour, which is light or dark
ARMS = ("#2a86c8", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vP"
WORDS = {"better": "#2a86c8", "worse": "#D55E00", "equivalent": "#009E73"}
STYLE = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is no formula
    "svg.fonttype": "path",
    "svg.hashsalt": "compare",
}
WIDTH = 8.2  # inches
ROUND = [1, 2, 2.5, 5, 10]  # allowed distances between ticks, times a power of ten
MANY, FURTHEST = 10, 8  # with more than MANY arms, only the FURTHEST most different have colour and name
BACKGROUND = {"color": "#bbbbbb", "linestyle": "-", "marker": "", "alpha": 0.8}  # the style of all other arms then
BETTER = "left of zero is better"
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
                    _show_exclusions(figure, comparison)
                    text = caption.format(c=comparison, metric=comparison.curve_metric)
                    pictures[name] = (text, *_render(figure))
            except Exception as error:  # matplotlib can raise anything
                log.warning("%s is left out: %s: %s", name, type(error).__name__, shorten(line(error), 200))
    return pictures


def _show_exclusions(figure: Figure, comparison: Comparison) -> None:
    if comparison.excluded:
        listed = label("; ".join(f"{run.name}: {reason}" for run, reason in comparison.excluded), 300)
        figure.suptitle(f"excluded by hand: {listed}", fontsize=8.5, x=0.01, ha="left", wrap=True)


def forest(comparison: Comparison) -> Figure | None:
    """Forest plot: each arm's paired differences, mean difference and interval, with noise and smallest effect."""
    rows = [arm for arm in comparison.arms if arm.difference is not None]
    if not rows:
        return None
    figure = _figure(1.5 + 0.44 * len(rows))
    axes = figure.add_subplot()
    if comparison.noise:
        axes.axvspan(-comparison.noise, comparison.noise, color=GREY, alpha=0.22, linewidth=0)
    for side in (-1, 1):
        axes.axvline(side * comparison.effect, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    axes.axvline(0, color=INK, linewidth=1)
    extents = [max(abs(e) for e in (d.low or d.mean, d.high or d.mean)) for d in (arm.difference for arm in rows)]
    largest_shown = max(sorted(extents)[-2:][0] if len(rows) > 1 else extents[0], 1.5 * comparison.effect)
    clipped_at = 1.3 * largest_shown if max(extents) > FAR * largest_shown else None
    if clipped_at is not None:
        axes.set_xlim(-clipped_at, clipped_at)
    for y, arm in enumerate(rows):
        difference, color = arm.difference, WORDS.get(arm.verdict.word, GREY)
        if clipped_at is not None and abs(difference.mean) > clipped_at:
            side = 1 if difference.mean > 0 else -1
            axes.plot([side * 0.97 * clipped_at], [y], ">" if side > 0 else "<", color=color, markersize=10)
            axes.annotate(
                "off the scale",
                (side * 0.92 * clipped_at, y),
                va="center",
                ha="right" if side > 0 else "left",
                fontsize=9,
                color=color,
            )
        if difference.low is not None:
            axes.plot([difference.low, difference.high], [y, y], color=color, linewidth=2.4, solid_capstyle="round")
        axes.plot([difference.mean], [y], "o", color=color, markersize=7.5, zorder=3)
        pairs = _paired_differences(arm, comparison.baseline) if difference.paired else []
        axes.plot(pairs, [y + 0.27] * len(pairs), "|", color=color, markersize=6, alpha=0.8)
        text = f"{difference.mean:+.4f}  {arm.verdict.word}" + (" *" if arm.conditional else "")
        axes.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9.5)
    axes.set_yticks(range(len(rows)), [label(arm.name) for arm in rows])
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{label(comparison.metric)} minus that of {label(comparison.baseline.name)}   ({BETTER})")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=ROUND))
    handles = [
        Line2D([], [], color=INK, marker="o", linewidth=2.4, label=f"mean, {1 - comparison.alpha:.0%} interval"),
        Line2D([], [], color=INK, marker="|", linestyle="", label="one seed"),
        Line2D([], [], color=INK, linestyle=(0, (4, 3)), label=f"smallest effect ±{comparison.effect:.3g}"),
    ]
    if comparison.noise:
        handles.append(Patch(color=GREY, alpha=0.3, linewidth=0, label=f"seed noise ±{comparison.noise:.2g}"))
    _legend(figure, handles)
    return figure


def curves(comparison: Comparison) -> Figure | None:
    """Left: loss; right: difference from the baseline. Lines are means over seeds, bands are their ranges."""
    figure, drawn = _figure(4.0), False
    left, right = figure.subplots(1, 2)
    base = {run.seed: _points(run, comparison.curve_metric) for run in comparison.baseline.runs}
    loss_bands, difference_bands, last_step = [], [], 0.0
    for arm, style in _arm_styles(comparison):
        points = [(run.seed, _points(run, comparison.curve_metric)) for run in arm.runs]
        steps, mean, low, high = _band([curve for _, curve in points])
        if not len(steps):
            continue
        drawn, last_step = True, max(last_step, steps[-1])
        _draw_line(left, steps, mean, low, high, style)
        loss_bands.append((steps, low, high))
        pairs = [
            {step: value - base[seed][step] for step, value in curve.items() if step in base[seed]}
            for seed, curve in points
            if seed in base
        ]
        steps, mean, low, high = _band(pairs)
        if arm is not comparison.baseline and len(steps):
            _draw_line(right, steps, mean, low, high, style)
            difference_bands.append((steps, low, high))
    if not drawn:
        return None
    left.set(title=f"{label(comparison.curve_metric)}, mean and range over seeds", ylabel=label(comparison.unit))
    right.set(title=f"minus {label(comparison.baseline.name, 24)} at the same seed")
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
        _set_loss_limits(axes, bands, last_step)
    _legend(figure, _handles(comparison))
    return figure


def flops(comparison: Comparison) -> Figure | None:
    """Validation loss against training FLOPs, on logarithmic axes."""
    figure, drawn = _figure(3.8), []
    axes = figure.add_subplot()
    for arm, style in _arm_styles(comparison):
        facts = next((run.facts for run in arm.runs if run.facts.get("flops_per_token")), Facts())
        flops_per_token = facts.get("flops_per_token")
        steps, mean, low, high = _band([_points(run, comparison.curve_metric) for run in arm.runs])
        later = steps > 0
        if not flops_per_token or not later.any():
            continue
        spent = steps[later] * facts["tokens"] / max(1, facts["steps"]) * flops_per_token
        _draw_line(axes, spent, mean[later], low[later], high[later], style)
        drawn.append((spent, low[later], high[later]))
    if not drawn:
        return None
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="training FLOPs", ylabel=label(comparison.unit), title=label(comparison.curve_metric))
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    _legend(figure, _handles(comparison))
    return figure


def rates(comparison: Comparison) -> Figure | None:
    """Loss against learning rate on the selection seeds. A ring marks the chosen rate, a cross unfinished runs."""
    if not any(arm.tuned for arm in comparison.arms):
        return None
    figure = _figure(3.8)
    axes = figure.add_subplot()
    for arm, style in _arm_styles(comparison):
        if arm.tuned is None:
            continue
        shown = [point for point in arm.tuned.points if point.mean is not None]
        axes.plot([p.lr for p in shown], [p.mean for p in shown], markersize=5.5, linewidth=1.6, **style)
        for point in shown:
            axes.plot([point.lr] * len(point.values), point.values, ".", color=style["color"], alpha=0.45, markersize=5)
            if point.lr == arm.tuned.best:
                axes.plot(point.lr, point.mean, "o", markersize=13, markerfacecolor="none", color=style["color"])
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
    handles = _handles(comparison)
    handles.append(
        Line2D([], [], color=INK, marker="o", markersize=11, markerfacecolor="none", linestyle="", label="chosen")
    )
    handles.append(Line2D([], [], color=INK, marker="x", linestyle="", label="a run did not finish"))
    _legend(figure, handles)
    return figure


_PICTURES: tuple[tuple[str, str, Callable[[Comparison], Figure | None]], ...] = (
    (
        "forest",
        "Difference of {c.metric} from {c.baseline.name}: mean over seeds with its interval, in the colour of its "
        "verdict. Ticks are single seeds, the grey band is the noise between seeds, and between the dashed lines a "
        "difference is too small to matter.",
        forest,
    ),
    (
        "curves",
        "{metric} along the training, and its difference from {c.baseline.name} at the same seed: mean and range "
        "over seeds. What decides is the end.",
        curves,
    ),
    ("flops", "{metric} against training FLOPs: an arm that costs more per token lies further to the right.", flops),
    (
        "lr",
        "{c.metric} against the learning rate, on seeds that are not judged. The ringed rate was chosen for each arm.",
        rates,
    ),
)


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _render(figure: Figure) -> tuple[bytes, str]:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    return png.getvalue(), text.replace(INK, "currentColor")


def _arm_styles(comparison: Comparison) -> list[tuple[ArmResult, dict]]:
    """(arm, line style) in drawing order. The baseline is drawn in INK. With more than MANY arms, all but the FURTHEST
    are drawn first, in the BACKGROUND style."""
    base, *others = comparison.arms
    shown = others if len(others) <= MANY else sorted(others, key=_distance, reverse=True)[:FURTHEST]
    styles = {base.name: {"color": INK, "linestyle": "-", "marker": "o"}}
    for i, arm in enumerate(arm for arm in others if arm in shown):
        marker = MARKERS[(i + 1) % len(MARKERS)]
        styles[arm.name] = {"color": ARMS[i % len(ARMS)], "linestyle": DASHES[i % 4], "marker": marker}
    background = [arm for arm in others if arm not in shown]
    return [(arm, BACKGROUND) for arm in background] + [
        (arm, styles[arm.name]) for arm in comparison.arms if arm.name in styles
    ]


def _distance(arm: ArmResult) -> float:
    return abs(arm.difference.mean) if arm.difference else -1.0


def _handles(comparison: Comparison) -> list:
    styles = _arm_styles(comparison)
    handles = [
        Line2D([], [], linewidth=1.8, markersize=4, label=_legend_label(arm, comparison), **style)
        for arm, style in styles
        if style is not BACKGROUND
    ]
    if background_count := sum(style is BACKGROUND for _, style in styles):
        handles.append(
            Line2D([], [], linewidth=1.8, label=f"{background_count} arms nearer to the baseline", **BACKGROUND)
        )
    return handles


def _legend_label(arm: ArmResult, comparison: Comparison) -> str:
    if arm is comparison.baseline:
        return f"{label(arm.name)} (baseline)"
    return f"{label(arm.name)} ({IDENTICAL})" if arm.verdict and arm.verdict.word == IDENTICAL else label(arm.name)


def _legend(figure: Figure, handles: list) -> None:
    """Add a legend below the axes, in as many columns as fit. Each row after the first makes the figure taller."""
    lengths = [len(handle.get_label()) + 9 for handle in handles]
    for columns in range(len(handles), 0, -1):
        rows = -(-len(handles) // columns)
        if sum(max(lengths[i : i + rows]) for i in range(0, len(handles), rows)) <= 13 * WIDTH:
            break
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), fontsize=9.5, handlelength=2.6
    )


def _draw_line(axes, x, mean, low, high, style) -> None:
    marker = {"markersize": 3.6} if len(x) <= 25 else {"marker": ""}
    axes.plot(x, mean, linewidth=0.9 if style is BACKGROUND else 1.7, **(style | marker))
    if style is not BACKGROUND:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _points(run: Run, metric: str) -> dict[float, float]:
    return dict(zip(*run.curve(metric), strict=True))


def _band(curves: list[dict[float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, lowest, highest) of {step: value} curves. Each step uses the curves that reach it: a run that
    diverged ends early."""
    steps = sorted(set().union(*curves)) if curves else []
    values = [[curve[step] for curve in curves if step in curve] for step in steps]
    return tuple(np.array(x) for x in (steps, *([of(v) for v in values] for of in (np.mean, min, max))))


def _paired_differences(arm: ArmResult, base: ArmResult) -> list[float]:
    theirs = dict(base.values)
    return [value - theirs[seed] for seed, value in arm.values if seed in theirs]


def _set_loss_limits(axes, bands, last_step: float) -> None:
    """Set the y limits from the last four fifths of the run. The loss first falls from ln(vocabulary size), which would
    flatten the rest."""
    later = [(low[steps >= 0.2 * last_step], high[steps >= 0.2 * last_step]) for steps, low, high in bands]
    low, high = (
        (np.concatenate(side) if later else np.array([]) for side in zip(*later, strict=True)) if later else ([], [])
    )
    if len(low):
        high = np.quantile(high, 0.98)
        space = 0.08 * (high - min(low)) or 0.01
        axes.set_ylim(min(low) - space, high + space)
