"""``python -m toolkit.compare RUN ...``: does an arm beat the baseline? The command reads only the folders of runs,
or a table of results (``--table``)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.command import run_command

if TYPE_CHECKING:
    from toolkit.comparison.record import Record
    from toolkit.comparison.results import Comparison
    from toolkit.comparison.runs import PlanRecord, Run


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.comparison import assemble, exits, lookfile, probes, probespage, record, screen
    from toolkit.output.terminal import Terminal, styled
    from toolkit.store.disk import refuse_links

    plan, found_runs = _runs(arguments, sys.argv[1:] if argv is None else argv)
    exclude = list(zip(arguments.exclude, arguments.reason, strict=True))
    comparison = assemble.compare(plan, found_runs, exclude, arguments.effect)
    if problem := lookfile.save(comparison, "compare"):
        comparison = replace(comparison, notes=(*comparison.notes, problem))
    results = record.record(comparison)
    code = exits.code(results, arguments.exit_verdict, arguments.strict, arguments.exit_arm)
    pages = {}
    if arguments.probes:
        results["probes"], cells = probes.changes(comparison)
        title = results["question"] or results["name"]
        pages["probes.html"] = probespage.page(title, results["baseline"], results["probes"], cells)

    out = Path(arguments.out) if arguments.out else (plan.folder or Path()) / "compare"
    refuse_links(out, below=None if arguments.out else out.parent)
    out.mkdir(parents=True, exist_ok=True)
    _write(comparison, results, pages, out)
    if arguments.json:
        print(json.dumps(results))
    else:
        console = Terminal()
        screen.show(results, console, arguments.verbose)
        hint = "" if arguments.verbose else "reasons, pairing and costs: --verbose, or "
        other_files = f"report.md, compare.csv, compare.json, figures{'' if plan.table else ', tensorboard/'}"
        console.print()
        console.print(styled((f"{hint}{out / 'compare.html'} (same folder: {other_files})", "dim")), soft_wrap=True)
    return code


def _runs(arguments: argparse.Namespace, command: list[str]) -> tuple[PlanRecord, list[Run]]:
    """The plan and the runs that the command line names. Raises ValueError."""
    from toolkit.comparison import runs, tables

    if arguments.table is None:
        return runs.find(arguments.runs, arguments.plan, arguments.baseline)
    columns = tables.Columns(arguments.arm, arguments.metric, arguments.seed, arguments.step)
    direction = True if arguments.higher_is_better else False if arguments.lower_is_better else None
    return tables.read(Path(arguments.table), columns, arguments.baseline, direction, arguments.effect, command)


def _write(comparison: Comparison, results: Record, pages: Mapping[str, str], out: Path) -> None:
    """Write the reports, tables and pictures into the folder ``out``. Raises OSError."""
    from toolkit.comparison import board, figures, markdown, page, record
    from toolkit.store.disk import write_bytes, write_text

    pictures = figures.draw(comparison)
    for name, (_, png, _) in pictures.items():
        write_bytes(out / f"{name}.png", png)
    contents = {
        "report.md": markdown.report(results, {f"{name}.png": caption for name, (caption, _, _) in pictures.items()}),
        "compare.csv": record.table(results),
        "compare.json": json.dumps(results, indent=1) + "\n",
        "compare.html": page.page(results, {name: (caption, svg) for name, (caption, _, svg) in pictures.items()}),
        **pages,
    }
    for name, content in contents.items():
        write_text(out / name, content)
    if not comparison.plan.table:
        board.write(comparison, out / "tensorboard")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.compare",
        description="Compare runs with a baseline: differences, intervals, verdicts and warnings.",
        epilog="What was judged is written to looks.jsonl in the plan's folder; if seeds are added later, the earlier "
        "looks are charged. A guard is a check whether the comparison is fair and valid; it fires if it finds a fault. "
        "Exit codes: 0 compared, 1 a guard fired and --strict was given, 2 bad input. With --exit-verdict: 0 better, 1 "
        "worse (or a guard fired and --strict was given), 2 bad input, 3 inconclusive, 4 equivalent or identical; of "
        "several arms the first of 1, 3, 4, 0 that occurs.",
    )
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        nargs="*",
        help="the folder of a plan; or folders and globs of runs, each with an optional arm name: wide='runs/wide-*'",
    )
    add(
        "--plan",
        metavar="FILE",
        help="the plan.json to read, or the plan.gin that the runs in the folder should follow",
    )
    add("--baseline", metavar="ARM", help="compare with this arm (default: the plan's, or the first run's)")
    add(
        "--effect",
        metavar="X",
        type=_positive,
        help="smallest difference that matters (default: the plan's, or 0.02; none for a table)",
    )
    add("--out", metavar="DIR", help="folder for the report (default: compare/ in the plan's folder, or in this one)")
    add("--json", action="store_true", help="print the whole comparison as one JSON object")
    add("--verbose", action="store_true", help="also print each arm's reason, pairing and costs")
    add(
        "--probes",
        action="store_true",
        help="also find what changed first: the earliest step, module and statistic of Experiment.probes that differs "
        "from the baseline beyond the noise of seeds",
    )
    add("--strict", action="store_true", help="exit 1 when a guard fires")
    add("--exit-verdict", action="store_true", help="the exit code tells the verdict, see below")
    add("--exit-arm", metavar="ARM", help="with --exit-verdict: tell the verdict of this arm, not of all")
    add("--exclude", metavar="RUN", action="append", default=[], help="leave out a run; every output mentions it")
    add("--reason", metavar="TEXT", action="append", default=[], help="why; give one for each --exclude, in order")
    _add_table_flags(parser)
    arguments = parser.parse_args(argv)
    if len(arguments.exclude) != len(arguments.reason) or not all(map(str.strip, arguments.reason)):
        parser.error("each --exclude needs its own --reason: --exclude RUN --reason TEXT")
    if arguments.exit_arm and not arguments.exit_verdict:
        parser.error("--exit-arm needs --exit-verdict")
    _check_table_flags(parser, arguments)
    return arguments


def _add_table_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a table in place of runs",
        "Verdicts on anybody's runs. Guards that need the files of runs are listed as not known.",
    )
    add = group.add_argument
    add("--table", metavar="FILE", help="a CSV file or JSON lines, with a row for each run")
    add("--arm", metavar="COLUMN", default="arm", help="column with the arm's name (default: arm)")
    add("--metric", metavar="COLUMN", help="column with the metric that is judged")
    add("--seed", metavar="COLUMN", help="column with the seed: equal seeds are paired (default: not paired)")
    add("--step", metavar="COLUMN", help="column with the step, if a run has several rows: the last one counts")
    direction = group.add_mutually_exclusive_group()
    direction.add_argument("--higher-is-better", action="store_true", help="higher values of the metric are better")
    direction.add_argument(
        "--lower-is-better", action="store_true", help="lower ones (default, if it is a loss by name)"
    )


def _check_table_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error if flags that belong together are not together."""
    if arguments.table is None:
        if not arguments.runs:
            parser.error("name a plan's folder or runs, or a table: --table FILE --metric COLUMN")
        lone = ["metric", "seed", "step", "higher_is_better", "lower_is_better"]
    else:
        if arguments.runs:
            parser.error(f"--table {arguments.table}: name either a table or runs, not both")
        if not arguments.metric:
            parser.error("--table needs --metric COLUMN")
        lone = ["plan", "probes"]
    for name in lone:
        if getattr(arguments, name):
            flag = f"--{name.replace('_', '-')}"
            parser.error(
                f"{flag} needs --table FILE" if arguments.table is None else f"{flag} does not go with --table"
            )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number above 0")
    return value


if __name__ == "__main__":
    run_command(main)
