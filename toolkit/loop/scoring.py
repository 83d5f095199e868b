"""The score of a model: plain cross-entropy on a split, whatever it was trained on."""

from __future__ import annotations

import math

import torch

from toolkit.loop.prefetch import prefetch
from toolkit.parallel import distributed


def evaluate(objective, data, tokenizer, batch: int, windows: int, device, split: str = "val") -> dict[str, float]:
    """Plain cross-entropy over the first ``windows`` samples of a split: {"loss_nats" per token, "bits_per_byte"}.
    Bytes are those of the text that the predicted tokens stand for; specials count none. The samples are shared out
    over the processes of a data-parallel run; a last batch is filled up with targets that don't count."""
    windows = min(windows, data.windows(split))
    lengths = torch.as_tensor(tokenizer.byte_lengths, device=device)
    rank, world = distributed.rank(), distributed.world_size()
    totals = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with torch.no_grad():
        mine = range(rank, -(-windows // batch), world)
        for index, (ids, targets) in zip(
            mine, prefetch(lambda i: data.batch(split, i, batch), mine, device), strict=True
        ):
            targets[max(0, windows - index * batch) :] = -100
            _, nats, count, _ = objective(ids, targets)
            size = lengths[targets.clamp_min(0)] * (targets != -100)
            totals += torch.stack((nats, count, size.sum())).to(totals)
    nats, count, size = distributed.total(totals).tolist()
    return {"loss_nats": nats / count, "bits_per_byte": nats / (math.log(2) * size) if size else math.nan}
