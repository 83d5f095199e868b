"""``python -m toolkit.evaluate RUN [OVERLAY.gin ...]``: measure the loss of a trained model on a whole split, and what
the evaluators in its config measure."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from toolkit.command import add_import_flags, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    from toolkit.compose import open_run
    from toolkit.cpu import openmp
    from toolkit.cpu.neighbours import watched
    from toolkit.evaluation import evaluators, itemfile
    from toolkit.evaluation.reader import reader_of
    from toolkit.experiment import autocast, micro_batch_size
    from toolkit.loop.scoring import evaluate
    from toolkit.objective import Objective
    from toolkit.output.terminal import Terminal
    from toolkit.store import checkpoint
    from toolkit.store.disk import refuse_links

    run = open_run(
        arguments.run, arguments.overlays, arguments.bindings, imports=arguments.imports, code=not arguments.no_code
    )
    experiment, device = run.experiment, run.device
    openmp.use_threads(experiment.threads)
    if arguments.items:
        refuse_links(Path(arguments.items))
    chosen = evaluators.of(run.config, experiment)
    for evaluator in chosen.values():
        evaluator.prepare()  # a wrong item is found before any text is encoded
    data = experiment.data(run.tokenizer, experiment.seq_len, experiment.seed)
    data.prepare()
    objective = Objective(run.model, experiment.loss(), run.tokenizer.eot if experiment.mask_documents else None)
    windows = data.windows(arguments.split)
    batch = micro_batch_size(experiment, 1)
    with autocast(experiment, device), watched(device):
        score = evaluate(objective, data, run.tokenizer, batch, windows, device, arguments.split)
        measured = evaluators.measure(chosen, reader_of(experiment, run.model, run.tokenizer))
    if arguments.items:
        itemfile.write(Path(arguments.items), checkpoint.read_manifest(run.checkpoint)["step"], measured)
    evaluated = {"checkpoint": str(run.checkpoint), "split": arguments.split, "windows": windows}
    if arguments.json:
        print(json.dumps(evaluated | score | evaluators.row(measured)))
    else:
        console = Terminal()
        console.print(
            f"{run.checkpoint}, split {arguments.split}: {windows:,} windows of {experiment.seq_len:,} tokens"
        )
        console.print(f"{score['loss_nats']:.4f} nats per token, perplexity {math.exp(score['loss_nats']):.2f}")
        console.print(f"{score['bits_per_byte']:.4f} bits per byte")
        for name, scores in measured.items():
            for metric, each in scores.items():
                count = f" over {len(each.items):,} items" if each.items else ""
                console.print(f"eval/{name}/{metric} {each.value:.4f} {each.unit}{count}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.evaluate",
        description="Measure the loss of a trained model on a whole split, in nats per token and bits per byte, and "
        "what the evaluators of its config measure (Experiment.evaluators and final_evaluators).",
    )
    add = parser.add_argument
    add("run", metavar="RUN|CHECKPOINT", help="folder of a checkpoint, or of a run (its best checkpoint is used)")
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
    add("--split", choices=("val", "train"), default="val", help="the split to measure on (default: val)")
    add("--items", metavar="FOLDER", help="write the items of the evaluators to FOLDER/NAME/step-XXXXXXXX.jsonl")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_command(main)
