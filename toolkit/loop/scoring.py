"""Scores a model by its plain cross-entropy on a split, whatever loss the model was trained with."""

from __future__ import annotations

import math

import torch
from torch import nn

from toolkit.loop.prefetch import prefetch
from toolkit.parallel import distributed
from toolkit.protocols import Data, Tokenizer


def evaluate(
    objective: nn.Module,
    data: Data,
    tokenizer: Tokenizer,
    batch: int,
    windows: int,
    device: torch.device,
    split: str = "val",
) -> dict[str, float]:
    """Compute the plain cross-entropy on the first ``windows`` samples of a split: {"loss_nats", "bits_per_byte"}.

    ``loss_nats`` is the mean per target that is not -100. Bytes are the UTF-8 bytes of these targets; special tokens
    have none.
    The processes of a data-parallel run divide the samples among them. The last batch may hold more samples than
    ``windows`` asks for; the targets of these extra samples are ignored."""
    windows = min(windows, data.windows(split))
    lengths = torch.as_tensor(tokenizer.byte_lengths, device=device)
    rank, world = distributed.rank(), distributed.world_size()
    totals = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with torch.no_grad():
        own_batches = range(rank, -(-windows // batch), world)
        for index, (ids, targets) in zip(own_batches, prefetch(data, split, batch, own_batches, device), strict=True):
            targets[max(0, windows - index * batch) :] = -100
            _, nats, count, _ = objective(ids, targets)
            text_bytes = lengths[targets.clamp_min(0)] * (targets != -100)
            totals += torch.stack((nats, count, text_bytes.sum())).to(totals)
    nats, count, text_bytes = distributed.total(totals).tolist()
    return {"loss_nats": nats / count, "bits_per_byte": nats / (math.log(2) * text_bytes) if text_bytes else math.nan}
