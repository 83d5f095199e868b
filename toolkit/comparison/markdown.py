"""Writes the record as report.md. Every value is escaped, so that no name becomes a heading or a link."""

from __future__ import annotations

from toolkit.comparison import alike, probestext, text
from toolkit.comparison.probes import LISTED, ProbesRecord
from toolkit.comparison.record import Record
from toolkit.output.escape import Markdown, code_block
from toolkit.output.escape import markdown as md


def report(record: Record, pictures: dict[str, str]) -> str:
    """The content of report.md. ``pictures`` are {file name: caption}."""
    out: list[str] = [md("# {}", record["name"]), ""]
    if record["question"]:
        out += [md("**{}**", record["question"]), ""]
    out += [md("{}", record["headline"]), ""]
    out += [md("**{}**\n", one) for one in text.exclusions(record)]
    out += _verdicts(record)
    out += ["", md("{}", text.legend(record)), ""]
    out += [md("- **{}**: {}", arm["arm"], text.explanation(arm)) for arm in record["arms"][1:]]
    out += ["", "## Guards", "", *(_banners(record) or [md("{}.", _capital(text.no_banner(record)))])]
    out += [md("\n{}", each) for each in text.not_known(record)]
    if "probes" in record:
        out += ["", "## What changed first", "", *_probes(record["probes"])]
    if record["notes"]:
        out += ["", "## Notes", "", *_notes(record)]
    for file, caption in pictures.items():
        out += ["", md("![{}]({})", caption, file), "", md("{}", caption)]
    out += _by_item(record)
    out += _resolution(record)
    out += ["", md("## {} by seed", record["metric"]), "", *_seeds(record)]
    out += ["", "## Runs", "", *_runs(record)]
    if any(arm["lr"] for arm in record["arms"]):
        out += ["", "## Learning rates", "", *_rates(record)]
    if not record["table"]:
        out += ["", "## What differs from the baseline", ""]
        out += [
            md("- **{}**: {}", arm["arm"], "; ".join(arm["configuration"]) or "nothing") for arm in record["arms"][1:]
        ]
    out += ["", "## What the numbers mean", "", *(md("- **{}**: {}", *meaning) for meaning in text.meanings(record))]
    out += [
        "",
        "## How to repeat this comparison",
        "",
        code_block(text.commands(record)),
        "",
        md("{}", text.environment(record)),
    ]
    return "\n".join(out) + "\n"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _verdicts(record: Record) -> list[Markdown]:
    looks = text.has_looks(record)
    head = ["verdict", "arm", "n", *(["look"] * looks), "mean ± sd", "difference", text.interval_title(record)]
    head += [text.p_title(record), "steps to the baseline's loss"]
    rows = []
    for arm in record["arms"]:
        mean = text.spread(arm) + (" *" if arm["conditional"] and arm["n"] else "")
        row = [md("**{}**", text.verdict(arm)), arm["arm"], text.count(arm), *([text.look(arm)] * looks), mean]
        row.append(text.number(arm["difference"], "+"))
        rows.append([*row, text.interval(arm), text.p_value(arm["p_holm"]), text.steps(arm)])
    return _table(head, rows)


def _probes(record: ProbesRecord) -> list[Markdown]:
    out = [md("- {}", probestext.sentence(arm)) for arm in record["arms"]]
    if cells := probestext.table(record, LISTED):
        out += [Markdown(""), *_table(list(probestext.HEAD), [list(row) for row in cells])]
    return [*out, Markdown(""), *(md("- {}", note) for note in (*probestext.notes(record), probestext.legend(record)))]


def _banners(record: Record) -> list[Markdown]:
    out = []
    for group in alike.banners(record):
        out += [md("- **{}**: {}", group.guard, group.texts[0]), *_others(group)]
    return out


def _notes(record: Record) -> list[Markdown]:
    out = []
    for group in alike.notes(record):
        out += [md("- {}", group.texts[0]), *_others(group)]
    return out


def _others(group: alike.TextGroup) -> list[Markdown]:
    return [md("  - {} (each in compare.html)", group.others)] if group.others else []


def _by_item(record: Record) -> list[str]:
    head, rows = text.by_item(record)
    return ["", "## By item", "", *_table(head, rows)] if rows else []


def _resolution(record: Record) -> list[str]:
    head, rows = text.resolution(record)
    if not rows:
        return []
    sentences = [md("- {}", sentence) for sentence in text.without_separation(record)]
    return ["", "## What each metric can tell apart", "", *_table(head, rows), *([""] if sentences else []), *sentences]


def _seeds(record: Record) -> list[Markdown]:
    head, rows = text.by_seed(record)
    return _table(head, [[cell for cell, _ in row] for row in rows])


def _runs(record: Record) -> list[Markdown]:
    rows = [
        [run["run"], run["arm"], run["seed"], run["outcome"], text.number(run["value"]), run["reason"]]
        for run in record["runs"]
    ]
    rows += [[one["run"], one["arm"], "", "excluded by hand", "", one["reason"]] for one in record["excluded"]]
    return _table(["run", "arm", "seed", "outcome", record["metric"], "reason"], rows)


def _rates(record: Record) -> list[Markdown]:
    head, rows = text.rates(record)
    return _table(head, [[md("**{}**" if chosen else "{}", cell) for cell, chosen in row] for row in rows])


def _table(head: list, rows: list[list]) -> list[Markdown]:
    lines = [md("| " + " | ".join(["{}"] * len(row)) + " |", *row) for row in (head, *rows)]
    return [lines[0], Markdown("|" + "---|" * len(head)), *lines[1:]]
