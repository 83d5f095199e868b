"""Draw probes.html from metrics.jsonl: what the probes of one run saw, by depth and step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.output.escape import Html, html, join_html
from toolkit.output.sheet import sheet
from toolkit.probed import drawing
from toolkit.probed.rows import Key, ProbeTable, model_order, place, read
from toolkit.store import journal
from toolkit.store.disk import write_text

PICTURES = 80  # most pictures of one statistic; a model with more kinds of module shows the first


def draw(run_dir: Path) -> Path | None:
    """Write RUN/probes.html and return its path; None, and no page, if no probe wrote anything that can be read. Raises
    OSError if the page can't be written."""
    table = read(journal.read(run_dir / "metrics.jsonl"))
    if not table.keys:
        return None
    name = Path(os.path.abspath(run_dir)).name
    write_text(run_dir / "probes.html", page(name, table))
    return run_dir / "probes.html"


def page(name: str, table: ProbeTable) -> Html:
    """The page: a section for each probe, and in it for each statistic a picture for each kind of module."""
    depth = model_order(key.module for key in table.keys)
    by_statistic: dict[str, dict[str, list[Key]]] = {}
    for key in table.keys:
        by_statistic.setdefault(key.probe, {}).setdefault(key.statistic, []).append(key)
    steps = (
        f"step {table.steps[0]:,}"
        if len(table.steps) == 1
        else f"{len(table.steps):,} steps, {table.steps[0]:,} to {table.steps[-1]:,}"
    )
    body = [
        html("<h1>{}: what its probes saw</h1>", name),
        html('<p class="lead">{} at {}.</p>', ", ".join(by_statistic), steps),
        Html(
            '<p class="soft">A map has a row for each layer, the first at the top, and a column for each step. '
            "The number at the right is the last value of the row. The colours of each map go from its smallest to its "
            "largest value, shown below it. A place without colour has no value. Modules outside of the layers are "
            "curves, with their largest and smallest value at the right.</p>"
        ),
        *_not_finite(table),
    ]
    for probe, statistics in by_statistic.items():
        body.append(html("<h2>{}</h2>", probe))
        for statistic, keys in statistics.items():
            body += [html("<h3>{}</h3>", statistic), _pictures(table, keys, depth)]
    return sheet(f"{name}: probes", body, drawing.STYLE)


def _not_finite(table: ProbeTable) -> list[Html]:
    """A line about values that are infinite or no numbers."""
    if not table.not_finite:
        return []
    first = next(iter(table.not_finite))
    others = f" and {len(table.not_finite) - 1} more" if len(table.not_finite) > 1 else ""
    text = "values that are not finite and left out: {}{}"
    return [html('<div class="banner">{}</div>', text.format(first, others))]


def _pictures(table: ProbeTable, keys: Sequence[Key], depth: dict[str, int]) -> Html:
    """The pictures of a statistic, in the order of the model."""
    column = {key: i for i, key in enumerate(table.keys)}
    roles: dict[str, list[Key]] = {}
    for key in sorted(keys, key=lambda key: depth[key.module]):
        roles.setdefault(place(key.module).role, []).append(key)
    pictures = []
    for role, members in list(roles.items())[:PICTURES]:
        values = table.values[:, [column[key] for key in members]].T  # (modules, steps)
        layers = [place(key.module).layer for key in members]
        if len(members) > 1:
            pictures.append(drawing.depth_map(role, values, table.steps, layers))
        else:
            title = members[0].module or "the whole model"
            (curve,) = values
            pictures.append(drawing.curves(title, table.steps, [drawing.Series(curve, curve, curve)]))
    more = len(roles) - len(pictures)
    note = html('<p class="soft">{} more kinds of module are in metrics.jsonl.</p>', more) if more else Html("")
    return html('<div class="grid">{}</div>{}', join_html(pictures), note)
