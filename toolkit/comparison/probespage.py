"""Writes compare/probes.html: where each arm changed first, and how what probes saw differs, by depth and step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.comparison import probestext
from toolkit.comparison.probes import LISTED, ArmCells, ProbesRecord
from toolkit.output.escape import Html, html, join_html
from toolkit.output.sheet import sheet, table
from toolkit.probed import drawing
from toolkit.probed.rows import place, statistics

LIMIT = 10.0  # in sd of the seeds: larger differences have the full colour
CURVES = 6  # most curves of an arm
PICTURES = 60  # most maps of one statistic


def page(title: str, baseline: str, record: ProbesRecord, arms: Sequence[ArmCells]) -> Html:
    """The page: the answer, then for each arm the curves of its location and a map of each kind of module."""
    body = [html("<h1>What changed first: {}</h1>", title), *section(record, LISTED)]
    for arm in arms:
        body += [html("<h2>{}</h2>", arm.name), *_curves(arm, baseline), *_maps(arm, baseline)]
    return sheet(f"{title}: what changed first", body, drawing.STYLE)


def section(record: ProbesRecord, most: int) -> list[Html]:
    """The answer for each arm, a table of at most ``most`` cells an arm, and notes."""
    body = [html("<p>{}</p>", probestext.sentence(arm)) for arm in record["arms"]]
    if cells := probestext.table(record, most):
        classes = ("a", "n", "a", "a", "n", "n", "n", "n")
        rows = [list(zip(classes, row, strict=True)) for row in cells]
        head = ["n" if cls == "n" else "" for cls in classes]
        body.append(table(list(probestext.HEAD), rows, classes=tuple(head)))
    body += [html('<p class="soft">{}</p>', note) for note in (*probestext.notes(record), probestext.legend(record))]
    return body


def _curves(arm: ArmCells, baseline: str) -> list[Html]:
    """The curves of both arms at the location and the next cells, with their range over the seeds."""
    pictures = []
    for step, key in arm.first[:CURVES]:
        what = arm.keys[key]
        title = f"{what.probe}/{what.statistic} {what.module}"
        both = [_series(values[:, key]) for values in (arm.base, arm.arm)]
        pictures.append(drawing.curves(title, arm.steps, both, cut=arm.steps[step]))
    if not pictures:
        return []
    note = (
        '<p class="soft">Mean and range over the seeds: {} in the colour of the text, {} in orange. The dashed line is '
        "the step at which it changed first.</p>"
    )
    return [html('<div class="grid">{}</div>', join_html(pictures)), html(note, baseline, arm.name)]


def _series(values: NDArray[np.float64]) -> drawing.Series:
    """Mean and range over the runs of values (steps, runs)."""
    with warnings.catch_warnings():  # a step without values is nan
        warnings.simplefilter("ignore", RuntimeWarning)
        return drawing.Series(np.nanmean(values, -1), np.nanmin(values, -1), np.nanmax(values, -1))


def _maps(arm: ArmCells, baseline: str) -> list[Html]:
    """For each statistic a map of the differences of each kind of module."""
    note = (
        '<p class="soft">Differences from {} in standard deviations of the seeds: orange is above it, blue below, and '
        "the full colour is ±{} or more. Layers from the top, steps from the left; the number at the right is the "
        "largest difference of the row. A frame marks what changed first.</p>"
    )
    body = [html(note, baseline, f"{LIMIT:g}")]
    for family in statistics(arm.keys):
        keys = [i for i, key in enumerate(arm.keys) if (key.probe, key.statistic) == family]
        roles: dict[str, list[int]] = {}
        for i in sorted(keys, key=lambda i: arm.depth[arm.keys[i].module]):
            roles.setdefault(place(arm.keys[i].module).role or "the whole model", []).append(i)
        pictures = []
        for role, members in list(roles.items())[:PICTURES]:
            layers = [place(arm.keys[i].module).layer for i in members]
            marks = [(members.index(key), step) for step, key in arm.first[:LISTED] if key in members]
            sizes = arm.cells.size[:, members].T
            names = ["" if layer is None else layer for layer in layers]
            pictures.append(drawing.difference_map(role, sizes, arm.steps, names, LIMIT, marks))
        body += [html("<h3>{}/{}</h3>", *family), html('<div class="grid">{}</div>', join_html(pictures))]
        if len(roles) > len(pictures):
            body.append(html('<p class="soft">{} more kinds of module are not drawn.</p>', len(roles) - len(pictures)))
    return body
