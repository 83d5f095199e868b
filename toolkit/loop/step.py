"""One optimizer step: the gradient of a batch, computed in micro-batches, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.experiment import Experiment, autocast, is_compiled
from toolkit.parallel import distributed
from toolkit.seeding import named_seed


@dataclass(frozen=True)
class Gradient:
    """The results of the forward and backward passes of a step.

    loss     nats per token, over all processes
    norm     norm of the gradient of all processes, before clipping
    metrics  metrics that the parts report, from this process's last micro-batch
    """

    loss: float
    norm: float
    metrics: dict[str, torch.Tensor]

    @property
    def finite(self) -> bool:
        """Whether loss and norm are both finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def training_module(experiment: Experiment, objective: nn.Module, device: torch.device) -> nn.Module:
    """Compile the objective if the experiment asks for this. If several processes train together, wrap it in
    DistributedDataParallel."""
    if is_compiled(experiment, device):
        objective.compile(fullgraph=True, dynamic=False)
    if distributed.world_size() == 1:
        return objective
    return DistributedDataParallel(objective, device_ids=[device.index] if device.type == "cuda" else None)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def gradient(
    experiment: Experiment,
    module: nn.Module,
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    step: int,
    device: torch.device,
) -> Gradient:
    """Compute the gradient of a batch, clip it, and leave it in the parameters' ``grad``.

    ``module`` is the result of ``training_module``. With several processes, the gradients are averaged over them once,
    after the last micro-batch. A micro-batch is (ids, targets), both (B, T). Dropout depends only on seed, step,
    micro-batch and rank."""
    world, rank, last = distributed.world_size(), distributed.rank(), len(micro_batches) - 1
    count = distributed.total(torch.stack([(targets != -100).sum() for _, targets in micro_batches]).sum())
    nats = torch.zeros((), device=device)
    for index, (ids, targets) in enumerate(micro_batches):
        torch.manual_seed(named_seed(experiment.seed, "noise", step, index, rank))
        skip_sync = module.no_sync if isinstance(module, DistributedDataParallel) and index < last else nullcontext
        with skip_sync():
            with autocast(experiment, device):
                objective, micro_nats, _, metrics = module(ids, targets)
            (objective * (world / count)).backward()  # times world, since DDP takes the mean over processes
        nats += micro_nats
    norm = nn.utils.clip_grad_norm_(module.parameters(), experiment.clip or math.inf).item()
    return Gradient((distributed.total(nats) / count).item(), norm, metrics)


def update(optimizer: torch.optim.Optimizer) -> None:
    """Update the parameters with their gradient, and delete the gradient."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
