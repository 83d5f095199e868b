"""Training steps for timing: all contestants have the same batches, optimizer and clipping. And the bound of their
speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.peers import PEERS, Sizes
from toolkit.compose import compose
from toolkit.cpu.allocator import keep_freed_memory
from toolkit.cpu.products import fits, product
from toolkit.experiment import Experiment, Parts, autocast, build
from toolkit.loop.prefetch import prefetch
from toolkit.protocols import Data
from toolkit.seeding import named_seed

NAMES = [f"{name} {way}" for way in ("eager", "compiled") for name in ("toolkit", *(p.package for p in PEERS))]
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0


class Contestant:
    """One training step after another: batch, forward, loss, backward, clipping, AdamW."""

    def __init__(self, name: str, sizes: Sizes, batch: int, device: torch.device):
        who, way = name.split()
        self.name, self.device, self.count = name, device, 0
        self.experiment, self.parts = ours(sizes, batch, way == "compiled", device)
        self.package = f"{who} {metadata.version(who)}" if who != "toolkit" else ""
        if who == "toolkit":
            self.module, self.optimizer = self.parts.objective, self.parts.optimizer
            self.loss = self._objective
            options = {"fullgraph": True, "dynamic": False}  # as the toolkit's loop compiles
        else:
            self.module = next(peer for peer in PEERS if peer.package == who)(sizes).to(device)
            # PyTorch's fused kernel for all, although litgpt's script uses the slower one on a CPU
            optimizer = functools.partial(torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
            self.optimizer, self.loss, options = optimizer(self.module.parameters()), self.module, {}
        self.parameters = sum(p.numel() for p in self.module.parameters())
        if way == "compiled":
            self.module.compile(**options)
        self.batches = batches(self.parts.data, batch, device)

    def step(self) -> float:
        """Make one step. Returns the norm of the gradient, which waits for the device."""
        ids, targets = next(self.batches)
        with autocast(self.experiment, self.device):
            loss = self.loss(ids, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), CLIP).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.count == 1 and self.device.type == "cpu":
            keep_freed_memory()  # as the training loop does; ``count`` is of our own steps
        return norm

    def _objective(self, ids: Tensor, targets: Tensor) -> Tensor:
        """What the training loop does with a batch: schedule, seeded noise, the mean loss over the targets."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.parts.schedule(self.count)
        torch.manual_seed(named_seed(self.experiment.seed, "noise", self.count, 0, 0))
        self.count += 1
        objective, self.nats, count, _ = self.module(ids, targets)
        return objective / count


def bindings(sizes: Sizes, batch: int, compiled: bool) -> list[str]:
    """Bindings for the default experiment with these sizes and with generated text."""
    values = {
        "GPT.dim": sizes.dim,
        "GPT.n_layer": sizes.layers,
        "GPT.n_head": sizes.heads,
        "SwiGLU.hidden": sizes.hidden,
        "Experiment.seq_len": sizes.context,
        "Experiment.batch_size": batch,
        "Experiment.compile": compiled,
        "Experiment.tokenizer": "@Numbers",
        "Experiment.data": "@ZipfNumbers",
        "Numbers.size": sizes.vocab,
        "AdamW.lr": LR,
        "AdamW.betas": BETAS,
        "AdamW.weight_decay": DECAY,
        "Experiment.clip": CLIP,
    }
    return [f"{name} = {value}" for name, value in values.items()]


def ours(sizes: Sizes, batch: int, compiled: bool, device: torch.device) -> tuple[Experiment, Parts]:
    """The experiment that ``toolkit.run`` would train, and its parts."""
    config, _ = compose((), bindings(sizes, batch, compiled), imports=("benchmarks.parts",))
    experiment = config.build()
    parts = build(experiment, device)
    parts.data.prepare()
    return experiment, parts


def batches(data: Data, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless sequence of ids and targets, (B,T) each, from the toolkit's loader."""
    return prefetch(data, "train", batch, iter(range(1_000_000)), device)


def products(
    sizes: Sizes, batch: int, device: torch.device, clock: Callable[[], float], plain: bool = False
) -> Callable[[], float]:
    """A function that returns the seconds, by ``clock``, of a step's matrix products alone, forward and backward,
    written into existing memory. Each product uses the fastest way that we know (on some CPUs PyTorch has two
    libraries), or with ``plain`` torch.mm. Causal attention counts half of its pairs: all queries with half of the
    keys."""
    if device.type == "cpu":
        keep_freed_memory()  # oneDNN's results are new each time
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, make = batch * sizes.context, functools.partial(torch.randn, dtype=dtype, device=device)
    shapes = [(sizes.dim, 3 * sizes.dim), (sizes.dim, sizes.dim), (sizes.dim, 2 * sizes.hidden)]
    shapes = (shapes + [(sizes.hidden, sizes.dim)]) * sizes.layers + [(sizes.dim, sizes.vocab + -sizes.vocab % 128)]
    work, fastest = [], {}
    for inner, outer in shapes:  # separate tensors for each layer: as in a step, none is in the CPU's cache
        x, dx, w, dw = make(rows, inner), make(rows, inner), make(outer, inner), make(outer, inner)
        y = make(rows, outer)
        for kind, (a, b, out) in enumerate(((x, w.T, y), (y, w, dx), (y.T, x, dw))):
            ways = [functools.partial(torch.mm, a, b, out=out)]
            if not plain and fits(a, b.T):  # the result, or its transpose
                ways += [functools.partial(product, a, b.T), functools.partial(product, b.T, a)]
            if (kind, inner, outer) not in fastest:
                times = [min(measure.seconds(way, device) for _ in range(5)) for way in ways]
                fastest[kind, inner, outer] = times.index(min(times))
            work.append(ways[fastest[kind, inner, outer]])
    heads, width, half = batch * sizes.heads, sizes.dim // sizes.heads, sizes.context // 2
    q, dq, k, dk = (make(heads, length, width) for length in (2 * half, 2 * half, half, half))
    scores = make(heads, 2 * half, half)
    pairs = [(q, k.mT, scores), (scores, k, dq), (scores.mT, q, dk)] * 2 * sizes.layers

    def once() -> None:
        for multiply in work:
            multiply()
        for a, b, out in pairs:
            torch.bmm(a, b, out=out)

    once()
    return lambda: measure.seconds(once, device, clock=clock)


def flops(sizes: Sizes) -> int:
    """FLOPs per token, forward and backward, by the causal count: 6 N + 6 L d T."""
    layer = sizes.dim * (4 * sizes.dim + 3 * sizes.hidden)
    return 6 * (sizes.layers * layer + sizes.dim * sizes.vocab + sizes.layers * sizes.dim * sizes.context)
