"""Checks of any part inside a model in training: gradients, a falling loss, equal seeds, and compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.conformance.bench import MODELS, Bench, objective, plain_part, tokens, two_steps
from toolkit.conformance.lines import Broken, Gauge, check


@check("every parameter gets a gradient", *MODELS, "init")
def gradients(bench: Bench) -> Gauge:
    """Within 5 optimizer steps, every parameter gets a gradient that is finite and not zero."""
    model = bench.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    first_step: dict[str, int] = {}
    for step in range(5):  # several steps: a projection that starts at zero blocks the gradient in the first
        optimizer.zero_grad()
        objective(model, tokens(4, 33, seed=step)).backward()
        for name, parameter in trainable:
            if parameter.grad is None:
                continue
            if not parameter.grad.isfinite().all():
                raise Broken(
                    f"the gradient of {name} is not finite at step {step}; look at torch.where (both of its branches "
                    "need finite gradients), and at roots, logarithms and divisions near 0"
                )
            if parameter.grad.any():
                first_step.setdefault(name, step)
        optimizer.step()
    missing = [name for name, _ in trainable if name not in first_step]
    if missing:
        raise Broken(
            f"no gradient in 5 steps for {', '.join(missing)}; use each parameter in forward(), remove it, or freeze "
            "it with requires_grad_(False)"
        )
    last_step = max(first_step.values(), default=0)
    gauge = Gauge(note=f"{len(first_step)} of {len(first_step)} parameters have one by step {last_step}")
    gauge.record(0, "B=4, T=32, 5 steps")
    return gauge


@check("two steps lower the loss", *MODELS, "init")
def learns(bench: Bench) -> Gauge:
    """Two steps of AdamW on one batch lower its loss."""
    return two_steps(bench.model(plain_init=True), plain_part("loss")())


@check(
    "equal seeds give equal results",
    *MODELS,
    "init",
    look_at="random numbers that do not come from torch, and state that a call leaves behind",
)
def deterministic(bench: Bench) -> Gauge:
    """Equal seeds give equal weights and outputs, whatever was drawn before. The global generator does not move."""
    first = bench.model(dropout=0.1) if bench.kind != "model" else bench.model()
    torch.rand(1000)
    generator_state = torch.get_rng_state()
    second = bench.model(dropout=0.1) if bench.kind != "model" else bench.model()
    if not torch.equal(generator_state, torch.get_rng_state()):
        raise Broken(
            "building the model changes the state of torch's global generator, which must stay as it was; draw in the "
            "part's constructor, or from the generator that draw() gets"
        )
    gauge, ids, outputs = Gauge(0.0, "largest difference"), tokens(2, 13), []
    for name, value in first.state_dict().items():
        gauge.record((value.double() - second.state_dict()[name].double()).abs().max(), "weights of two builds")
    for model in (first, second, second):
        torch.manual_seed(3)
        outputs.append(model(ids)[0])
    gauge.record((outputs[0] - outputs[1]).abs().max(), "outputs of two builds")
    gauge.record((outputs[1] - outputs[2]).abs().max(), "one build called twice")
    other = bench.model(seed=1).state_dict()
    if not any((value != other[name]).any() for name, value in bench.model().state_dict().items()):
        raise Broken("seeds 0 and 1 give the same weights, and must give different ones; look for a fixed seed")
    return gauge


@check(
    "compiles into one graph",
    *MODELS,
    slow=True,
    look_at="state that forward() changes, and operations that a compiler may reorder",
)
def compiles(bench: Bench) -> Gauge:
    """Forward and loss compile into one graph without a break, and give the values and gradients of eager mode."""
    gauge = Gauge(1e-4, "difference between compiled and eager")
    changes: dict[str, Any] = {} if bench.kind == "model" else {"n_layer": 1}
    for backend in ("aot_eager", "inductor") if bench.inductor else ("aot_eager",):
        torch.compiler.reset()
        model, results = bench.model(**changes), []
        step, ids = _Step(model), tokens(2, 14)
        for compiled in (False, True):
            if compiled:
                step.compile(backend=backend, fullgraph=True)
            step.zero_grad()
            value = step(ids)
            value.backward()
            results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for ours, theirs in zip(*results, strict=True):
            gauge.record((ours - theirs).abs().max() / max(1.0, theirs.abs().max()), f"{backend}, T=13")
    return gauge


class _Step(nn.Module):
    """Model and loss as one module, which is what the toolkit compiles."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, plain_part("loss")()

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T + 1) -> the mean loss, a scalar."""
        return objective(self.model, ids, self.loss)
