"""``python -m toolkit.components [list | show NAME | check NAME]``: list the parts, show one, or check that a part
follows the rules of its kind."""

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
from typing import TYPE_CHECKING, TypedDict

from toolkit.command import run_command

if TYPE_CHECKING:
    from toolkit.conformance import Line
    from toolkit.registry import Entry

log = logging.getLogger("toolkit")


class Description(TypedDict):
    """A part in plain values, as ``--json`` prints it.

    summary  the first sentence of the docstring
    knobs    each knob's default as gin writes it, or None if it has no default
    paper    the first arXiv number in the docstring, or None
    file     the file that defines the part; a relative path if the file is inside the working directory
    overlay  the file under gin/ that puts the part into its slot, or None
    """

    kind: str
    name: str
    summary: str
    knobs: dict[str, str | None]
    paper: str | None
    file: str
    overlay: str | None


def describe(entry: Entry) -> Description:
    """Describe a part in plain values."""
    from toolkit.config.overlays import overlay_of

    text = inspect.cleandoc(entry.cls.__doc__ or "")
    paper = re.search(r"arXiv:\d{4}\.\d{4,5}", text)
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "knobs": {knob: _default(parameter) for knob, parameter in entry.knobs.items()},
        "paper": paper.group() if paper else None,
        "file": _relative(inspect.getsourcefile(entry.cls) or "unknown"),
        "overlay": overlay_of(entry),
    }


def markdown() -> str:
    """The README's table of parts in Markdown, in the order of the kinds, without the kind "experiment"."""
    from toolkit.protocols import KINDS

    lines = ["| kind | | parts |", "|---|---|---|"]
    for kind in KINDS:
        names = [f"`{entry.name}`" for entry in shelf() if entry.kind == kind]
        if names and kind != "experiment":
            lines.append(f"| {kind} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.compose import load_shelf
    from toolkit.protocols import KINDS
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    if arguments.action == "check":
        return _check(arguments)
    if arguments.kind not in (None, *KINDS):
        raise ValueError(f"unknown kind {arguments.kind!r}; the kinds are {', '.join(KINDS)}")
    load_shelf()
    for name in arguments.imports:
        try:
            load_shelf([name])
        except ValueError as error:  # one broken file does not hide the parts of the others
            log.warning("%s; its parts are not listed", error)
    if arguments.action == "show":
        if arguments.name not in CATALOG:
            raise ValueError(
                f"part not found: {arguments.name!r}{_near(arguments.name)}; list all parts with "
                "python -m toolkit.components list"
            )
        return _show(CATALOG[arguments.name], arguments.json)
    rows = [describe(e) for e in CATALOG.values() if e.kind != "experiment" and arguments.kind in (None, e.kind)]
    if arguments.json:
        report.say(json.dumps(rows))
    else:
        _print_tables(rows)
    return 0


def _without_paper(match: re.Match[str]) -> str:
    """What replaces ", arXiv:NUMBER)": the closing bracket. Nothing replaces "(arXiv:NUMBER)" and ", arXiv:NUMBER"."""
    return ")" if match[0].startswith(",") and match[0].endswith(")") else ""


def _print_tables(rows: list[Description]) -> None:
    """Print the parts as one table for each kind."""
    from rich.table import Table

    from toolkit.output.terminal import styled
    from toolkit.rundir import report

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
            # Remove the paper, which has its own column. If it ended a sentence in brackets, keep the closing bracket.
            summary = re.sub(r",? ?\(?arXiv:[\d.]*\d\)?|``", _without_paper, row["summary"])
            table.add_row(row["name"], summary, knobs, row["paper"] or "")
        report.console.print(table)
        report.say("")


def _check(arguments: argparse.Namespace) -> int:
    """Print the conformance report of one part. Returns 0 if every line passes or does not apply, 1 if a line fails."""
    import torch

    from toolkit.compose import load_shelf
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    torch.set_num_threads(1)  # one thread is fastest for such small tensors
    module, _, name = arguments.name.rpartition(":")
    load_shelf([*arguments.imports, *([module] if module else [])])
    if name not in CATALOG:
        where = f"; {module} does not register it" if module else ""
        raise ValueError(f"part not found: {name!r}{where}{_near(name) or '; put @register(kind) on its class'}")
    from toolkit.conformance import bench_of, run_checks

    bench, report_lines = bench_of(name, arguments.bindings), []
    bench.inductor = arguments.inductor
    entry = CATALOG[name]
    if not arguments.json:
        report.say(f"{name} ({entry.kind}, {describe(entry)['file']})")
    for line in run_checks(bench):
        report_lines.append(line)
        if not arguments.json:
            _print_line(line)
    counts = {verdict: sum(line.verdict == verdict for line in report_lines) for verdict in ("pass", "fail", "n/a")}
    if arguments.json:
        report.say(json.dumps({"part": name, "kind": entry.kind, "lines": [vars(line) for line in report_lines]}))
    else:
        report.say(f"{counts['pass']} pass, {counts['fail']} fail, {counts['n/a']} do not apply")
    return 1 if counts["fail"] else 0


def _print_line(line: Line) -> None:
    """Print one line of the report: verdict, check, figure and tolerance, and the shapes that were tried. In a terminal
    these are columns, elsewhere one line of text."""
    from rich.table import Table

    from toolkit.conformance.lines import WIDTH
    from toolkit.output.terminal import styled
    from toolkit.rundir import report

    colour = {"pass": "green", "fail": "bold red", "n/a": "dim"}[line.verdict]
    tolerance = f" (tolerance {line.tolerance})" if line.tolerance else ""
    result = f"{line.figure}{tolerance}" if line.verdict == "pass" else line.why
    tried = line.tried if line.verdict == "pass" else ""
    if not report.console.is_terminal:
        report.say(f"{line.verdict:4}  {line.check:{WIDTH}}  {result}  {tried}".rstrip())
        return
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(width=4)
    for ratio in (3, 4, 4 if tried else 0):
        grid.add_column(ratio=ratio, width=None if ratio else 0)
    grid.add_row(styled((line.verdict, colour)), line.check, result, styled((tried, "dim")))
    report.console.print(grid)


def _show(entry: Entry, as_json: bool) -> int:
    """Print one part: signature, docstring, kind, file, overlay and binding."""
    from toolkit.config import keys
    from toolkit.conformance.bench import LISTS
    from toolkit.registry import CATALOG
    from toolkit.rundir import report

    description = describe(entry)
    if as_json:
        report.say(json.dumps({**description, "docstring": inspect.cleandoc(entry.cls.__doc__ or "")}))
        return 0
    signature = inspect.signature(entry.cls)
    report.say(f"{entry.name}{signature}\n\n{textwrap.indent(inspect.cleandoc(entry.cls.__doc__ or ''), '    ')}\n")
    report.say(f"kind: {entry.kind}\nfile: {description['file']}\noverlay: {description['overlay'] or 'none'}")
    if entry.kind == "experiment":  # the root of the config: no binding names it
        return 0
    owner = "GPT" if entry.kind in CATALOG["GPT"].knobs else "Experiment"
    slot, value = LISTS.get(entry.kind, entry.kind), f"[@{entry.name}]" if entry.kind in LISTS else f"@{entry.name}"
    report.say(f"binding: {keys.spell(owner, slot)} = {value}")
    return 0


def _default(parameter: inspect.Parameter) -> str | None:
    """The default value of a knob as gin writes it, or None if the knob has no default."""
    return None if parameter.default is inspect.Parameter.empty else repr(parameter.default)


def shelf() -> list[Entry]:
    """The entries of the toolkit's own parts, without those of other packages."""
    from toolkit.registry import CATALOG

    return [entry for entry in CATALOG.values() if entry.module.split(".")[0] in ("components", "toolkit")]


def _near(name: str) -> str:
    """A suggestion for an error message: the registered part with the most similar name, or nothing."""
    from toolkit.registry import CATALOG

    near = difflib.get_close_matches(name, CATALOG, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _relative(file: str) -> str:
    """A file's path, as a relative path if the file is inside the working directory."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.components",
        description="Lists the parts that a gin file can name, shows one, or checks one. `check` tests whether a part "
        "follows the rules of its kind and prints one line per rule. Its exit code is 0 if no line fails, 1 if one "
        "fails, and 2 if the part can't be loaded.",
    )
    parser.add_argument("action", choices=("list", "show", "check"), nargs="?", default="list")
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a part; check also takes package.module:NAME and file.py:NAME"
    )
    parser.add_argument(
        "-p",
        dest="bindings",
        metavar="'X.y = 1'",
        action="append",
        default=[],
        help="check: a knob of the part, as in gin; may be given several times",
    )
    parser.add_argument(
        "--inductor", action="store_true", help="check: compile with inductor too; needs a C++ compiler"
    )
    parser.add_argument("--kind", help="list: only parts of this kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="M|F.py",
        action="append",
        default=[],
        help="a module or a Python file that registers parts; may be given several times",
    )
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.action != "list") != (arguments.name is not None):
        parser.error("show and check need the name of a part; list takes no name")
    return arguments


if __name__ == "__main__":
    run_command(main)
