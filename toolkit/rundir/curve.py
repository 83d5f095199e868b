"""Draw curve.png from metrics.jsonl: the training and validation loss of one run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.output.escape import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VAL = "#3b6fa0", "#c8553d"
MANY = 150  # with this many points or more, a smoothed line is easier to read than the values


def draw(run_dir: Path) -> Path:
    """Draw training and validation loss, in nats per token, against steps; returns the picture's path. Values that
    aren't finite and lines that can't be read are left out. A run without any value gives an empty frame that says so.
    """
    from matplotlib.figure import Figure  # imported late, since it takes half a second
    from matplotlib.ticker import MaxNLocator

    run_dir = Path(run_dir).resolve()
    rows = _rows(run_dir / "metrics.jsonl")
    steps, loss = _series(rows, "train/loss_nats")
    val_steps, val_loss = _series(rows, "val/loss_nats")

    figure = Figure(figsize=(1000 / 150, 560 / 150), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(label(run_dir.name, 80), loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")

    if len(steps) >= MANY:
        axes.plot(steps, loss, color=TRAIN, alpha=0.3, linewidth=0.7)
        axes.plot(steps, _smooth(loss, len(steps) // 50), color=TRAIN, linewidth=1.5, label="training, smoothed")
    elif len(steps):
        axes.plot(steps, loss, color=TRAIN, linewidth=1.3, label="training")
    if len(val_steps):
        _draw_validation(axes, val_steps, val_loss)
    if len(steps) or len(val_steps):
        axes.set_ylim(*_limits([(steps, loss), (val_steps, val_loss)]))
        end = max(1, *steps[-1:], *val_steps[-1:])
        axes.set_xlim(-0.02 * end, 1.02 * end)
        axes.legend(frameon=False, loc="upper right", fontsize=9)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color="0.5")
    # A note: a second axis for tokens would take a tenth of the picture and show no more.
    if tokens := max((row["tokens"] for row in rows if isinstance(row.get("tokens"), int)), default=0):
        size, unit = next(s for s in ((1e9, " billion"), (1e6, " million"), (1, "")) if tokens >= s[0])
        count = f"{tokens / size:.3g}{unit} tokens" if unit else f"{tokens:,} tokens"
        axes.set_title(count, loc="right", fontsize=8.5, color="0.4")

    draft = run_dir / "curve.png.tmp"
    figure.savefig(draft, format="png")
    os.replace(draft, run_dir / "curve.png")
    return run_dir / "curve.png"


def _draw_validation(axes: Axes, steps: np.ndarray, loss: np.ndarray) -> None:
    """Draw the validation losses as points, with the value of the last; both arrays are (N,)."""
    axes.plot(
        steps,
        loss,
        "o",
        color=VAL,
        label="validation",
        zorder=3,
        markersize=4.5 if len(steps) <= 60 else 2.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )
    axes.annotate(
        f"{loss[-1]:.4f}",
        (steps[-1], loss[-1]),
        xytext=(7, 0),  # to the right of the last point: above it, the label would cover the training loss
        textcoords="offset points",
        annotation_clip=False,
        verticalalignment="center",
        color=VAL,
        fontsize=9,
        fontweight="bold",
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects in the file that have a step. Other lines are skipped, such as the half line of a killed process."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, both (N,), sorted by step. If a step has two values, the later is used."""
    values = {row["step"]: row[name] for row in rows if isinstance(row.get(name), (int, float))}
    points = sorted((step, value) for step, value in values.items() if np.isfinite(value))
    return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points], dtype=float)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Centred mean over ``reach`` neighbours on each side, fewer near the ends; (N,) as ``values``."""
    positions = np.arange(len(values))
    reaches = np.minimum(np.minimum(positions, positions[::-1]), reach)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[positions + reaches + 1] - sums[positions - reaches]) / (2 * reaches + 1)


def _limits(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The y range as (low, high). In the first steps the loss falls from ln(vocabulary), which would flatten the rest
    of the curve. So the top is the highest loss after a fiftieth of the run, and the curve enters from above."""
    last = max(steps[-1] for steps, _ in series if len(steps))
    all_values = np.concatenate([values for _, values in series])
    later = np.concatenate([values[steps >= last / 50] for steps, values in series])
    # A spike or a late divergence must not flatten it either: one value in a hundred may lie outside, but never the
    # last validation loss, which is the last value of the last series.
    final = series[-1][1][-1:]
    low, high = all_values.min(), max([np.quantile(later, 0.99, method="higher"), *final])
    space = 0.06 * (high - low) or 0.5
    return float(low - space), float(high + space)
