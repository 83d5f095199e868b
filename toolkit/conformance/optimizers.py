"""Checks of an optimizer."""

from __future__ import annotations

import copy
import io
import math

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.conformance.bench import Bench
from toolkit.conformance.report import Broken, Gauge, check


@check("lowers the loss of a regression", "optimizer")
def descends(bench: Bench) -> Gauge:
    """100 steps at the default rate lower the loss of a small regression, and stay finite."""
    model, x, y = _regression()
    losses = _fit(model, bench.cls(model), x, y, 100)
    if not all(map(math.isfinite, losses)) or losses[-1] > 0.97 * losses[0]:
        raise Broken(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 100 steps")
    gauge = Gauge(note=f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    gauge.see(0, "100 steps")
    return gauge


@check("groups hold every parameter once", "optimizer")
def groups(bench: Bench) -> Gauge:
    """Every trainable parameter is in one group, with a name, the peak rate, and its ``lr_scale`` in that."""
    model = bench.model()
    model.embed.weight.requires_grad_(False)
    model.norm.weight.lr_scale = 0.5
    optimizer = bench.cls(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Broken("it is no torch.optim.Optimizer")
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    if sorted(held) != sorted(wanted):
        raise Broken(f"groups hold {len(held)} tensors ({len(set(held) & set(wanted))} right) of {len(wanted)}")
    peaks = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    if any(group["lr"] != group["peak_lr"] or not group.get("name") for group in optimizer.param_groups):
        raise Broken("a group lacks its name, or starts at another rate than its peak; use toolkit.groups")
    gauge = Gauge(1e-9, "lr_scale not kept, by", note=f"{len(held)} tensors in {len(optimizer.param_groups)} groups")
    gauge.see(abs(peaks[id(model.norm.weight)] / peaks[id(model.norm.bias)] - 0.5), "lr_scale 0.5, a frozen table")
    return gauge


@check("rate zero moves nothing", "optimizer")
def still(bench: Bench) -> Gauge:
    """The schedule owns the rate: what an optimizer does beside it would escape the comparison."""
    model, x, y = _regression()
    optimizer, before, gauge = bench.cls(model), copy.deepcopy(model.state_dict()), Gauge(0.0, "largest move")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _fit(model, optimizer, x, y, 3)
    for name, value in model.state_dict().items():
        gauge.see((value - before[name]).abs().max(), "3 steps")
    return gauge


@check("a restored optimizer goes on", "optimizer")
def resumes(bench: Bench) -> Gauge:
    """State saved to a file and loaded, as checkpoints do it: to the bit as if nothing had happened."""
    model, x, y = _regression()
    optimizer, file = bench.cls(model), io.BytesIO()
    _fit(model, optimizer, x, y, 7)
    torch.save(optimizer.state_dict(), file)
    other = _regression()[0]
    other.load_state_dict(model.state_dict())
    restored = bench.cls(other)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    gauge = Gauge(0.0, "largest difference")
    for ours, theirs in zip(_fit(other, restored, x, y, 12), _fit(model, optimizer, x, y, 12), strict=True):
        gauge.see(abs(ours - theirs), "7 + 12 steps, losses")
    for name, value in other.state_dict().items():
        gauge.see((value - model.state_dict()[name]).abs().max(), "7 + 12 steps, weights")
    return gauge


@check("evaluation weights come and go", "optimizer")
def judged(bench: Bench) -> Gauge:
    """An optimizer with eval() and train() has both, and training that is judged between steps goes on from weights
    that differ by rounding at most (the loop puts the exact ones back)."""
    model, x, y = _regression()
    optimizer, gauge = bench.cls(model), Gauge(1e-5)
    if hasattr(optimizer, "eval") != hasattr(optimizer, "train"):
        raise Broken("it has one of eval() and train(), and needs both or neither")
    if not hasattr(optimizer, "eval"):
        gauge = Gauge(note="one set of weights")
        gauge.see(0, "neither eval() nor train()")
        return gauge
    _fit(model, optimizer, x, y, 5)
    before = copy.deepcopy(model.state_dict())
    optimizer.eval()
    optimizer.train()
    for name, value in model.state_dict().items():
        gauge.see((value - before[name]).abs().max(), "eval() and back after 5 steps")
    return gauge


@check("steps on the meta device", "optimizer")
def meta(bench: Bench) -> Gauge:
    """A dry run counts the optimizer's memory there."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = bench.cls(model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    gauge = Gauge(note=f"{state / sum(p.numel() for p in model.parameters()):.2f} numbers of state a parameter")
    gauge.see(0, "2 linear layers")
    return gauge


def _regression():
    generator = torch.Generator().manual_seed(2)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 8, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, x, x[:, :1] * x[:, 1:2] + x[:, 2:3]


def _fit(model, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
