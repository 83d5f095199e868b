"""One optimizer step: the gradient of a batch, taken in micro-batches, and the update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.experiment import Experiment, autocast
from toolkit.parallel import distributed
from toolkit.seeding import named_seed


@dataclass(frozen=True)
class Gradient:
    """What the forward and backward passes of a step gave, over all processes.

    loss     nats per token
    norm     of the gradient, before it was clipped
    metrics  what the model reports of itself, of the last micro-batch
    """

    loss: float
    norm: float
    metrics: dict[str, torch.Tensor]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, multiple: float) -> None:
    """Set each group's learning rate to a multiple of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiple


def gradient(
    experiment: Experiment,
    module: nn.Module,
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    step: int,
    device: torch.device,
) -> Gradient:
    """Leave the batch's gradient, clipped, in the parameters. ``module`` is the objective, or its data-parallel form;
    a micro-batch is (ids, targets), both (B, T). Dropout draws by seed, step, micro-batch and rank."""
    world, rank = distributed.world_size(), distributed.rank()
    count = distributed.total(sum((targets != -100).sum() for _, targets in micro_batches))
    nats = torch.zeros((), device=device)
    for micro, (ids, targets) in enumerate(micro_batches):
        torch.manual_seed(named_seed(experiment.seed, "noise", step, micro, rank))
        skip_gradient_sync = world > 1 and micro < len(micro_batches) - 1
        with module.no_sync() if skip_gradient_sync else contextlib.nullcontext():
            with autocast(experiment, device):
                objective, summed, _, metrics = module(ids, targets)
            (objective * (world / count)).backward()  # data parallelism averages over the processes
        nats += summed
    norm = nn.utils.clip_grad_norm_(module.parameters(), experiment.clip or math.inf).item()
    return Gradient((distributed.total(nats) / count).item(), norm, metrics)


def update(optimizer: torch.optim.Optimizer) -> None:
    """Apply the gradient that lies in the parameters, and drop it."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
