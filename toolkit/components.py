"""``python -m toolkit.components [list | show NAME]``: what is on the shelf, asked of the catalogue itself."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import textwrap
from pathlib import Path

from toolkit.command import run_command


def describe(entry) -> dict[str, object]:
    """One part as plain values: kind, name, summary, knobs with their defaults, paper, file, overlay."""
    text = inspect.cleandoc(entry.cls.__doc__ or "")
    paper = re.search(r"arXiv:\d{4}\.\d{4,5}", text)
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "knobs": {knob: _default(parameter) for knob, parameter in entry.knobs.items()},
        "paper": paper.group() if paper else None,
        "file": _relative(inspect.getsourcefile(entry.cls)),
        "overlay": _overlay(entry),
    }


def markdown() -> str:
    """The table of parts that the README shows: all but the experiment itself, in the order of the kinds."""
    from toolkit.protocols import KINDS

    lines = ["| kind | parts |", "|---|---|"]
    for kind in KINDS:
        names = [f"`{entry.name}`" for entry in _shelf() if entry.kind == kind]
        if names and kind != "experiment":
            lines.append(f"| {kind} | {', '.join(names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    from toolkit import report
    from toolkit.compose import load_shelf
    from toolkit.registry import CATALOG

    load_shelf(arguments.imports)
    if arguments.action == "show":
        if arguments.name not in CATALOG:
            raise ValueError(f"there is no part {arguments.name!r}; list them with python -m toolkit.components list")
        return _show(CATALOG[arguments.name], arguments.json)
    rows = [describe(e) for e in CATALOG.values() if e.kind != "experiment" and arguments.kind in (None, e.kind)]
    if arguments.json:
        report.say(json.dumps(rows))
        return 0
    from rich.table import Table

    for kind in dict.fromkeys(row["kind"] for row in rows):
        table = Table(
            title=f"[bold]{kind}[/bold]", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0)
        )
        for column, least in (("name", 20), ("what it is", None), ("knobs", None), ("paper", 16)):
            table.add_column(column, min_width=least, no_wrap=least is not None)
        for row in (row for row in rows if row["kind"] == kind):
            knobs = ", ".join(k if v is None else f"{k}={v}" for k, v in row["knobs"].items())
            summary = re.sub(
                r",? ?\(?arXiv:[\d.]+\)?|``", lambda m: ")" if m.group().startswith(",") else "", row["summary"]
            )
            table.add_row(row["name"], summary, knobs, row["paper"] or "")
        report.console.print(table)
        report.say("")
    return 0


def _show(entry, as_json) -> int:
    from toolkit import report
    from toolkit.registry import CATALOG

    told = describe(entry)
    if as_json:
        report.say(json.dumps(told | {"docstring": inspect.cleandoc(entry.cls.__doc__ or "")}))
        return 0
    signature = inspect.signature(entry.cls)
    report.say(f"{entry.name}{signature}\n\n{textwrap.indent(inspect.cleandoc(entry.cls.__doc__ or ''), '    ')}\n")
    report.say(f"kind: {entry.kind}\nfile: {told['file']}\noverlay: {told['overlay'] or 'none'}")
    owner = "GPT" if entry.kind in CATALOG["GPT"].knobs else "Experiment"
    slot, value = ("loggers", f"[@{entry.name}]") if entry.kind == "logger" else (entry.kind, f"@{entry.name}")
    report.say(f"binding: {owner}.{slot} = {value}")
    return 0


def _default(parameter):
    """The default as gin would write it; None where the knob has none."""
    return None if parameter.default is inspect.Parameter.empty else repr(parameter.default)


def _overlay(entry) -> str | None:
    """The overlay under gin/ that puts the part into its slot, if there is one."""
    from toolkit.config import find

    root = find("gin/default.gin").parent
    pattern = re.compile(rf"@(\w+/)?{entry.name}\b")
    found = [
        path for path in sorted(root.glob(f"{entry.kind}/*.gin")) if pattern.search(path.read_text(encoding="utf-8"))
    ]
    return f"gin/{found[0].relative_to(root)}" if found else None


def _shelf():
    from toolkit.registry import CATALOG

    return [entry for entry in CATALOG.values() if entry.module.split(".")[0] in ("components", "toolkit")]


def _relative(file):
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.components", description="What is on the shelf: every part that gin can name."
    )
    parser.add_argument("action", choices=("list", "show"), nargs="?", default="list")
    parser.add_argument("name", metavar="NAME", nargs="?", help="the part to show")
    parser.add_argument("--kind", help="list one kind only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--import", dest="imports", metavar="M|F.py", action="append", default=[])
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.action == "show") != (arguments.name is not None):
        parser.error("show takes the name of a part, list takes none")
    return arguments


if __name__ == "__main__":
    run_command(main)
