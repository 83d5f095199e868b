"""Small pictures as SVG for a page: a map of layers by steps, and curves over steps. They need no script, and their
text and lines have the colours of the page, light or dark. Each map is an image of one pixel a value."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.output.escape import Html, html, join_html, line, shorten

Array = NDArray[np.float64]
WIDTH, LEFT, RIGHT, TOP = 320, 36, 52, 18  # of a picture, in units of its coordinates
COLUMNS = 240  # most steps of a map that are drawn
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # matplotlib, CC0
ABOVE, BELOW = (214, 96, 30), (42, 134, 200)  # of differences: orange is above the baseline, blue below
STYLE = Html("""
h3 { font-size: .98rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .6rem 1.4rem; }
.grid figure { margin: 0; } .grid svg { width: 100%; height: auto; display: block; overflow: visible; }
.grid text { fill: var(--soft); font-size: 10px; font-variant-numeric: tabular-nums; }
.grid text.t { fill: var(--ink); font-size: 11px; font-weight: 600; } .grid text.e { text-anchor: end; }
.grid image { image-rendering: pixelated; } .grid .frame { fill: none; stroke: var(--line); }
.grid .mark { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.grid polyline, .grid .dot { stroke-width: 1.8; fill: none; } .grid .band { opacity: .18; }
.grid .c0 { stroke: var(--ink); } .grid .band.c0, .grid .dot.c0 { fill: var(--ink); } .grid .band { stroke: none; }
.grid .c1 { stroke: var(--worse); } .grid .band.c1, .grid .dot.c1 { fill: var(--worse); }
.grid .cut { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
""")


@dataclass(frozen=True)
class Series:
    """A curve: ``mean``, ``low`` and ``high`` are (steps,); nan leaves a gap."""

    mean: Array
    low: Array
    high: Array


def number(value: float) -> str:
    """A number in at most 8 characters, such as "0.0123", "1.2e-05" or "12,300"."""
    if not np.isfinite(value):
        return "–"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def depth_map(title: str, values: Array, steps: Sequence[int], layers: Sequence[object]) -> Html:
    """A map of a statistic: (layers, steps), the first layer at the top, with the last value of each row. The colours
    go from the smallest value to the largest, evenly in the logarithm if all values are positive and far apart."""
    shown, low, high, is_log = _scaled(values)
    colours = _viridis(shown)
    last = [row[np.isfinite(row)][-1] if np.isfinite(row).any() else np.nan for row in values]
    bar = _image(_viridis(np.linspace(0, 1, 64))[None], WIDTH / 2 - 40, 0, 80, 6)
    ends = f"{number(low)}", f"{number(high)}" + (" (log)" if is_log else "")
    legend = _svg(
        '<text class="e" x="{}" y="7">{}</text>{}<text x="{}" y="7">{}</text>',
        *(WIDTH / 2 - 45, ends[0], bar, WIDTH / 2 + 45, ends[1]),
    )
    label = f"{title}: {number(low)} to {number(high)} over {len(layers)} layers"
    return _map(title, label, colours, steps, layers, list(map(number, last)), legend, ())


def difference_map(
    title: str,
    sizes: Array,
    steps: Sequence[int],
    layers: Sequence[object],
    limit: float,
    marks: Sequence[tuple[int, int]] = (),
) -> Html:
    """A map of differences (layers, steps) from -limit, blue, over 0, without colour, to +limit, orange. ``marks`` are
    (layer, step) indices that get a frame. At the right is the largest difference of each row."""
    strength = np.clip(np.nan_to_num(np.abs(sizes)) / limit, 0, 1)
    colours = np.empty((*sizes.shape, 4), np.uint8)
    colours[..., :3] = np.where((sizes > 0)[..., None], ABOVE, BELOW)
    colours[..., 3] = np.round(255 * strength)
    ends = [row[np.nanargmax(np.abs(row))] if np.isfinite(row).any() else np.nan for row in sizes]
    texts = [
        f"{end:+.1f}" if abs(end) < 99.5 else f"{np.sign(end) * 99:+.0f}…" if np.isfinite(end) else "–" for end in ends
    ]
    return _map(title, f"{title}: differences in sd of the seeds", colours, steps, layers, texts, Html(""), marks)


def _map(
    title: str,
    label: str,
    colours: NDArray[np.uint8],
    steps: Sequence[int],
    layers: Sequence[object],
    texts: Sequence[str],
    legend: Html,
    marks: Sequence[tuple[int, int]],
) -> Html:
    rows = len(layers)
    height = min(13.0, max(4.0, 156 / rows))
    width = WIDTH - LEFT - RIGHT
    every = max(1, int(np.ceil(10.5 / height)))
    shown = [i for i in range(rows) if i % every == 0]
    y = [TOP + (i + 0.5) * height + 3.5 for i in range(rows)]
    bottom = TOP + rows * height
    pieces = [
        _title(title),
        _image(colours[:, _columns(len(steps))], LEFT, TOP, width, rows * height),
        _svg('<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>', LEFT, TOP, width, rows * height),
        *(_svg('<text class="e" x="{}" y="{}">{}</text>', LEFT - 5, y[i], layers[i]) for i in shown),
        *(_svg('<text x="{}" y="{}">{}</text>', WIDTH - RIGHT + 5, y[i], texts[i]) for i in shown),
        *(_mark(layer, step, height, width / max(1, len(steps))) for layer, step in marks),
        _step_labels(steps, bottom + 11),
        _svg('<g transform="translate(0 {})">{}</g>', bottom + 15, legend),
    ]
    return _picture(label, bottom + (26 if legend else 15), pieces)


def curves(
    title: str, steps: Sequence[int], series: Sequence[Series], cut: int | None = None, height: float = 70
) -> Html:
    """Curves over steps with bands from low to high. Colour 0 is that of text, for a run or a baseline; colour 1 is
    another arm's. ``cut`` is a step that gets a dashed line."""
    top, width = TOP, WIDTH - LEFT - RIGHT
    arrays = [x for each in series for x in (each.mean, each.low, each.high)]
    finite = np.concatenate([x[np.isfinite(x)] for x in arrays]) if arrays else np.empty(0)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    first, last = (steps[0], steps[-1]) if len(steps) else (0, 1)

    def x_of(step: float) -> float:
        return LEFT + width * (step - first) / max(1, last - first)

    def y_of(value: float) -> float:
        return top + height * (high - value) / (high - low)

    pieces = [_title(title)]
    keep = [step in set(_columns(len(steps))) for step in range(len(steps))]
    for colour, each in enumerate(series):
        points = [
            (x_of(step), *(y_of(v) for v in values))
            for step, use, *values in zip(steps, keep, each.mean, each.low, each.high, strict=True)
            if use and np.isfinite(values).all()
        ]
        if len(points) > 1:
            outline = [(x, y) for x, _, y, _ in points] + [(x, y) for x, _, _, y in reversed(points)]
            pieces.append(_svg('<polygon class="band c{}" points="{}"/>', colour, _points(outline)))
            line_points = _points([(x, y) for x, y, *_ in points])
            pieces.append(_svg('<polyline class="c{}" points="{}"/>', colour, line_points))
        elif points:
            pieces.append(_svg('<circle class="dot c{}" cx="{}" cy="{}" r="2"/>', colour, *points[0][:2]))
    if cut is not None:
        x = x_of(cut)
        pieces.append(_svg('<line class="cut" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>', x, top, top + height))
    last_value = series[0].mean[np.isfinite(series[0].mean)][-1:].tolist() if series else []
    pieces += [
        _svg('<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>', LEFT, top, width, height),
        _svg('<text x="{}" y="{}">{}</text>', WIDTH - RIGHT + 5, top + 8, number(high)),
        _svg('<text x="{}" y="{}">{}</text>', WIDTH - RIGHT + 5, top + height, number(low)),
        _step_labels(steps, top + height + 11),
    ]
    shown = number(last_value[0]) if len(last_value) else "no values"
    return _picture(f"{title}: at the end {shown}", top + height + 15, pieces)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _title(title: str) -> Html:
    return _svg('<text class="t" x="{}" y="11">{}</text>', LEFT, shorten(line(title), 44))


def _step_labels(steps: Sequence[int], y: float) -> Html:
    if not len(steps):
        return Html("")
    end = _svg('<text class="e" x="{}" y="{}">{}</text>', WIDTH - RIGHT, y, f"{steps[-1]:,}")
    start = _svg('<text x="{}" y="{}">{}</text>', LEFT, y, f"step {steps[0]:,}")
    return join_html([start, end] if len(steps) > 1 else [start])


def _mark(layer: int, step: int, height: float, width: float) -> Html:
    size = max(width, 3.0)
    x = LEFT + min(step * width, WIDTH - LEFT - RIGHT - size)
    template = '<rect class="mark" x="{}" y="{}" width="{}" height="{}"/>'
    return _svg(template, x, TOP + layer * height, size, height)


def _picture(label: str, height: float, pieces: Sequence[Html]) -> Html:
    template = '<figure><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    return _svg(template, WIDTH, height, shorten(line(label), 200), join_html(pieces))


def _columns(steps: int) -> list[int]:
    """The indices of the steps that are drawn: all, or COLUMNS of them."""
    return list(range(steps)) if steps <= COLUMNS else np.linspace(0, steps - 1, COLUMNS).round().astype(int).tolist()


def _scaled(values: Array) -> tuple[Array, float, float, bool]:
    """Values between 0 and 1, the smallest and the largest value, and whether the scale is logarithmic."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return values, np.nan, np.nan, False
    low, high = float(finite.min()), float(finite.max())
    is_log = low > 0 and high > 20 * low
    if is_log:
        values = np.log(values)
    bottom, top = (np.log(low), np.log(high)) if is_log else (low, high)
    return (
        (values - bottom) / (top - bottom) if top > bottom else np.where(np.isnan(values), np.nan, 0.5),
        low,
        high,
        is_log,
    )


def _viridis(shares: Array) -> NDArray[np.uint8]:
    """Colours (..., 4) of numbers between 0 and 1; nan is transparent."""
    colours = np.empty((*shares.shape, 4), np.uint8)
    clean = np.clip(np.nan_to_num(shares), 0, 1)
    for channel in range(3):
        anchors = [colour[channel] for colour in VIRIDIS]
        colours[..., channel] = np.round(np.interp(clean, np.linspace(0, 1, len(VIRIDIS)), anchors))
    colours[..., 3] = np.where(np.isnan(shares), 0, 255)
    return colours


def _image(colours: NDArray[np.uint8], x: float, y: float, width: float, height: float) -> Html:
    """An image of colours (rows, columns, 4), stretched to a rectangle."""
    template = (
        '<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="data:image/png;base64,{}"/>'
    )
    return _svg(template, x, y, width, height, base64.b64encode(_png(colours)).decode())


def _png(colours: NDArray[np.uint8]) -> bytes:
    """A PNG file of colours (rows, columns, 4)."""
    rows, columns, _ = colours.shape
    lines = b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in colours)  # 0: no filter
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)  # 8 bits, red green blue alpha
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def _svg(template: str, *values: object) -> Html:
    """Fill a template; coordinates are rounded to a tenth."""
    return html(template, *(f"{value:.1f}" if isinstance(value, float) else value for value in values))
