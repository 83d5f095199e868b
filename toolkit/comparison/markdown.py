"""The record as report.md. Values go through ``escape.markdown``: no name becomes a heading or a link."""

from __future__ import annotations

from toolkit.comparison import alike, text
from toolkit.output.escape import Markdown, code_block
from toolkit.output.escape import markdown as md


def report(said: dict, pictures: dict[str, str]) -> str:
    """The whole of report.md; ``pictures`` are {file name: caption}."""
    out = [md("# {}", said["name"]), ""]
    if said["question"]:
        out += [md("**{}**", said["question"]), ""]
    out += [md("{}", said["headline"]), ""]
    out += [md("**{}**\n", one) for one in text.exclusions(said)]
    out += [*_verdicts(said), "", md("{}", text.legend(said)), ""]
    out += [md("- **{}**: {}", arm["arm"], text.explained(arm)) for arm in said["arms"][1:]]
    out += ["", "## Guards", "", *(_banners(said) or ["None fired."])]
    if said["notes"]:
        out += ["", "## Notes", "", *_notes(said)]
    for file, caption in pictures.items():
        out += ["", md("![{}]({})", caption, file), "", md("{}", caption)]
    out += ["", md("## {} by seed", said["metric"]), "", *_seeds(said)]
    out += ["", "## Runs", "", *_runs(said)]
    if any(arm["lr"] for arm in said["arms"]):
        out += ["", "## Learning rates", "", *_rates(said)]
    out += ["", "## What differs from the baseline", ""]
    out += [md("- **{}**: {}", arm["arm"], "; ".join(arm["configuration"]) or "nothing") for arm in said["arms"][1:]]
    out += ["", "## What the numbers mean", "", *(md("- **{}**: {}", *meaning) for meaning in text.meanings(said))]
    out += ["", "## How to repeat it", "", code_block(text.commands(said)), "", md("{}", text.environment(said))]
    return "\n".join(out) + "\n"


def _verdicts(said: dict) -> list[Markdown]:
    level = f"{1 - said['alpha']:.0%} interval"
    head = ["verdict", "arm", "n", "mean ± sd", "difference", level, "p (Holm)", "steps to the baseline's loss"]
    rows = []
    for arm in said["arms"]:
        mean = text.spread(arm) + (" *" if arm["conditional"] and arm["n"] else "")
        row = [md("**{}**", text.verdict(arm)), arm["arm"], text.count(arm), mean, text.number(arm["difference"], "+")]
        rows.append([*row, text.ends(arm), text.p(arm["p_holm"]), text.steps(arm)])
    return _table(head, rows)


def _banners(said: dict) -> list[Markdown]:
    out = []
    for group in alike.banners(said):
        out += [md("- **{}**: {}", group.guard, group.texts[0]), *_others(group)]
    return out


def _notes(said: dict) -> list[Markdown]:
    out = []
    for group in alike.notes(said):
        out += [md("- {}", group.texts[0]), *_others(group)]
    return out


def _others(group: alike.Alike) -> list[Markdown]:
    return [md("  - {} (each in compare.html)", group.others)] if group.others else []


def _seeds(said: dict) -> list[Markdown]:
    head, rows = text.by_seed(said)
    return _table(head, [[cell for cell, _ in row] for row in rows])


def _runs(said: dict) -> list[Markdown]:
    keys = ("run", "arm", "seed", "outcome")
    rows = [[*(run[key] for key in keys), text.number(run["value"]), run["reason"]] for run in said["runs"]]
    rows += [[one["run"], one["arm"], "", "excluded by hand", "", one["reason"]] for one in said["excluded"]]
    return _table([*keys, said["metric"], "reason"], rows)


def _rates(said: dict) -> list[Markdown]:
    head, rows = text.rates(said)
    return _table(head, [[md("**{}**" if chosen else "{}", cell) for cell, chosen in row] for row in rows])


def _table(head: list, rows: list[list]) -> list[Markdown]:
    lines = [md("| " + " | ".join(["{}"] * len(row)) + " |", *row) for row in (head, *rows)]
    return [lines[0], Markdown("|" + "---|" * len(head)), *lines[1:]]
