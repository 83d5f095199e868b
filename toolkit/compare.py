"""``python -m toolkit.compare RUN ...``: does an arm beat the baseline? The command reads only the folders of runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from toolkit.command import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.comparison import (
        assemble,
        board,
        figures,
        lookfile,
        markdown,
        page,
        probes,
        probespage,
        record,
        runs,
        screen,
    )
    from toolkit.output.terminal import Terminal, styled
    from toolkit.store.disk import refuse_links, write_bytes, write_text

    plan, found_runs = runs.find(arguments.runs, arguments.plan, arguments.baseline)
    exclude = list(zip(arguments.exclude, arguments.reason, strict=True))
    comparison = assemble.compare(plan, found_runs, exclude, arguments.effect)
    if problem := lookfile.save(comparison, "compare"):
        comparison = replace(comparison, notes=(*comparison.notes, problem))
    results = record.record(comparison)
    pages = {}
    if arguments.probes:
        results["probes"], cells = probes.changes(comparison)
        title = results["question"] or results["name"]
        pages["probes.html"] = probespage.page(title, results["baseline"], results["probes"], cells)

    out = Path(arguments.out) if arguments.out else (plan.folder or Path()) / "compare"
    refuse_links(out, below=None if arguments.out else out.parent)
    out.mkdir(parents=True, exist_ok=True)
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
    board.write(comparison, out / "tensorboard")

    if arguments.json:
        print(json.dumps(results))
    else:
        console = Terminal()
        screen.show(results, console, arguments.verbose)
        hint = "" if arguments.verbose else "reasons, pairing and costs: --verbose, or "
        other_files = "report.md, compare.csv, compare.json, figures, tensorboard/"
        console.print()
        console.print(styled((f"{hint}{out / 'compare.html'} (same folder: {other_files})", "dim")), soft_wrap=True)
    return 1 if arguments.strict and comparison.banners else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.compare",
        description="Compare runs with a baseline: differences, intervals, verdicts and warnings.",
        epilog="What was judged is written to looks.jsonl in the plan's folder; if seeds are added later, the earlier "
        "looks are charged. A guard is a check whether the comparison is fair and valid; it fires if it finds a fault. "
        "Exit codes: 0 compared, 1 a guard fired and --strict was given, 2 bad input.",
    )
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        nargs="+",
        help="the folder of a plan; or folders and globs of runs, each with an optional arm name: wide='runs/wide-*'",
    )
    add(
        "--plan",
        metavar="FILE",
        help="the plan.json to read, or the plan.gin that the runs in the folder should follow",
    )
    add("--baseline", metavar="ARM", help="compare with this arm (default: the plan's, or the first run's)")
    add("--effect", metavar="X", type=_positive, help="smallest difference that matters (default: the plan's, or 0.02)")
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
    add("--exclude", metavar="RUN", action="append", default=[], help="leave out a run; every output mentions it")
    add("--reason", metavar="TEXT", action="append", default=[], help="why; give one for each --exclude, in order")
    arguments = parser.parse_args(argv)
    if len(arguments.exclude) != len(arguments.reason) or not all(map(str.strip, arguments.reason)):
        parser.error("each --exclude needs its own --reason: --exclude RUN --reason TEXT")
    return arguments


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number above 0")
    return value


if __name__ == "__main__":
    run_command(main)
