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
five minutes on two cores.

``--cost`` measures how much of the time of a run each evaluator takes, at the default size and cadence."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import harness, measure, steps
from benchmarks.generate import SLOTS, transplant
from benchmarks.peers import Sizes
from components.stories import story
from components.tokenizer import BPE
from toolkit.command import run_command
from toolkit.cpu.allocator import keep_freed_memory
from toolkit.evaluation import windows
from toolkit.evaluation.reader import Reader
from toolkit.measures import Continuation
from toolkit.model import GPT
from toolkit.protocols import Evaluator

STORIES = 400
AGREEMENT = 1e-4  # the largest difference in nats per token
DEVICE = torch.device("cpu")
EVAL_EVERY, BATCH, SHARE = 1000, 8, 0.02  # of gin/default.gin; the share of a run's time that evaluators may take


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
    "default": Case(Sizes(100_277, dim=768, layers=12, heads=12, context=1024, hidden=2048), 1, 80, 16, (4, 16, 64)),
}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    os.environ.setdefault("TOOLKIT_CACHE", os.path.join(tempfile.gettempdir(), "toolkit-benchmarks"))
    keep_freed_memory()
    started = time.perf_counter()
    tables = [(cost if arguments.cost else speed)(name, arguments) for name in arguments.only]
    minutes = (time.perf_counter() - started) / 60

    def show() -> None:
        for found in tables:
            measure.table(**found["table"])
        print(f"{minutes:.1f} minutes")

    measure.report(arguments.json, {"benchmark": "evaluation", "minutes": minutes, "tables": tables}, show)
    return 0


class Subject:
    """What is measured: a model of a case, its reader, and stories for its items. ``train`` makes training steps, and
    returns their tokens per second."""

    def __init__(self, case: Case, arguments: argparse.Namespace):
        self.case, self.sizes = case, case.sizes
        self.timed = partial(measure.seconds, device=DEVICE, clock=arguments.clock)
        self.texts, self.tokenizer = [story(0, index) for index in range(STORIES)], BPE(case.sizes.vocab)
        self.tokenizer.train(self.texts)
        torch.manual_seed(0)
        shape = {"dim": self.sizes.dim, "n_layer": self.sizes.layers, "n_head": self.sizes.heads}
        self.model = GPT(self.sizes.vocab, self.sizes.context, **shape, **SLOTS).eval()
        self.reader = Reader(self.model, self.tokenizer, self.sizes.context, 8 * self.sizes.context)
        self.rows = {
            "MinimalPairs": harness.minimal_pairs(self.texts, max(2, round(case.pairs * arguments.items))),
            "MultipleChoice": harness.multiple_choice(self.texts, max(2, round(case.questions * arguments.items))),
        }
        self.training = steps.Contestant("toolkit eager", self.sizes, case.batch, DEVICE)
        self.timed(self.training.step, times=2)  # AdamW's state
        self.times = max(1, round(2 / self.timed(self.training.step)))  # about two seconds

    def train(self) -> float:
        seconds = self.timed(self.training.step, times=self.times)
        return self.times * self.case.batch * self.sizes.context / seconds

    def count_tokens(self, pairs: list[tuple[str, str]]) -> int:
        """The tokens that a model reads if it reads each (context, continuation) on its own."""
        every = (windows.continuation(self.tokenizer, *pair, self.sizes.context) for pair in pairs)
        return sum(len(window.context) + len(window.targets) - 1 for window in every)


def speed(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of two evaluators, ours and lm-eval's, and of training."""
    subject = Subject(CASES[name], arguments)
    sizes, rows = subject.sizes, subject.rows
    ours = harness.evaluators(rows)
    theirs = harness.Harness(transplant(subject.model).eval(), subject.tokenizer, rows)
    pairs = {task: harness.pairs(evaluator) for task, evaluator in ours.items()}
    tokens = {task: subject.count_tokens(each) for task, each in pairs.items()}

    def rate(task: str, work: partial) -> float:
        return tokens[task] / subject.timed(work)

    agreement, batch_sizes, turns = {}, {}, {}
    for task, evaluator in ours.items():
        expected = [nats for item in theirs.evaluate(task, subject.case.batch_sizes[0]) for nats in item]
        agreement[task] = difference(subject.reader.continuations(pairs[task]), expected)
        rates = {size: rate(task, partial(theirs.evaluate, task, size)) for size in subject.case.batch_sizes}
        measure.note(f"{task}, lm-eval: " + ", ".join(f"batch size {size} {each:,.0f}" for size, each in rates.items()))
        batch_sizes[task] = max(rates, key=rates.__getitem__)
        turns[f"{task}, toolkit"] = partial(rate, task, partial(evaluator.evaluate, subject.reader))
        turns[f"{task}, lm-eval"] = partial(rate, task, partial(theirs.evaluate, task, batch_sizes[task]))
    turns["training"] = subject.train
    probe = steps.products(sizes, subject.case.batch, DEVICE, arguments.clock)
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)

    over = {task: rounds.ratio(f"{task}, toolkit", f"{task}, lm-eval") for task in ours}
    of_training = {turn: rounds.ratio(turn, "training") for turn in turns if turn != "training"}
    lines = []
    for turn in turns:
        shown = over[turn.removesuffix(", toolkit")].show() if turn.endswith(", toolkit") else ""
        share = of_training[turn].show() if turn in of_training else ""
        lines.append([turn, rounds.spread(turn).show(0), shown, share])
    counts = [f"{len(rows[task]):,} items of {task} have {tokens[task]:,} tokens" for task in ours]
    caption = (
        f"Median (lowest to highest): {rounds.summary()}.\n{'; '.join(counts)}.\nThe fastest batch size of lm-eval "
    )
    caption += "is " + ", ".join(f"{batch_sizes[task]} for {task}" for task in ours)
    caption += f", of {', '.join(map(str, subject.case.batch_sizes))}.\nLargest difference in nats per token: "
    caption += f"{max(agreement.values()):.1e}."
    columns = ["", "tokens/s", "toolkit over lm-eval", "of training"]
    table = {"title": _title("evaluation", name), "columns": columns, "rows": lines, "caption": caption}
    found = {"case": name, "sizes": vars(sizes), "tokens": tokens, "batch_sizes": batch_sizes, "agreement": agreement}
    found |= {"tokens_per_s": rounds.values, "over_lm_eval": over, "of_training": of_training}
    return found | {"probes": rounds.probes, "table": table}


def difference(found: list[Continuation], expected: list[float]) -> float:
    """The largest difference from the ``expected`` nats, per token. Raises ValueError if it exceeds AGREEMENT."""
    differences = [abs(each.nats - nats) / each.tokens for each, nats in zip(found, expected, strict=True)]
    largest = max(differences)
    if not all(each <= AGREEMENT for each in differences):  # none of them is NaN
        raise ValueError(f"the peer's nats differ from ours by up to {largest:.2g} per token: not the same model")
    return largest


def cost(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """The share of a run's time that each evaluator takes at every evaluation, and the number of its items that take
    SHARE. Evaluators are those of the overlays in gin/evaluator/, with the items of this benchmark."""
    subject = Subject(CASES[name], arguments)
    between = EVAL_EVERY * BATCH * subject.sizes.context / max(subject.train() for _ in range(arguments.rounds))
    lines, found = [], {}
    for task, (evaluator, count) in harness.every_evaluator(subject.rows, subject.texts[:8]).items():
        seconds = min(_seconds(subject, evaluator) for _ in range(arguments.rounds))
        found[task] = {"items": count, "seconds": seconds, "share": seconds / between}
        affordable = SHARE * between / (seconds / count)
        lines.append([task, f"{count:,}", f"{seconds:,.2f}", f"{seconds / between:.4%}", f"{affordable:,.0f}"])
    caption = f"{EVAL_EVERY:,} steps of {BATCH} x {subject.sizes.context:,} tokens take {between:,.0f} s, by the speed "
    caption += f"of {subject.case.batch} x {subject.sizes.context:,} tokens."
    columns = ["evaluator", "items", "seconds", f"of {EVAL_EVERY:,} steps", f"items that take {SHARE:.0%}"]
    table = {"title": _title("the cost of evaluators", name), "columns": columns, "rows": lines, "caption": caption}
    return {"case": name, "sizes": vars(subject.sizes), "seconds": between, "evaluators": found, "table": table}


def _seconds(subject: Subject, evaluator: Evaluator) -> float:
    return subject.timed(partial(evaluator.evaluate, subject.reader))


def _title(what: str, name: str) -> str:
    sizes = CASES[name].sizes
    return f"{what}, {name}: vocabulary {sizes.vocab:,}, {sizes.dim} wide, {sizes.layers} layers, float32"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--cost", action="store_true", help="how much of a run's time each evaluator takes; needs no peer")
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" or ".join(CASES))
    add("--items", type=float, default=1.0, help="factor for the number of items (default: 1)")
    add("--rounds", type=int, default=3)
    add("--repeats", type=int, help="largest number of unsteady rounds to run again (default: as many as rounds)")
    add("--threads", type=int, help="PyTorch's threads")
    measure.add_cpu_time_flag(parser)
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
