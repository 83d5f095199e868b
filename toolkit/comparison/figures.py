"""The pictures of a comparison, as PNG for a paper and as SVG for the page. Colours are Okabe and Ito's (the blue
lighter, for dark pages), which the colour-blind can tell apart; and each arm has a line style and a marker besides."""

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

from toolkit.comparison.assemble import IDENTICAL, Arm, Comparison
from toolkit.comparison.runs import Run
from toolkit.output.escape import label, line, shorten

log = logging.getLogger("toolkit")
INK, GREY = "#333333", "#888888"  # the page shows INK in its own text colour, light or dark
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
    "text.parse_math": False,  # a name is text, whatever signs it holds
    "svg.fonttype": "path",
    "svg.hashsalt": "compare",
}
WIDTH = 8.2  # inches
ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks
MANY, FURTHEST = 10, 8  # beyond so many arms, only those furthest from the baseline have a colour and a name
PLAIN = {"color": "#bbbbbb", "linestyle": "-", "marker": "", "alpha": 0.8}  # of an arm among many
BETTER = "left of zero is better"
FAR = 4  # an arm so many times as far from zero as the next one leaves the frame of the forest plot


def draw(comparison: Comparison) -> dict[str, tuple[str, bytes, str]]:
    """{file stem: (caption, PNG, SVG)} of every picture for which there is something to show. A picture that fails
    is left out with a warning: the tables don't depend on it."""
    found = {}
    with rc_context(STYLE):
        for name, caption, make in _PICTURES:
            try:
                figure = make(comparison)
                if figure is not None:
                    _say_exclusions(figure, comparison)
                    text = caption.format(c=comparison, metric=comparison.curve_metric)
                    found[name] = (text, *_rendered(figure))
            except Exception as error:  # whatever the drawing library raises
                log.warning("%s is left out: %s: %s", name, type(error).__name__, shorten(line(error), 200))
    return found


def _say_exclusions(figure: Figure, comparison: Comparison) -> None:
    if comparison.excluded:
        said = label("; ".join(f"{run.name}: {reason}" for run, reason in comparison.excluded), 300)
        figure.suptitle(f"excluded by hand: {said}", fontsize=8.5, x=0.01, ha="left", wrap=True)


def forest(comparison: Comparison) -> Figure | None:
    """A row for each arm: every pair, the mean difference, its interval; behind them noise and smallest effect."""
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
    near = max(sorted(extents)[-2:][0] if len(rows) > 1 else extents[0], 1.5 * comparison.effect)
    edge = 1.3 * near if max(extents) > FAR * near else None
    if edge is not None:
        axes.set_xlim(-edge, edge)
    for y, arm in enumerate(rows):
        found, color = arm.difference, WORDS.get(arm.verdict.word, GREY)
        if edge is not None and abs(found.mean) > edge:
            side = 1 if found.mean > 0 else -1
            axes.plot([side * 0.97 * edge], [y], ">" if side > 0 else "<", color=color, markersize=10)
            axes.annotate(
                "off the scale",
                (side * 0.92 * edge, y),
                va="center",
                ha="right" if side > 0 else "left",
                fontsize=9,
                color=color,
            )
        if found.low is not None:
            axes.plot([found.low, found.high], [y, y], color=color, linewidth=2.4, solid_capstyle="round")
        axes.plot([found.mean], [y], "o", color=color, markersize=7.5, zorder=3)
        pairs = _pairs(arm, comparison.baseline) if found.paired else []
        axes.plot(pairs, [y + 0.27] * len(pairs), "|", color=color, markersize=6, alpha=0.8)
        text = f"{found.mean:+.4f}  {arm.verdict.word}" + (" *" if arm.conditional else "")
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
    """Left the loss, right the difference from the baseline; a line is the mean over seeds, a band their range."""
    figure, drawn = _figure(4.0), False
    left, right = figure.subplots(1, 2)
    base = {run.seed: _points(run, comparison.curve_metric) for run in comparison.baseline.runs}
    everything, gaps, last = [], [], 0.0
    for arm, look in _looks(comparison):
        points = [(run.seed, _points(run, comparison.curve_metric)) for run in arm.runs]
        steps, mean, low, high = _band([found for _, found in points])
        if not len(steps):
            continue
        drawn, last = True, max(last, steps[-1])
        _line(left, steps, mean, low, high, look)
        everything.append((steps, low, high))
        pairs = [
            {step: value - base[seed][step] for step, value in found.items() if step in base[seed]}
            for seed, found in points
            if seed in base
        ]
        steps, mean, low, high = _band(pairs)
        if arm is not comparison.baseline and len(steps):
            _line(right, steps, mean, low, high, look)
            gaps.append((steps, low, high))
    if not drawn:
        return None
    left.set(title=f"{label(comparison.curve_metric)}, mean and range over seeds", ylabel=label(comparison.unit))
    right.set(title=f"minus {label(comparison.baseline.name, 24)} at the same seed")
    right.axhline(0, color=INK, linewidth=1)
    if not gaps:
        right.text(0.5, 0.5, "no seeds in common", transform=right.transAxes, ha="center", va="bottom")
    for axes, bands in ((left, everything), (right, gaps)):
        axes.set_xlabel("step")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, last)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
        _limit(axes, bands, last)
    _legend(figure, _handles(comparison))
    return figure


def flops(comparison: Comparison) -> Figure | None:
    """Validation loss against the training FLOPs spent, both axes logarithmic."""
    figure, drawn = _figure(3.8), []
    axes = figure.add_subplot()
    for arm, look in _looks(comparison):
        facts = next((run.facts for run in arm.runs if run.facts.get("flops_per_token")), None)
        steps, mean, low, high = _band([_points(run, comparison.curve_metric) for run in arm.runs])
        later = steps > 0
        if facts is None or not later.any():
            continue
        spent = steps[later] * facts["tokens"] / max(1, facts["steps"]) * facts["flops_per_token"]
        _line(axes, spent, mean[later], low[later], high[later], look)
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
    """Loss against learning rate on the selection seeds; the ringed point was chosen, a cross did not finish."""
    if not any(arm.tuned for arm in comparison.arms):
        return None
    figure = _figure(3.8)
    axes = figure.add_subplot()
    for arm, look in _looks(comparison):
        if arm.tuned is None:
            continue
        shown = [point for point in arm.tuned.points if point.mean is not None]
        axes.plot([p.lr for p in shown], [p.mean for p in shown], markersize=5.5, linewidth=1.6, **look)
        for point in shown:
            axes.plot([point.lr] * len(point.values), point.values, ".", color=look["color"], alpha=0.45, markersize=5)
            if point.lr == arm.tuned.best:
                axes.plot(point.lr, point.mean, "o", markersize=13, markerfacecolor="none", color=look["color"])
        lost = [point.lr for point in arm.tuned.points if len(point.values) < point.runs]
        axes.plot(
            lost,
            [0.97] * len(lost),
            "x",
            color=look["color"],
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


def _rendered(figure: Figure) -> tuple[bytes, str]:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    return png.getvalue(), text.replace(INK, "currentColor")


def _looks(comparison: Comparison) -> list[tuple[Arm, dict]]:
    """Each arm with its look; the baseline's is ink, and comes last where it lies over many."""
    base, *others = comparison.arms
    shown = others if len(others) <= MANY else sorted(others, key=_distance, reverse=True)[:FURTHEST]
    looks = {base.name: {"color": INK, "linestyle": "-", "marker": "o"}}
    for i, arm in enumerate(arm for arm in others if arm in shown):
        marker = MARKERS[(i + 1) % len(MARKERS)]
        looks[arm.name] = {"color": ARMS[i % len(ARMS)], "linestyle": DASHES[i % 4], "marker": marker}
    plain = [arm for arm in others if arm not in shown]
    return [(arm, PLAIN) for arm in plain] + [(arm, looks[arm.name]) for arm in comparison.arms if arm.name in looks]


def _distance(arm: Arm) -> float:
    return abs(arm.difference.mean) if arm.difference else -1.0


def _handles(comparison: Comparison) -> list:
    looks = _looks(comparison)
    handles = [
        Line2D([], [], linewidth=1.8, markersize=4, label=_described(arm, comparison), **look)
        for arm, look in looks
        if look is not PLAIN
    ]
    if plain := sum(look is PLAIN for _, look in looks):
        handles.append(Line2D([], [], linewidth=1.8, label=f"{plain} arms nearer to the baseline", **PLAIN))
    return handles


def _described(arm: Arm, comparison: Comparison) -> str:
    if arm is comparison.baseline:
        return f"{label(arm.name)} (baseline)"
    return f"{label(arm.name)} ({IDENTICAL})" if arm.verdict and arm.verdict.word == IDENTICAL else label(arm.name)


def _legend(figure: Figure, handles: list) -> None:
    """Below the axes, in as many columns as fit; the figure grows by the rows beyond the first."""
    lengths = [len(handle.get_label()) + 9 for handle in handles]
    for columns in range(len(handles), 0, -1):
        rows = -(-len(handles) // columns)
        if sum(max(lengths[i : i + rows]) for i in range(0, len(handles), rows)) <= 13 * WIDTH:
            break
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), fontsize=9.5, handlelength=2.6
    )


def _line(axes, x, mean, low, high, look) -> None:
    marker = {"markersize": 3.6} if len(x) <= 25 else {"marker": ""}
    axes.plot(x, mean, linewidth=0.9 if look is PLAIN else 1.7, **(look | marker))
    if look is not PLAIN:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _points(run: Run, metric: str) -> dict[float, float]:
    return dict(zip(*run.curve(metric), strict=True))


def _band(curves: list[dict[float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, lowest and highest over the curves that have come that far: one that diverged ends early."""
    steps = sorted(set().union(*curves)) if curves else []
    values = [[curve[step] for curve in curves if step in curve] for step in steps]
    return tuple(np.array(x) for x in (steps, *([of(v) for v in values] for of in (np.mean, min, max))))


def _pairs(arm: Arm, base: Arm) -> list[float]:
    theirs = dict(base.values)
    return [value - theirs[seed] for seed, value in arm.values if seed in theirs]


def _limit(axes, bands, last: float) -> None:
    """The first steps fall from ln(vocabulary) and would flatten the rest, so the frame begins a fifth into the run."""
    later = [(low[steps >= 0.2 * last], high[steps >= 0.2 * last]) for steps, low, high in bands]
    low, high = (
        (np.concatenate(side) if later else np.array([]) for side in zip(*later, strict=True)) if later else ([], [])
    )
    if len(low):
        high = np.quantile(high, 0.98)
        space = 0.08 * (high - min(low)) or 0.01
        axes.set_ylim(min(low) - space, high + space)
