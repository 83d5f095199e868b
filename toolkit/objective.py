"""One module with the model and its loss, so that both are compiled, and wrapped for data parallelism, together."""

import torch
from torch import Tensor, nn

from toolkit.context import Context


class Objective(nn.Module):
    """ids, targets (B, T) -> (objective, nats, count, metrics).

    The first three are scalars, summed or counted over the targets that are not -100. Each auxiliary loss of a part is
    multiplied by the count, so that the objectives of micro-batches add up to that of the whole batch. If ``eot`` is
    given, tokens attend only inside their document, and positions restart after each ``eot``."""

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
    """ids (B, T) -> positions, documents, both (B, T): the position of each token in its document, and the number of
    this document in the row. An ``eot`` belongs to the document that it ends."""
    is_end = (ids == eot).long()
    document = is_end.cumsum(1) - is_end
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where(document > document.roll(1, 1), column, 0)
    starts[:, 0] = 0
    return column - starts.cummax(1).values, document
