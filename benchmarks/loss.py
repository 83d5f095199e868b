"""``python -m benchmarks.loss``: head and cross-entropy, forward and backward, against their three products alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measure
from components.loss import ChunkedCrossEntropy, CrossEntropy
from toolkit.command import run_command
from toolkit.model import Head


class Case(nn.Module):
    """One loss with its inputs: hidden (N,C), a padded table (V,C), targets (N,)."""

    def __init__(self, loss: nn.Module | None, positions: int, dim: int, vocab: int, device: torch.device):
        super().__init__()
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.loss, self.vocab = loss, vocab
        self.hidden = torch.randn(positions, dim, dtype=dtype, device=device, requires_grad=True)
        self.weight = torch.randn(vocab + -vocab % 128, dim, device=device).mul_(0.02).requires_grad_()
        self.targets = torch.randint(vocab, (positions,), device=device)

    def forward(self) -> torch.Tensor:
        if self.loss is None:  # written by hand, as most code does it
            return F.cross_entropy(F.linear(self.hidden, self.weight.to(self.hidden.dtype)).float(), self.targets)
        objective, _, count = self.loss(self.hidden, Head(self.weight, self.vocab, None), self.targets)
        return objective / count

    def step(self) -> None:
        self.hidden.grad = self.weight.grad = None
        self().backward()


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"by hand": None, "CrossEntropy": CrossEntropy(), "ChunkedCrossEntropy": ChunkedCrossEntropy()}
    cases = {}
    for way in ("eager", "compiled"):
        for name, loss in kinds.items():
            case = cases[f"{name} {way}"] = Case(loss, arguments.positions, arguments.dim, arguments.vocab, device)
            if way == "compiled":
                case.compile(fullgraph=True, dynamic=False)
            measure.note(f"{name} {way}: first step {measure.seconds(case.step, device):.1f} s")
    probe = _products(arguments, device)

    def turn(case: Case) -> Callable[[], float]:
        return lambda: arguments.positions / measure.seconds(case.step, device, clock=arguments.clock)

    turns = {name: turn(case) for name, case in cases.items()}
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)
    rows, found = [], {}
    for name in cases:
        ratio, bound = rounds.ratio(name, "by hand " + name.split()[-1]), rounds.of_bound(name, arguments.positions)
        found[name] = {"positions_per_s": rounds.values[name], "over_by_hand": ratio, "of_bound": bound}
        rows.append([name, rounds.spread(name).show(0), bound.show(), ratio.show()])
    columns = ["loss", "positions/s", "of the three products", "over the one by hand"]
    title = f"head and loss, forward and backward: {arguments.positions:,} positions, width {arguments.dim}, "
    table = {"title": title + f"vocabulary {arguments.vocab:,}", "columns": columns, "rows": rows}
    table["caption"] = f"Median (lowest to highest): {rounds.summary()}."
    result = {"benchmark": "loss", "losses": found, "probes": rounds.probes, "table": table}
    measure.report(arguments.json, result, lambda: measure.table(**table))
    return 0


def _products(arguments: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    """A function that returns the seconds of the three products alone, written into existing tensors."""
    case = Case(None, arguments.positions, arguments.dim, arguments.vocab, device)
    hidden, table = case.hidden.detach(), case.weight.detach().to(case.hidden.dtype)
    logits = hidden.new_ones(len(hidden), len(table))
    d_hidden, d_table = torch.empty_like(hidden), torch.empty_like(table)

    def once() -> None:
        torch.mm(hidden, table.T, out=logits)
        torch.mm(logits, table, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_table)

    once()
    return lambda: measure.seconds(once, device, clock=arguments.clock)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--positions", type=int, default=32_768 if cuda else 2048, help="rows of hidden states")
    add("--dim", type=int, default=768 if cuda else 256)
    add("--vocab", type=int, default=100_277)
    add("--rounds", type=int, default=5)
    add("--repeats", type=int, help="largest number of unsteady rounds to run again (default: as many as rounds)")
    add("--threads", type=int, help="PyTorch's threads on a CPU")
    measure.add_cpu_time_flag(parser)
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
