"""Writes the record and its pictures as one HTML page that loads nothing else: style and figures are inside.

Every value goes through ``toolkit.output.escape.html``, which escapes everything that is not of the type Html."""

from __future__ import annotations

import re
from collections.abc import Iterable

from toolkit.comparison import alike, probespage, text
from toolkit.comparison.record import ArmRecord, Record
from toolkit.output.escape import Html, html, join_html
from toolkit.output.sheet import sheet, table

PROBE_ROWS = 6  # cells of an arm that are listed; probes.html has more
WORDS = ("better", "worse", "equivalent", "inconclusive")  # verdicts that have a colour


def page(record: Record, pictures: dict[str, tuple[str, str]]) -> Html:
    """The whole HTML page. ``pictures`` are {name: (caption, SVG)}."""
    body = [
        html("<h1>{}</h1>", record["question"] or record["name"]),
        html('<p class="lead">{}</p>', record["headline"]),
        *(html('<div class="banner">{}</div>', one) for one in text.exclusions(record)),
        html('<div class="verdicts">{}</div>', _verdicts(record)),
        html('<p class="soft">{}.</p>', text.legend(record)),
        Html("<h2>Guards</h2>"),
        *_guards(record),
        *_probes(record),
        Html("<h2>Figures</h2>"),
        *(_figure(caption, svg) for caption, svg in pictures.values()),
        Html("<h2>Why each verdict</h2>"),
        _definition_list((arm["arm"], text.explanation(arm)) for arm in record["arms"][1:]),
        *_by_item(record),
        *_resolution(record),
        *_costs(record),
        *_rates(record),
        html("<h2>{} by seed</h2>", record["metric"]),
        _seeds(record),
        Html("<h2>All runs</h2>"),
        _runs(record),
        *_configurations(record),
        Html("<h2>What the numbers mean</h2>"),
        _definition_list(text.meanings(record)),
        Html("<h2>How to repeat this comparison</h2>"),
        html("<pre>{}</pre>", join_html(text.commands(record), "\n")),
        html('<p class="soft">{}</p>', text.environment(record)),
    ]
    return sheet(record["question"] or record["name"], body)


def _verdicts(record: Record) -> Html:
    looks = text.has_looks(record)
    head = ["verdict", "arm", "n", *(["look"] * looks), "mean ± sd", "difference", text.interval_title(record)]
    head += [text.p_title(record), "in noise sd"]
    rows = []
    for arm in record["arms"]:
        low, high = (text.number(arm[end], "+") for end in ("low", "high"))
        mean = text.spread(arm) + (" *" if arm["conditional"] and arm["n"] else "")
        numbers = [text.count(arm), *([text.look(arm)] * looks), mean, text.number(arm["difference"], "+")]
        numbers.append(f"{low} to {high}" if low else "")
        numbers += [text.p_value(arm["p_holm"]), text.formatted(arm["in_noise_sd"], "+.1f")]
        rows.append([("k", _verdict_cell(arm)), ("a", arm["arm"]), *(("n", cell) for cell in numbers)])
    return table(head, rows, left=2)


def _verdict_cell(arm: ArmRecord) -> Html:
    colour = arm["verdict"] if arm["verdict"] in WORDS else ""
    word = html('<span class="word {}">{}</span>', colour, arm["verdict"])
    if arm["needs"] is None:
        return word
    return html('{}<br><span class="soft">{}</span>', word, text.needed(arm))


def _guards(record: Record) -> list[Html]:
    nothing = text.no_banner(record)
    style = "note" if record["table"] else "clean"
    clean = html('<div class="{}">{}.</div>', style, nothing[:1].upper() + nothing[1:])
    shown = [_banner(group) for group in alike.banners(record)]
    unknown = [html('<div class="note">{}</div>', each) for each in text.not_known(record)]
    return [*(shown or [clean]), *unknown, *(_note(group) for group in alike.notes(record))]


def _probes(record: Record) -> list[Html]:
    """What changed first, if the comparison was made with --probes."""
    if "probes" not in record:
        return []
    link = Html('<p><a href="probes.html">Curves and maps of what changed</a></p>')
    return [Html("<h2>What changed first</h2>"), *probespage.section(record["probes"], PROBE_ROWS), link]


def _banner(group: alike.TextGroup) -> Html:
    return html('<div class="banner"><b>{}</b> {}</div>', group.guard, _foldable(group))


def _note(group: alike.TextGroup) -> Html:
    return html('<div class="note soft">{}</div>', _foldable(group))


def _foldable(group: alike.TextGroup) -> Html:
    """The text of a group. With several texts: the first one, and a list of all that the reader can unfold."""
    if not group.others:
        return html("{}", group.texts[0])
    every = join_html(html("<li>{}</li>", each) for each in group.texts)
    return html("{}<details><summary>{}</summary><ul>{}</ul></details>", group.texts[0], group.others, every)


def _figure(caption: str, svg: str) -> Html:
    """A picture with its caption. Its SVG was drawn here and its letters are paths, so it needs no escaping."""
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    accessible_name = html('role="img" aria-label="{}"', caption)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', lambda match: match[1] + accessible_name, svg, count=1)
    return html("<figure>{}<figcaption>{}</figcaption></figure>", Html(svg), caption)


def _by_item(record: Record) -> list[Html]:
    head, rows = text.by_item(record)
    if not rows:
        return []
    return [Html("<h2>By item</h2>"), table(head, [_cells(row) for row in rows], left=1)]


def _resolution(record: Record) -> list[Html]:
    head, rows = text.resolution(record)
    if not rows:
        return []
    cells = [
        [("k", metric), ("", unit), *(("n", cell) for cell in numbers), ("a", between), ("n", p), ("k", apart)]
        for metric, unit, *numbers, between, p, apart in rows
    ]
    classes = ("", "", "n", "n", "n", "n", "n", "", "n", "")
    sentences = [html("<p>{}</p>", sentence) for sentence in text.without_separation(record)]
    return [Html("<h2>What each metric can tell apart</h2>"), table(head, cells, classes=classes), *sentences]


def _cells(row: list[str]) -> list[tuple[str, str]]:
    return [("a", row[0]), *(("n", cell) for cell in row[1:])]


def _configurations(record: Record) -> list[Html]:
    if record["table"]:
        return []
    pairs = ((arm["arm"], "; ".join(arm["configuration"]) or "nothing") for arm in record["arms"][1:])
    return [Html("<h2>What differs from the baseline</h2>"), _definition_list(pairs)]


def _costs(record: Record) -> list[Html]:
    if record["table"]:
        return []
    rows = [[("a", arm["arm"]), *(("n", cell) for cell in text.cost(arm))] for arm in record["arms"]]
    title = html("<h2>Cost to reach the last loss of the baseline ({})</h2>", record["baseline"])
    return [title, table(["arm", "steps", "training FLOPs", "seconds"], rows, left=1)]


def _rates(record: Record) -> list[Html]:
    if not any(arm["lr"] for arm in record["arms"]):
        return []
    head, rows = text.rates(record)
    cells = [
        [("a", name), *(("n", html("<b>{}</b>" if chosen else "{}", cell)) for cell, chosen in points)]
        for (name, _), *points in rows
    ]
    note = '<p class="soft">Means over the selection seeds. Each arm is judged at its rate in bold, on other seeds.</p>'
    return [Html("<h2>Learning rates</h2>"), table(head, cells, left=1), Html(note)]


def _seeds(record: Record) -> Html:
    head, rows = text.by_seed(record)
    if len(head) > len(rows):  # with many arms, each arm is a row
        head, rows = _transposed(head, rows)
    cells = [
        [("a", name), *(("n", html('<span class="lost">{}</span>' if lost else "{}", cell)) for cell, lost in values)]
        for (name, _), *values in rows
    ]
    return table(head, cells, left=1)


def _transposed(head: list[str], rows: list) -> tuple[list[str], list]:
    columns = list(zip(*rows, strict=True)) or [()]
    return ["arm", *(f"seed {cell}" for cell, _ in columns[0])], [
        [(arm, False), *column] for arm, column in zip(head[1:], columns[1:], strict=True)
    ]


def _runs(record: Record) -> Html:
    rows = []
    for run in record["runs"]:
        lost = "" if run["outcome"] == "finished" else "lost"
        numbers = [text.number(run["value"]), text.formatted(run["step"], ","), text.formatted(run["seconds"], ",.0f")]
        outcome = html('<span class="{}">{}</span>', lost, run["outcome"])
        row = [("a", run["run"]), ("n", run["seed"]), ("", outcome), *(("n", cell) for cell in numbers)]
        rows.append([*row, ("a", run["reason"])])
    for one in record["excluded"]:
        outcome = Html('<span class="lost">excluded by hand</span>')
        rows.append([("a", one["run"]), ("n", ""), ("", outcome), *[("n", "")] * 3, ("a", one["reason"])])
    head = ["run", "seed", "outcome", record["metric"], "step", "seconds", "reason"]
    classes = ("", "n", "", "n", "n", "n", "")
    return table(head, rows, classes=classes)


def _definition_list(pairs: Iterable[tuple[str, str]]) -> Html:
    return html("<dl>{}</dl>", join_html(html("<dt>{}</dt><dd>{}</dd>", name, what) for name, what in pairs))
