"""Model and loss as one module, (ids, targets) -> scalars: what is compiled, and what data parallelism wraps."""

import torch
from torch import Tensor, nn

from toolkit.context import Context


class Objective(nn.Module):
    """ids, targets (B, T) -> (objective, nats, count, metrics): sums over the targets that are not -100. Auxiliary
    losses of the parts are added per counted target, so that accumulated micro-batches weigh as one batch. With
    ``eot`` given, attention stays inside documents and positions restart after each ``eot``."""

    def __init__(self, model: nn.Module, loss: nn.Module, eot: int | None = None):
        super().__init__()
        self.model, self.loss, self.eot = model, loss, eot

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        context = Context() if self.eot is None else Context(*documents(ids, self.eot))
        hidden, head = self.model(ids, context)
        objective, nats, count = self.loss(hidden.flatten(0, 1), head, targets.flatten())
        for extra in context.losses.values():
            objective = objective + extra * count
        return objective, nats, count, context.metrics


def documents(ids: Tensor, eot: int) -> tuple[Tensor, Tensor]:
    """ids (B, T) -> positions, documents, both (B, T): where each token stands in its document, and which one that is.
    The ``eot`` belongs to the document that it ends."""
    ends = (ids == eot).long()
    index = ends.cumsum(1) - ends
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where(index > index.roll(1, 1), place, 0)
    starts[:, 0] = 0
    return place - starts.cummax(1).values, index
