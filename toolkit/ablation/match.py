"""Matched sizes: finds the width of a part that gives an arm as many parameters, or FLOPs, as the baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch

from toolkit.config.layers import Config
from toolkit.experiment import build
from toolkit.rundir import facts

LIMIT = 2**24  # wider than any real layer: a count still below the target here does not grow


def count(config: Config, quantity: str) -> int:
    """Count the parameters ("params") or the training FLOPs per token ("flops") of a config, on the meta device. Raises
    ValueError if a part does not run on meta tensors."""
    experiment = config.build()
    try:
        model = build(experiment, torch.device("meta")).model
        if quantity == "params":
            return facts.parameters(model)["total"]
        return facts.flops_per_token(model, experiment.seq_len)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"can't match {quantity}: a part does not run on meta tensors ({reason})") from error


def solve(count_at: Callable[[int], int], target: int, multiple: int = 1, guess: int = 64) -> tuple[int, int]:
    """Find the width whose count is nearest to the target. Returns (width, count minus target).

    The width is a multiple of ``multiple``; of two equally near widths the smaller one wins. ``count_at(width)`` must
    grow with the width. The search starts at ``guess``, since some knobs refuse small values. Raises ValueError if the
    count does not grow."""
    counts: dict[int, int] = {}

    def cached_count(multiples: int) -> int:
        if multiples not in counts:
            counts[multiples] = count_at(multiples * multiple)
        return counts[multiples]

    low, high = 0, max(1, guess // multiple)  # keeps count(low) < target <= count(high); low = 0 means no width
    while high > 1 and cached_count(high) >= target and cached_count(high // 2) >= target:
        high //= 2
    if high > 1 and cached_count(high) >= target:
        low = high // 2
    while cached_count(high) < target:
        low, high = high, 2 * high
        if high * multiple > LIMIT or cached_count(high) <= cached_count(low):
            raise ValueError(
                f"the count does not reach {target:,} as the width grows: it is {cached_count(low):,} at width "
                f"{low * multiple:,}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cached_count(middle) < target else (low, middle)
    best = min(
        [multiples for multiples in (low, high) if multiples],
        key=lambda multiples: abs(cached_count(multiples) - target),
    )
    return best * multiple, cached_count(best) - target
