"""``python -m toolkit.evaluate RUN [OVERLAY.gin ...]``: measure the loss of a trained model on a whole split, and what
the evaluators in its config measure."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.command import add_import_flags, run_command

if TYPE_CHECKING:
    from rich.table import Table

    from toolkit.compose import Run
    from toolkit.config.additions import Addition
    from toolkit.measures import Score


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.compose import open_run
    from toolkit.cpu import openmp

    if arguments.items:
        _check_free(arguments.items)
    folders = _checkpoints(arguments)
    run = open_run(
        arguments.run if folders is None else folders[0],
        arguments.overlays,
        arguments.bindings,
        imports=arguments.imports,
        code=not arguments.no_code,
        evaluators=_added_evaluators(arguments),
    )
    openmp.use_threads(run.experiment.threads)
    windows, rows = _measure(run, [run.checkpoint] if folders is None else folders, arguments)
    about: dict[str, Any] = {"split": arguments.split, "windows": windows}
    if arguments.json and folders is None:
        print(json.dumps(about | rows[0].shown()))
    elif arguments.json:
        checkpoints = [row.shown() for row in rows]
        print(json.dumps(about | {"run": str(arguments.run), "checkpoints": checkpoints}))
    else:
        subject = run.checkpoint if folders is None else arguments.run
        title = f"{subject}, split {arguments.split}: {windows:,} windows of {run.experiment.seq_len:,} tokens"
        _print(title, rows, is_curve=folders is not None)
    return 0


@dataclass(frozen=True)
class Row:
    """What was measured of one checkpoint: the loss on the split, and the scores of each evaluator by metric."""

    checkpoint: Path
    step: int
    loss: Mapping[str, float]
    scores: Mapping[str, Mapping[str, Score]]

    def shown(self) -> dict[str, Any]:
        """The row in JSON and in the table of several checkpoints."""
        from toolkit.evaluation import evaluators

        return {"checkpoint": str(self.checkpoint), "step": self.step, **self.loss, **evaluators.row(self.scores)}


def _check_free(name: str) -> None:
    """Raise ValueError if a folder for items can't be one."""
    from toolkit.store.disk import refuse_links

    items = Path(name)
    refuse_links(items)
    if other := next((path for path in (items, *items.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"--items {name}: {other} is a file; name a folder")


def _checkpoints(arguments: argparse.Namespace) -> list[Path] | None:
    """The checkpoints that --checkpoints names; None without it. ValueError: not a run."""
    from toolkit.store import checkpoint

    if arguments.checkpoints is None:
        return None
    if not (arguments.run / "config.gin").is_file():
        raise ValueError(f"{arguments.run} is not a run (a folder with config.gin); --checkpoints needs one")
    return list(checkpoint.kept(arguments.run, arguments.checkpoints or None).values())


def _measure(run: Run, folders: Sequence[Path], arguments: argparse.Namespace) -> tuple[int, list[Row]]:
    """Measure the loss on a split and what the evaluators measure, at each checkpoint, and write the items if that was
    asked for. Returns (windows of the split, rows)."""
    from toolkit.cpu.neighbours import watched
    from toolkit.evaluation import evaluators, itemfile
    from toolkit.evaluation.reader import reader_of
    from toolkit.experiment import autocast, micro_batch_size
    from toolkit.loop.scoring import evaluate
    from toolkit.objective import Objective
    from toolkit.store import checkpoint

    experiment, device = run.experiment, run.device
    chosen = evaluators.of(run.config, experiment)
    for evaluator in chosen.values():
        evaluator.prepare()  # a wrong item is found before any text is encoded
    data = experiment.data(run.tokenizer, experiment.seq_len, experiment.seed)
    data.prepare()
    objective = Objective(run.model, experiment.loss(), run.tokenizer.eot if experiment.mask_documents else None)
    windows, batch = data.windows(arguments.split), micro_batch_size(experiment, 1)
    reader = reader_of(experiment, run.model, run.tokenizer)
    rows = []
    for folder in folders:
        step = checkpoint.read_manifest(folder)["step"]
        if folder != run.checkpoint:
            checkpoint.load_weights(folder, run.model)
        with autocast(experiment, device), watched(device):
            loss = evaluate(objective, data, run.tokenizer, batch, windows, device, arguments.split)
            scores = evaluators.measure(chosen, reader)
        if arguments.items:
            itemfile.write(Path(arguments.items), step, scores)
        rows.append(Row(folder, step, loss, scores))
    return windows, rows


def _print(title: str, rows: Sequence[Row], is_curve: bool) -> None:
    """Print a table of several checkpoints, or lines on one."""
    from toolkit.output.terminal import Terminal

    console = Terminal()
    console.print(title)
    if is_curve:
        for table in curve([row.shown() for row in rows], console.width):
            console.print(table)
        return
    [row] = rows
    console.print(f"{row.loss['loss_nats']:.4f} nats per token, perplexity {math.exp(row.loss['loss_nats']):.2f}")
    console.print(f"{row.loss['bits_per_byte']:.4f} bits per byte")
    for name, scores in row.scores.items():
        for metric, each in scores.items():
            count = f" over {len(each.items):,} items" if each.items else ""
            console.print(f"eval/{name}/{metric} {each.value:.4f} {each.unit}{count}")


def curve(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[Table]:
    """Tables with a row for each checkpoint and a column for each metric. What does not fit into ``width`` terminal
    columns follows in a further table. A name such as eval/Induction/nats_first_half is divided over several lines."""
    from rich.table import Table
    from rich.text import Text

    from toolkit.output import escape

    metrics = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("checkpoint", "step")
    ]
    titles = {name: escape.line(name.removeprefix("eval/")).split("/") for name in metrics}
    widths = {name: max(8, *map(len, lines)) + 2 for name, lines in titles.items()}
    steps = [f"{row['step']:,}" for row in rows]
    first = max(len("step"), *map(len, steps))
    while metrics:
        room = itertools.accumulate((widths[name] for name in metrics), initial=first)
        count = max(1, sum(taken <= width for taken in room) - 1)
        shown, metrics = metrics[:count], metrics[count:]
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
        table.add_column("step", justify="right", no_wrap=True)
        for name in shown:
            table.add_column(Text("\n".join(titles[name])), justify="right", no_wrap=True, vertical="bottom")
        for step, row in zip(steps, rows, strict=True):
            table.add_row(step, *(f"{row[name]:.4f}" if name in row else "-" for name in shown))
        yield table


def _added_evaluators(arguments: argparse.Namespace) -> list[Addition]:
    """The evaluators that flags add to those of the config."""
    if not arguments.lm_eval:
        return []
    from toolkit.config.additions import Addition
    from toolkit.evaluation import harness

    flags = f"--lm-eval {','.join(arguments.lm_eval)}"
    knobs: dict[str, object] = {"tasks": arguments.lm_eval}
    if arguments.lm_eval_path is not None:
        flags += f" --lm-eval-path {arguments.lm_eval_path}"
        knobs["include_path"] = arguments.lm_eval_path
    return [Addition(harness.PART, knobs, flags)]


def _tasks(text: str) -> list[str]:
    """The value of --lm-eval: names of tasks, each once."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: write names of tasks with a comma between them: hellaswag,blimp")
    return list(dict.fromkeys(names))


def _steps(text: str) -> list[int]:
    """The value of --checkpoints: steps, or no step for "all"."""
    if text == "all":
        return []
    if not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: write all, or steps such as 1000,2000")
    return [int(step) for step in text.split(",")]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.evaluate",
        description="Measure the loss of a trained model on a whole split, in nats per token and bits per byte, and "
        "what the evaluators of its config measure (Experiment.evaluators and final_evaluators). --lm-eval adds tasks "
        "of lm-evaluation-harness.",
    )
    add = parser.add_argument
    add(
        "run",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="folder of a checkpoint, or of a run (its best checkpoint is used)",
    )
    add(
        "overlays",
        metavar="OVERLAY.gin",
        nargs="*",
        help="gin files that change the run's config, for example to read other text",
    )
    add(
        "-p",
        "--gin_param",
        dest="bindings",
        metavar="BINDING",
        action="append",
        default=[],
        help="change one knob of the run's config: 'Experiment.batch_size = 4'",
    )
    add_import_flags(parser)
    add(
        "--checkpoints",
        type=_steps,
        metavar="all|STEP,STEP",
        help="measure several checkpoints of the run: all that it kept, or those of these steps",
    )
    add("--split", choices=("val", "train"), default="val", help="the split to measure on (default: val)")
    add(
        "--lm-eval",
        type=_tasks,
        metavar="TASK,TASK",
        help="also measure these tasks of lm-evaluation-harness (extra eval), such as hellaswag,blimp; "
        "-p 'LMEval.num_fewshot = 5' sets the examples in a prompt, -p 'LMEval.limit = 100' the documents of a task",
    )
    add(
        "--lm-eval-path",
        metavar="DIR",
        help="with --lm-eval: a folder with YAML files of your own tasks. They can run code: name only folders that "
        "you trust",
    )
    add("--items", metavar="FOLDER", help="write the items of the evaluators to FOLDER/NAME/step-XXXXXXXX.jsonl")
    add("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.lm_eval_path is not None and not arguments.lm_eval:
        parser.error("--lm-eval-path needs --lm-eval TASK,TASK, the tasks to measure")
    return arguments


if __name__ == "__main__":
    run_command(main)
