"""``python -m toolkit.components [list | show NAME | check NAME]``: what is on the shelf, asked of the catalogue, and
whether a part keeps what its kind demands."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import logging
import re
import textwrap
from collections import Counter
from pathlib import Path

from toolkit.command import run_command

log = logging.getLogger("toolkit")


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

    lines = ["| kind | | parts |", "|---|---|---|"]
    for kind in KINDS:
        names = [f"`{entry.name}`" for entry in _shelf() if entry.kind == kind]
        if names and kind != "experiment":
            lines.append(f"| {kind} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    from toolkit.compose import load_shelf
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    if arguments.action == "check":
        return _check(arguments)
    for name in [None, *arguments.imports]:
        try:
            load_shelf([name] if name else [])
        except ValueError as error:  # one that can't be imported takes nobody else's parts away
            log.warning("%s; its parts are left out", error)
    if arguments.action == "show":
        if arguments.name not in CATALOG:
            raise ValueError(f"there is no part {arguments.name!r}; list them with python -m toolkit.components list")
        return _show(CATALOG[arguments.name], arguments.json)
    rows = [describe(e) for e in CATALOG.values() if e.kind != "experiment" and arguments.kind in (None, e.kind)]
    if arguments.json:
        report.say(json.dumps(rows))
        return 0
    from rich.table import Table

    from toolkit.output.terminal import styled

    for kind, count in Counter(row["kind"] for row in rows).items():
        table = Table(
            title=styled((kind, "bold"), f", {count} part{'s' if count > 1 else ''}"),
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 3, 0, 0),
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


def _check(arguments) -> int:
    """The conformance report of one part. 0: every line passes or does not apply; 1: a line fails."""
    import torch

    from toolkit.compose import load_shelf
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    torch.set_num_threads(1)  # the tensors are too small to share out
    place, _, name = arguments.name.rpartition(":")
    load_shelf([*arguments.imports, *([place] if place else [])])
    if name not in CATALOG:
        where = f"{place} registers no part {name!r}" if place else f"there is no part {name!r}"
        near = difflib.get_close_matches(name, CATALOG, n=1)
        raise ValueError(where + (f"; did you mean {near[0]!r}?" if near else "; put @register(kind) on its class"))
    from toolkit.conformance import bench_of, lines

    bench, found = bench_of(name, arguments.bindings), []
    bench.inductor = arguments.inductor
    entry = CATALOG[name]
    if not arguments.json:
        report.say(f"{name} ({entry.kind}, {describe(entry)['file']})")
    for line in lines(bench):
        found.append(line)
        if not arguments.json:
            _print_line(line)
    counts = {verdict: sum(line.verdict == verdict for line in found) for verdict in ("pass", "fail", "n/a")}
    if arguments.json:
        report.say(json.dumps({"part": name, "kind": entry.kind, "lines": [vars(line) for line in found]}))
    else:
        report.say(f"{counts['pass']} pass, {counts['fail']} fail, {counts['n/a']} do not apply")
    return 1 if counts["fail"] else 0


def _print_line(line) -> None:
    """One line: verdict, what was checked, the figure against its tolerance, and on which shapes. Columns in a
    terminal, one line of text elsewhere."""
    from rich.table import Table

    from toolkit.output.terminal import styled
    from toolkit.rundir import report

    colour = {"pass": "green", "fail": "bold red", "n/a": "dim"}[line.verdict]
    against = f" (tolerance {line.tolerance})" if line.tolerance else ""
    told = f"{line.figure}{against}" if line.verdict == "pass" else line.why
    tried = line.tried if line.verdict == "pass" else ""
    if not report.console.is_terminal:
        report.say(f"{line.verdict:4}  {line.check:38}  {told}  {tried}".rstrip())
        return
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for options in ({"width": 4}, {"ratio": 3}, {"ratio": 4}, {"ratio": 4} if tried else {"width": 0}):
        grid.add_column(**options)
    grid.add_row(styled((line.verdict, colour)), line.check, told, styled((tried, "dim")))
    report.console.print(grid)


def _show(entry, as_json) -> int:
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

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
    from toolkit.config.layers import find

    root = find("gin/default.gin").parent
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.glob(f"{entry.kind}/*.gin"))}
    for pattern in (rf"{entry.kind}s? = \[?@{entry.name}\]?$", rf"@(\w+/)?{entry.name}\b"):  # alone, else in a list
        for path, text in texts.items():
            if re.search(pattern, text, re.MULTILINE):
                return f"gin/{path.relative_to(root)}"
    return None


def _shelf():
    from toolkit.registry import CATALOG

    return [entry for entry in CATALOG.values() if entry.module.split(".")[0] in ("components", "toolkit")]


def _relative(file):
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.components",
        description="What is on the shelf: every part that gin can name. `check` tries whether a part keeps what its "
        "kind demands, a line each: exit code 0 when all pass, 1 when one fails, 2 when the part can't be loaded.",
    )
    parser.add_argument("action", choices=("list", "show", "check"), nargs="?", default="list")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a part; for check also MODULE:NAME or FILE.py:NAME")
    parser.add_argument(
        "-p",
        dest="bindings",
        metavar="'X.y = 1'",
        action="append",
        default=[],
        help="check: a knob to build the part with",
    )
    parser.add_argument("--inductor", action="store_true", help="check: compile with inductor too (a C++ compiler)")
    parser.add_argument("--kind", help="list one kind only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--import", dest="imports", metavar="M|F.py", action="append", default=[])
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.action != "list") != (arguments.name is not None):
        parser.error("show and check take the name of a part, list takes none")
    return arguments


if __name__ == "__main__":
    run_command(main)
