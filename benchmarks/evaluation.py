"""``python -m benchmarks.evaluation``: tokens per second of evaluation by this toolkit and by lm-evaluation-harness,
which has the same weights, and of training, in turn.

MinimalPairs and MultipleChoice read generated items in the formats of BLiMP and HellaSwag: sentences of the built-in
stories with two words exchanged, and contexts of about 80 tokens with four endings. The peer is lm-eval's own loop
(``lm_eval.evaluator.evaluate`` with its HFLM) over transformers' StableLM, which is our default architecture, with our
weights. Its tasks are its BLiMP and HellaSwag on these items. It runs with the fastest of several batch sizes. Both
must find the same nats.

The tokens of an evaluation are those that a model reads if it reads each sequence on its own: the context, and the
continuation without its last token. So both are credited with the same number, whatever they read in fact. The times
include the division into tokens, but not the reading of files. Training is the toolkit's, not compiled. It takes about
five minutes on two cores."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import harness, measure, steps
from benchmarks.generate import SLOTS, transplant
from benchmarks.peers import Sizes
from components.evaluator import MinimalPairs, MultipleChoice
from components.stories import story
from components.tokenizer import BPE
from toolkit.command import run_command
from toolkit.evaluation import windows
from toolkit.evaluation.reader import Reader
from toolkit.model import GPT

STORIES = 400
AGREEMENT = 1e-4  # the largest difference in nats per token


@dataclass(frozen=True)
class Case:
    """A model and a number of items. ``batch`` is of training, in sequences. The batches of an evaluation have as many
    tokens as 8 sequences, as by default. ``batch_sizes`` are those that lm-eval tries."""

    sizes: Sizes
    batch: int
    pairs: int
    questions: int
    batch_sizes: tuple[int | str, ...]


CASES = {
    "tiny": Case(Sizes(4096, dim=64, layers=2, heads=4, context=128, hidden=176), 8, 1000, 200, (4, 16, 64, "auto")),
    # On a CPU, "auto" finds 64, with five passes more than 64 itself.
    "default": Case(Sizes(100_277, dim=768, layers=12, heads=12, context=1024, hidden=2048), 1, 48, 10, (4, 16, 64)),
}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    os.environ.setdefault("TOOLKIT_CACHE", os.path.join(tempfile.gettempdir(), "toolkit-benchmarks"))
    started = time.perf_counter()
    tables = [speed(name, arguments) for name in arguments.only]
    minutes = (time.perf_counter() - started) / 60

    def show() -> None:
        for found in tables:
            measure.table(**found["table"])
        print(f"{minutes:.1f} minutes")

    measure.report(arguments.json, {"benchmark": "evaluation", "minutes": minutes, "tables": tables}, show)
    return 0


def speed(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of two evaluators, ours and lm-eval's, and of training."""
    case, device = CASES[name], torch.device("cpu")
    sizes, timed = case.sizes, partial(measure.seconds, device=device, clock=arguments.clock)
    tokenizer, texts = BPE(sizes.vocab), [story(0, index) for index in range(STORIES)]
    tokenizer.train(texts)
    torch.manual_seed(0)
    shape = {"dim": sizes.dim, "n_layer": sizes.layers, "n_head": sizes.heads}
    model = GPT(sizes.vocab, sizes.context, **shape, **SLOTS).eval()
    reader = Reader(model, tokenizer, sizes.context, 8 * sizes.context)
    rows = {"MinimalPairs": harness.minimal_pairs(texts, max(2, round(case.pairs * arguments.items)))}
    rows["MultipleChoice"] = harness.multiple_choice(texts, max(2, round(case.questions * arguments.items)))
    ours = _evaluators(rows)
    theirs = harness.Harness(transplant(model).eval(), tokenizer, rows)
    pairs = {task: _pairs(task, evaluator) for task, evaluator in ours.items()}
    tokens = {task: count_tokens(tokenizer, each, sizes.context) for task, each in pairs.items()}
    measure.note(f"{name}: tokens " + ", ".join(f"{task} {count:,}" for task, count in tokens.items()))

    agreement, batches = {}, {}
    for task in ours:
        rates = {}
        for size in case.batch_sizes:
            started = arguments.clock()
            found = theirs.evaluate(task, size)
            rates[size] = tokens[task] / (arguments.clock() - started)
        batches[task] = max(rates, key=rates.__getitem__)
        measure.note(f"{task}: lm-eval by batch size: " + ", ".join(f"{n}: {rate:,.0f}" for n, rate in rates.items()))
        agreement[task] = difference(reader, pairs[task], [nats for item in found for nats in item])

    def turn(count: int, work: Callable[[], object]) -> Callable[[], float]:
        return lambda: count / timed(work)

    training = steps.Contestant("toolkit eager", sizes, case.batch, device)
    timed(training.step, times=2)  # AdamW's state
    times = max(1, round(2 / timed(training.step)))
    turns = {}
    for task, evaluator in ours.items():
        turns[f"{task}, toolkit"] = turn(tokens[task], partial(evaluator.evaluate, reader))
        turns[f"{task}, lm-eval"] = turn(tokens[task], partial(theirs.evaluate, task, batches[task]))
    turns["training"] = lambda: times * case.batch * sizes.context / timed(training.step, times=times)
    probe = steps.products(sizes, case.batch, device, arguments.clock)
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)

    over = {task: rounds.ratio(f"{task}, toolkit", f"{task}, lm-eval") for task in ours}
    of_training = {turn: rounds.ratio(turn, "training") for turn in turns if turn != "training"}
    lines = []
    for each in turns:
        shown = over[each.removesuffix(", toolkit")].show() if each.endswith("toolkit") else ""
        share = of_training[each].show() if each in of_training else ""
        lines.append([each, rounds.spread(each).show(0), shown, share])
    title = f"evaluation, {name}: vocabulary {sizes.vocab:,}, {sizes.dim} wide, {sizes.layers} layers, float32"
    counts = [f"{len(rows[task]):,} items of {task} have {tokens[task]:,} tokens" for task in ours]
    caption = f"Median (lowest to highest): {rounds.summary()}.\n{'; '.join(counts)}. lm-eval's batch size is "
    caption += ", ".join(f"{batches[task]} for {task}" for task in ours) + f", of {case.batch_sizes}.\n"
    caption += f"Largest difference in nats per token: {max(agreement.values()):.1e}."
    columns = ["", "tokens/s", "toolkit over lm-eval", "of training"]
    table = {"title": title, "columns": columns, "rows": lines, "caption": caption}
    found = {"case": name, "sizes": vars(sizes), "tokens": tokens, "batch_sizes": batches, "agreement": agreement}
    found |= {"tokens_per_s": rounds.values, "over_lm_eval": over, "of_training": of_training}
    return found | {"probes": rounds.probes, "table": table}


def count_tokens(tokenizer: BPE, pairs: list[tuple[str, str]], max_len: int) -> int:
    """The tokens that a model reads if it reads each (context, continuation) on its own."""
    every = (windows.continuation(tokenizer, *pair, max_len) for pair in pairs)
    return sum(len(window.context) + len(window.targets) - 1 for window in every)


def difference(reader: Reader, pairs: list[tuple[str, str]], expected: list[float]) -> float:
    """The largest difference from the ``expected`` nats, per token. Raises ValueError if it exceeds AGREEMENT."""
    found = reader.continuations(pairs)
    largest = max(abs(each.nats - nats) / each.tokens for each, nats in zip(found, expected, strict=True))
    if not largest <= AGREEMENT:
        raise ValueError(
            f"the peer's nats differ from ours by up to {largest:.2g} per token; they do not compute alike"
        )
    return largest


def _evaluators(rows: dict[str, list[harness.Row]]) -> dict[str, MinimalPairs | MultipleChoice]:
    """Our evaluators, prepared, with the items in ``rows``."""
    with tempfile.TemporaryDirectory() as folder:
        for task, items in rows.items():
            Path(folder, f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
        pairs = MinimalPairs([f"{folder}/MinimalPairs.jsonl"], prefix=" ")
        questions = MultipleChoice([f"{folder}/MultipleChoice.jsonl"])
        pairs.prepare()
        questions.prepare()
    return {"MinimalPairs": pairs, "MultipleChoice": questions}


def _pairs(task: str, evaluator: MinimalPairs | MultipleChoice) -> list[tuple[str, str]]:
    """All (context, continuation) that an evaluator scores."""
    if isinstance(evaluator, MultipleChoice):
        return [(question.context, f" {choice}") for question in evaluator.questions for choice in question.choices]
    fields = ("sentence_good", "sentence_bad")
    return [("", f" {item.row[field]}") for item in evaluator.items for field in fields]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" or ".join(CASES))
    add("--items", type=float, default=1.0, help="factor for the number of items (default: 1)")
    add("--rounds", type=int, default=3)
    add("--repeats", type=int, help="largest number of unsteady rounds to run again (default: as many as rounds)")
    add("--threads", type=int, help="PyTorch's threads")
    add(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="measure processor time, for a machine with other busy processes; use it with --threads 1",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
