"""What the figures of a comparison share: style, lines of arms, legend, and files. The colours are those of Okabe and
Ito, which colour-blind readers can tell apart (the blue is lighter, for dark pages). Each arm also has a line style and
a marker."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from toolkit.comparison.results import IDENTICAL, ArmResult, Comparison
from toolkit.comparison.runs import Run
from toolkit.output.escape import label

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

Style = dict[str, Any]  # keyword arguments of matplotlib's lines
INK, GREY = "#333333", "#888888"  # the HTML page replaces INK by its text colour, which is light or dark
ARMS = ("#2a86c8", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vP"
WORDS = {"better": "#2a86c8", "worse": "#D55E00", "equivalent": "#009E73"}
STYLE: dict[RcKeyType, Any] = {
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
BACKGROUND: Style = {"color": "#bbbbbb", "linestyle": "-", "marker": "", "alpha": 0.8}  # of all other arms then


class Band(NamedTuple):
    """Curves over the same steps: their mean, and their lowest and highest value at each step. Each is (steps,)."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def new_figure(height: float) -> Figure:
    """An empty figure as wide as the page; ``height`` is in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def render(figure: Figure) -> tuple[bytes, str]:
    """(PNG, SVG) of a figure. The SVG has no metadata, and the page's text colour instead of INK."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    return png.getvalue(), text.replace(INK, "currentColor")


def show_exclusions(figure: Figure, comparison: Comparison) -> None:
    """Name the excluded runs above the figure."""
    if comparison.excluded:
        listed = label("; ".join(f"{run.name}: {reason}" for run, reason in comparison.excluded), 300)
        figure.suptitle(f"excluded by hand: {listed}", fontsize=8.5, x=0.01, ha="left", wrap=True)


def arm_styles(comparison: Comparison) -> list[tuple[ArmResult, Style]]:
    """(arm, line style) in drawing order. The baseline is drawn in INK. With more than MANY arms, all but the FURTHEST
    are drawn first, in the BACKGROUND style."""
    base, *others = comparison.arms
    shown = others if len(others) <= MANY else sorted(others, key=_distance, reverse=True)[:FURTHEST]
    styles: dict[str, Style] = {base.name: {"color": INK, "linestyle": "-", "marker": "o"}}
    for i, arm in enumerate(arm for arm in others if arm in shown):
        marker = MARKERS[(i + 1) % len(MARKERS)]
        styles[arm.name] = {"color": ARMS[i % len(ARMS)], "linestyle": DASHES[i % 4], "marker": marker}
    background = [arm for arm in others if arm not in shown]
    return [(arm, BACKGROUND) for arm in background] + [
        (arm, styles[arm.name]) for arm in comparison.arms if arm.name in styles
    ]


def _distance(arm: ArmResult) -> float:
    return abs(arm.difference.mean) if arm.difference else -1.0


def arm_handles(comparison: Comparison) -> list[Artist]:
    """The legend's entries: each arm with a style of its own, and the number of arms in the background."""
    styles = arm_styles(comparison)
    handles: list[Artist] = [
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
    is_identical = arm.judgement is not None and arm.judgement.verdict.word == IDENTICAL
    return f"{label(arm.name)} ({IDENTICAL})" if is_identical else label(arm.name)


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Add a legend below the axes, in as many columns as fit. Each row after the first makes the figure taller."""
    lengths = [len(str(handle.get_label())) + 9 for handle in handles]
    for columns in range(len(handles), 0, -1):
        rows = -(-len(handles) // columns)
        if sum(max(lengths[i : i + rows]) for i in range(0, len(handles), rows)) <= 13 * WIDTH:
            break
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), fontsize=9.5, handlelength=2.6
    )


def draw_line(axes: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray, style: Style) -> None:
    """Draw an arm's mean as a line, and its range as a band; all arrays are (points,)."""
    marker: Style = {"markersize": 3.6} if len(x) <= 25 else {"marker": ""}
    axes.plot(x, mean, linewidth=0.9 if style is BACKGROUND else 1.7, **(style | marker))
    if style is not BACKGROUND:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def curve_points(run: Run, metric: str) -> dict[float, float]:
    """A run's curve as {step: value}."""
    return dict(zip(*run.curve(metric), strict=True))


def band(curves: Sequence[dict[float, float]]) -> Band:
    """The band of {step: value} curves. Each step uses the curves that reach it: a run that diverged ends early."""
    steps = sorted({step for curve in curves for step in curve})
    values = [[curve[step] for curve in curves if step in curve] for step in steps]
    mean, low, high = ([of(v) for v in values] for of in (np.mean, min, max))
    return Band(np.array(steps), np.array(mean), np.array(low), np.array(high))


def set_loss_limits(axes: Axes, bands: Sequence[Band], last_step: float) -> None:
    """Set the y limits from the last four fifths of the run. The loss first falls from ln(vocabulary size), which would
    flatten the rest."""
    lows = [value for each in bands for value in each.low[each.steps >= 0.2 * last_step]]
    highs = [value for each in bands for value in each.high[each.steps >= 0.2 * last_step]]
    if lows:
        bottom, top = min(lows), float(np.quantile(highs, 0.98))
        space = 0.08 * (top - bottom) or 0.01
        axes.set_ylim(bottom - space, top + space)
