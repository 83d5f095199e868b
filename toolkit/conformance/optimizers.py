"""Checks of an optimizer."""

from __future__ import annotations

import copy
import io
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.conformance.bench import Bench
from toolkit.conformance.lines import Broken, Gauge, check


@check("lowers the loss of a regression", "optimizer")
def descends(bench: Bench) -> Gauge:
    """100 steps at the default rate lower the loss of a small regression, and the loss stays finite."""
    model, x, y = _regression()
    losses = _train(model, bench.cls(model), x, y, 100)
    if not all(map(math.isfinite, losses)) or losses[-1] > 0.97 * losses[0]:
        raise Broken(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 100 steps")
    gauge = Gauge(note=f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    gauge.record(0, "100 steps")
    return gauge


@check("groups hold every parameter once", "optimizer")
def groups(bench: Bench) -> Gauge:
    """Every trainable parameter is in exactly one group. Each group has a name and a peak rate that includes the
    parameters' ``lr_scale``, and starts at this rate."""
    model = bench.model()
    model.embed.weight.requires_grad_(False)
    model.norm.weight.lr_scale = 0.5
    optimizer = bench.cls(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Broken("it is no torch.optim.Optimizer")
    grouped_ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable_ids = [id(p) for p in model.parameters() if p.requires_grad]
    if sorted(grouped_ids) != sorted(trainable_ids):
        raise Broken(
            f"groups hold {len(grouped_ids)} tensors ({len(set(grouped_ids) & set(trainable_ids))} right) "
            f"of {len(trainable_ids)}"
        )
    peaks = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    if any(group["lr"] != group["peak_lr"] or not group.get("name") for group in optimizer.param_groups):
        raise Broken("a group lacks its name, or starts at another rate than its peak; use toolkit.groups")
    gauge = Gauge(
        1e-9, "lr_scale not kept, by", note=f"{len(grouped_ids)} tensors in {len(optimizer.param_groups)} groups"
    )
    gauge.record(abs(peaks[id(model.norm.weight)] / peaks[id(model.norm.bias)] - 0.5), "lr_scale 0.5, a frozen table")
    return gauge


@check("rate zero moves nothing", "optimizer")
def zero_rate(bench: Bench) -> Gauge:
    """With a learning rate of 0, no weight changes. The schedule alone decides the rate, so an optimizer must not move
    weights by other means."""
    model, x, y = _regression()
    optimizer, before, gauge = bench.cls(model), copy.deepcopy(model.state_dict()), Gauge(0.0, "largest move")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _train(model, optimizer, x, y, 3)
    for name, value in model.state_dict().items():
        gauge.record((value - before[name]).abs().max(), "3 steps")
    return gauge


@check("a restored optimizer goes on", "optimizer")
def resumes(bench: Bench) -> Gauge:
    """An optimizer whose state was saved to a file and loaded continues with the same bits as without it."""
    model, x, y = _regression()
    optimizer, file = bench.cls(model), io.BytesIO()
    _train(model, optimizer, x, y, 7)
    torch.save(optimizer.state_dict(), file)
    other = _regression()[0]
    other.load_state_dict(model.state_dict())
    restored = bench.cls(other)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    gauge = Gauge(0.0, "largest difference")
    for ours, theirs in zip(_train(other, restored, x, y, 12), _train(model, optimizer, x, y, 12), strict=True):
        gauge.record(abs(ours - theirs), "7 + 12 steps, losses")
    for name, value in other.state_dict().items():
        gauge.record((value - model.state_dict()[name]).abs().max(), "7 + 12 steps, weights")
    return gauge


@check("evaluation weights come and go", "optimizer")
def evaluation_weights(bench: Bench) -> Gauge:
    """An optimizer has both eval() and train(), which swap the evaluation weights in and out, or neither. Swapping in
    and out changes the training weights by rounding at most; the loop then restores them exactly."""
    model, x, y = _regression()
    optimizer, gauge = bench.cls(model), Gauge(1e-5)
    if hasattr(optimizer, "eval") != hasattr(optimizer, "train"):
        raise Broken("it has one of eval() and train(), and needs both or neither")
    if not hasattr(optimizer, "eval"):
        gauge = Gauge(note="one set of weights")
        gauge.record(0, "neither eval() nor train()")
        return gauge
    _train(model, optimizer, x, y, 5)
    before = copy.deepcopy(model.state_dict())
    optimizer.eval()
    optimizer.train()
    for name, value in model.state_dict().items():
        gauge.record((value - before[name]).abs().max(), "eval() and back after 5 steps")
    return gauge


@check("steps on the meta device", "optimizer")
def steps_on_meta(bench: Bench) -> Gauge:
    """The optimizer steps on the meta device, on which a dry run counts its memory."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = bench.cls(model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    gauge = Gauge(note=f"{state / sum(p.numel() for p in model.parameters()):.2f} numbers of state a parameter")
    gauge.record(0, "2 linear layers")
    return gauge


def _regression() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 8, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, x, x[:, :1] * x[:, 1:2] + x[:, 2:3]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
