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
        raise Broken(
            f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 100 steps at the default rate; it must stay "
            f"finite and fall below {0.97 * losses[0]:.4f}; look at the sign of the update and the default rate"
        )
    gauge = Gauge(note=f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    gauge.record(0, "100 steps")
    return gauge


@check(
    "every parameter is in one group",
    "optimizer",
    look_at="lr_scale of each parameter, which peak_lr must include: use toolkit.groups.parameter_groups",
)
def groups(bench: Bench) -> Gauge:
    """Every trainable parameter is in exactly one group. Each group has a name and a peak rate that includes the
    parameters' ``lr_scale``, and starts at this rate."""
    model = bench.model()
    model.get_parameter("embed.weight").requires_grad_(False)
    scaled, unscaled = model.get_parameter("norm.weight"), model.get_parameter("norm.bias")
    vars(scaled).update(lr_scale=0.5)
    optimizer = bench.cls(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Broken("it is not a torch.optim.Optimizer, and must be one: inherit from it or a subclass")
    grouped_ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable_ids = [id(p) for p in model.parameters() if p.requires_grad]
    if sorted(grouped_ids) != sorted(trainable_ids):
        raise Broken(
            f"the groups contain {len(grouped_ids)} tensors, {len(set(grouped_ids) & set(trainable_ids))} of them "
            f"distinct and trainable; they must contain each of the {len(trainable_ids)} trainable tensors once; build "
            "the groups with toolkit.groups.parameter_groups"
        )
    peaks = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    if any(group["lr"] != group["peak_lr"] or not group.get("name") for group in optimizer.param_groups):
        raise Broken(
            "a group has no name, or its lr is not its peak_lr; each group must have a name and start at its peak; "
            "build the groups with toolkit.groups.parameter_groups"
        )
    note = f"{len(grouped_ids)} tensors in {len(optimizer.param_groups)} groups"
    gauge = Gauge(1e-9, "error of the ratio of two rates", note=note)
    gauge.record(abs(peaks[id(scaled)] / peaks[id(unscaled)] - 0.5), "lr_scale 0.5, a frozen table")
    return gauge


@check(
    "learning rate 0 changes no weight",
    "optimizer",
    look_at="updates that are not multiplied by the group's lr, such as weight decay or an average",
)
def zero_rate(bench: Bench) -> Gauge:
    """With a learning rate of 0, no weight changes. The schedule alone decides the rate, so an optimizer must not move
    weights by other means."""
    model, x, y = _regression()
    optimizer, before, gauge = (
        bench.cls(model),
        copy.deepcopy(model.state_dict()),
        Gauge(0.0, "largest change of a weight"),
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _train(model, optimizer, x, y, 3)
    for name, value in model.state_dict().items():
        gauge.record((value - before[name]).abs().max(), "3 steps")
    return gauge


@check(
    "a restored optimizer continues exactly",
    "optimizer",
    look_at="attributes outside state and param_groups, which state_dict() does not contain",
)
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


@check(
    "eval() and train() restore the weights",
    "optimizer",
    look_at="train(), which must undo eval()",
)
def evaluation_weights(bench: Bench) -> Gauge:
    """An optimizer has both eval() and train(), which swap the evaluation weights in and out, or neither. Swapping in
    and out changes the training weights by rounding at most; the loop then restores them exactly."""
    model, x, y = _regression()
    optimizer, gauge = bench.cls(model), Gauge(1e-5)
    if hasattr(optimizer, "eval") != hasattr(optimizer, "train"):
        raise Broken("it has only one of eval() and train(), and must have both or neither")
    if not hasattr(optimizer, "eval"):
        gauge = Gauge(note="one set of weights")
        gauge.record(0, "neither eval() nor train()")
        return gauge
    _train(model, optimizer, x, y, 5)
    before = copy.deepcopy(model.state_dict())
    optimizer.eval()
    optimizer.train()
    for name, value in model.state_dict().items():
        gauge.record((value - before[name]).abs().max(), "eval() and train() after 5 steps")
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
    gauge = Gauge(note=f"{state / sum(p.numel() for p in model.parameters()):.2f} numbers of state per parameter")
    gauge.record(0, "2 linear layers")
    return gauge


def _regression() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, inputs (64, 8) and targets (64, 1)."""
    generator = torch.Generator().manual_seed(2)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 8, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, x, x[:, :1] * x[:, 1:2] + x[:, 2:3]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Train on the whole data. Returns the loss before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
