"""Checks of a loss: what it reports, what it sums over, and what it differentiates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.conformance.bench import VOCAB, Bench, relative, two_steps
from toolkit.conformance.lines import Broken, Gauge, check
from toolkit.model import Head

ROWS, WIDTH, TABLE = 24, 16, 64  # 14 rows of the table are padding


@check(
    "reports cross-entropy and count",
    "loss",
    look_at="nats, the second result: the plain summed cross-entropy, without smoothing, weights or penalties",
)
def plain(bench: Bench) -> Gauge:
    """nats is the summed cross-entropy, whatever the objective is, and has no gradient. count is the number of targets
    that are not ignored."""
    gauge = Gauge(1e-5, "relative difference")
    for softcap in (None, 5.0):
        hidden, weight, targets = _inputs()
        _, nats, count = bench.cls()(hidden, Head(weight, VOCAB, softcap), targets)
        logits = (hidden @ weight.T)[:, :VOCAB]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        gauge.record(relative(nats, F.cross_entropy(logits, targets, reduction="sum")), f"N={ROWS}, softcap {softcap}")
        if nats.requires_grad or int(count) != ROWS - 6:
            raise Broken(
                f"count is {int(count)} and must be {ROWS - 6}, the number of targets other than -100; nats has "
                f"{'a' if nats.requires_grad else 'no'} gradient and must have none (use detach())"
            )
    return gauge


@check(
    "micro-batches add up to the batch",
    "loss",
    look_at="means: the objective must be a sum over the targets, which the loop divides by their number",
)
def additive(bench: Bench) -> Gauge:
    """Objective, nats, count and gradients of pieces add up to those of the whole, even if one has only ignored
    targets."""
    gauge = Gauge(1e-4, "relative difference")
    for sizes in ([8, 8, 8], [1, 2, 21], [7, 17]):
        hidden, weight, targets = _inputs()
        loss, head = bench.cls(), Head(weight, VOCAB, None)
        whole = loss(hidden, head, targets)
        pieces = [loss(h, head, t) for h, t in zip(hidden.split(sizes), targets.split(sizes), strict=True)]
        summed = [sum(column) for column in zip(*pieces, strict=True)]
        for ours, theirs in zip(summed, whole, strict=True):
            gauge.record(relative(torch.as_tensor(ours), torch.as_tensor(theirs)), f"N={'+'.join(map(str, sizes))}")
        gradients = (_gradients(value[0], hidden, weight) for value in (summed, whole))
        for ours, theirs in zip(*gradients, strict=True):
            gauge.record(relative(ours, theirs), f"N={'+'.join(map(str, sizes))}, gradients")
    return gauge


@check(
    "ignored targets have no effect",
    "loss",
    look_at="penalties and divisors that include the targets of -100",
)
def ignored(bench: Bench) -> Gauge:
    """Targets of -100 get no gradient and do not change the loss. If all targets are -100, loss and gradients are 0."""
    hidden, weight, targets = _inputs()
    gauge, is_ignored, loss, head = Gauge(1e-5), targets == -100, bench.cls(), Head(weight, VOCAB, None)
    value = loss(hidden, head, targets)[0]
    gradient = _gradients(value, hidden)[0]
    gauge.record(gradient[is_ignored].abs().max(), "6 of 24 ignored, gradient")
    if not gradient[~is_ignored].any(1).all():
        raise Broken("a target other than -100 has no gradient, and must have one; look at the mask of ignored targets")
    gauge.record(relative(loss(hidden[~is_ignored], head, targets[~is_ignored])[0], value), "6 of 24 ignored, value")
    all_ignored = loss(hidden, head, torch.full_like(targets, -100))
    gauge.record(max(abs(float(value)) for value in all_ignored), "all ignored, value")
    gauge.record(max(g.abs().max() for g in _gradients(all_ignored[0], hidden, weight)), "all ignored, gradient")
    return gauge


@check(
    "padding rows have no effect",
    "loss",
    look_at="logits from head.weight: use head.logits(hidden), which leaves out the rows past head.vocab_size",
)
def padded(bench: Bench) -> Gauge:
    """The rows past the vocabulary do not change the loss, and get no gradient."""
    hidden, weight, targets = _inputs()
    gauge, loss = Gauge(1e-6), bench.cls()
    value = loss(hidden, Head(weight, VOCAB, None), targets)[0]
    changed_padding = torch.cat((weight[:VOCAB], weight[VOCAB:] + 100)).detach().requires_grad_()
    value_with_change = loss(hidden, Head(changed_padding, VOCAB, None), targets)[0]
    gauge.record(relative(value_with_change, value), f"{TABLE} rows for {VOCAB} tokens")
    gauge.record(_gradients(value_with_change, changed_padding)[0][VOCAB:].abs().max(), "gradient of the padding")
    return gauge


@check(
    "gradients match finite differences",
    "loss",
    look_at="detach(), rounding, and a backward() of your own",
)
def gradients_match_value(bench: Bench) -> Gauge:
    """The gradient along a random direction equals the finite difference of the values along it."""
    gauge, loss = Gauge(1e-2, "difference relative to the norm of the gradient"), bench.cls()
    for softcap in (None, 5.0):
        hidden, weight, targets = _inputs()
        gradients = _gradients(loss(hidden, Head(weight, VOCAB, softcap), targets)[0], hidden, weight)
        generator = torch.Generator().manual_seed(7)
        for index, title in enumerate(("hidden", "weight")):
            direction, values = torch.randn(gradients[index].shape, generator=generator), []
            for step in (0.01, -0.01):
                inputs = [hidden.detach(), weight.detach()]
                inputs[index] = inputs[index] + step * direction
                values.append(loss(inputs[0], Head(inputs[1], VOCAB, softcap), targets)[0].double())
            slope, expected_slope = (values[0] - values[1]) / 0.02, (gradients[index] * direction).sum()
            gauge.record(
                (slope - expected_slope).abs() / gradients[index].norm(), f"N={ROWS}, softcap {softcap}, {title}"
            )
    return gauge


@check("two steps lower the loss", "loss")
def learns(bench: Bench) -> Gauge:
    """Two steps of AdamW with this loss lower it on one batch."""
    return two_steps(bench.model(plain_init=True), bench.cls())


@check(
    "compiles into one graph",
    "loss",
    slow=True,
    look_at="state that forward() changes, and operations that a compiler may reorder",
)
def compiles(bench: Bench) -> Gauge:
    """Loss and gradients compile into one graph without a break, and equal those of eager mode."""
    gauge = Gauge(1e-4, "relative difference")
    for backend in ("aot_eager", "inductor") if bench.inductor else ("aot_eager",):
        torch.compiler.reset()
        hidden, weight, targets = _inputs()
        loss = bench.cls()

        def value(hidden: Tensor, weight: Tensor, targets: Tensor, loss: nn.Module = loss) -> Tensor:
            return loss(hidden, Head(weight, VOCAB, 5.0), targets)[0]

        compiled = torch.compile(value, backend=backend, fullgraph=True)(hidden, weight, targets)
        eager = value(hidden, weight, targets)
        gauge.record(relative(compiled, eager), f"{backend}, N={ROWS}")
        for ours, theirs in zip(_gradients(compiled, hidden, weight), _gradients(eager, hidden, weight), strict=True):
            gauge.record(relative(ours, theirs), f"{backend}, gradients")
    return gauge


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, C), a head's weight with padding rows (TABLE, C), and targets (N,), of which 6 are -100."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(TABLE, WIDTH, generator=generator)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[[0, 3, 4, 5, 6, 20]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradient of a scalar with respect to each input, of the input's shape."""
    return torch.autograd.grad(value, inputs, retain_graph=True)
