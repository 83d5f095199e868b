"""``python -m toolkit.components [list | show NAME | check NAME]``: list the parts, show one, or check that a part does
what its kind demands."""

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
from typing import TYPE_CHECKING

from toolkit.command import run_command

if TYPE_CHECKING:
    from toolkit.registry import Entry

log = logging.getLogger("toolkit")


def describe(entry: Entry) -> dict[str, object]:
    """Describe a part in plain values: kind, name, summary, knobs with their defaults, paper, file and overlay."""
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
    """The README's table of parts in Markdown, in the order of the kinds, without the kind "experiment"."""
    from toolkit.protocols import KINDS

    lines = ["| kind | | parts |", "|---|---|---|"]
    for kind in KINDS:
        names = [f"`{entry.name}`" for entry in _shelf() if entry.kind == kind]
        if names and kind != "experiment":
            lines.append(f"| {kind} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.compose import load_shelf
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    if arguments.action == "check":
        return _check(arguments)
    for name in [None, *arguments.imports]:
        try:
            load_shelf([name] if name else [])
        except ValueError as error:  # one broken package or file does not hide the parts of the others
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
        for column, width in (("name", 20), ("what it is", None), ("knobs", None), ("paper", 16)):
            table.add_column(column, min_width=width, no_wrap=width is not None)
        for row in (row for row in rows if row["kind"] == kind):
            knobs = ", ".join(knob if value is None else f"{knob}={value}" for knob, value in row["knobs"].items())
            summary = re.sub(
                r",? ?\(?arXiv:[\d.]+\)?|``", lambda match: ")" if match.group().startswith(",") else "", row["summary"]
            )
            table.add_row(row["name"], summary, knobs, row["paper"] or "")
        report.console.print(table)
        report.say("")
    return 0


def _check(arguments) -> int:
    """Print the conformance report of one part. Returns 0 if every line passes or does not apply, 1 if a line fails."""
    import torch

    from toolkit.compose import load_shelf
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    torch.set_num_threads(1)  # the tensors are too small to be worth several threads
    module, _, name = arguments.name.rpartition(":")
    load_shelf([*arguments.imports, *([module] if module else [])])
    if name not in CATALOG:
        problem = f"{module} registers no part {name!r}" if module else f"there is no part {name!r}"
        near = difflib.get_close_matches(name, CATALOG, n=1)
        raise ValueError(problem + (f"; did you mean {near[0]!r}?" if near else "; put @register(kind) on its class"))
    from toolkit.conformance import bench_of, lines

    bench, report_lines = bench_of(name, arguments.bindings), []
    bench.inductor = arguments.inductor
    entry = CATALOG[name]
    if not arguments.json:
        report.say(f"{name} ({entry.kind}, {describe(entry)['file']})")
    for line in lines(bench):
        report_lines.append(line)
        if not arguments.json:
            _print_line(line)
    counts = {verdict: sum(line.verdict == verdict for line in report_lines) for verdict in ("pass", "fail", "n/a")}
    if arguments.json:
        report.say(json.dumps({"part": name, "kind": entry.kind, "lines": [vars(line) for line in report_lines]}))
    else:
        report.say(f"{counts['pass']} pass, {counts['fail']} fail, {counts['n/a']} do not apply")
    return 1 if counts["fail"] else 0


def _print_line(line) -> None:
    """Print one line of the report: verdict, check, figure and tolerance, and the shapes that were tried. In a terminal
    these are columns, elsewhere one line of text."""
    from rich.table import Table

    from toolkit.output.terminal import styled
    from toolkit.rundir import report

    colour = {"pass": "green", "fail": "bold red", "n/a": "dim"}[line.verdict]
    tolerance = f" (tolerance {line.tolerance})" if line.tolerance else ""
    result = f"{line.figure}{tolerance}" if line.verdict == "pass" else line.why
    tried = line.tried if line.verdict == "pass" else ""
    if not report.console.is_terminal:
        report.say(f"{line.verdict:4}  {line.check:38}  {result}  {tried}".rstrip())
        return
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for options in ({"width": 4}, {"ratio": 3}, {"ratio": 4}, {"ratio": 4} if tried else {"width": 0}):
        grid.add_column(**options)
    grid.add_row(styled((line.verdict, colour)), line.check, result, styled((tried, "dim")))
    report.console.print(grid)


def _show(entry, as_json) -> int:
    """Print one part: signature, docstring, kind, file, overlay and binding."""
    from toolkit.config import keys
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    description = describe(entry)
    if as_json:
        report.say(json.dumps(description | {"docstring": inspect.cleandoc(entry.cls.__doc__ or "")}))
        return 0
    signature = inspect.signature(entry.cls)
    report.say(f"{entry.name}{signature}\n\n{textwrap.indent(inspect.cleandoc(entry.cls.__doc__ or ''), '    ')}\n")
    report.say(f"kind: {entry.kind}\nfile: {description['file']}\noverlay: {description['overlay'] or 'none'}")
    owner = "GPT" if entry.kind in CATALOG["GPT"].knobs else "Experiment"
    slot, value = ("loggers", f"[@{entry.name}]") if entry.kind == "logger" else (entry.kind, f"@{entry.name}")
    report.say(f"binding: {keys.spell(owner, slot)} = {value}")
    return 0


def _default(parameter):
    """The default value of a knob as gin writes it, or None if the knob has no default."""
    return None if parameter.default is inspect.Parameter.empty else repr(parameter.default)


def _overlay(entry) -> str | None:
    """The file under gin/ that puts the part into its slot, or None. A file that binds the part alone comes first."""
    from toolkit.config.layers import find

    root = find("gin/default.gin").parent
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.glob(f"{entry.kind}/*.gin"))}
    # The first pattern finds a slot that holds only this part, the second any mention of the part.
    for pattern in (rf"{entry.kind}s? = \[?@{entry.name}\]?$", rf"@(\w+/)?{entry.name}\b"):
        for path, text in texts.items():
            if re.search(pattern, text, re.MULTILINE):
                return f"gin/{path.relative_to(root)}"
    return None


def _shelf():
    """The entries of the toolkit's own parts, without those of other packages."""
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
