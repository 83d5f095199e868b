"""Equal budgets: the width of a part at which an arm has as many parameters, or FLOPs, as the baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch

from toolkit.config.layers import Config
from toolkit.experiment import build
from toolkit.rundir import facts

LIMIT = 2**24  # wider than any layer; a count that has not reached the target by then does not grow


def count(config: Config, of: str) -> int:
    """Parameters ("params") or training FLOPs per token ("flops") of a config, on the meta device. Raises ValueError
    where a part does not run there."""
    experiment = config.build()
    try:
        model = build(experiment, torch.device("meta")).model
        if of == "params":
            return facts.parameters(model)["total"]
        return facts.flops_per_token(model, experiment.seq_len)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"can't match {of}: a part does not run on meta tensors ({reason})") from error


def solve(of: Callable[[int], int], target: int, multiple: int = 1, guess: int = 64) -> tuple[int, int]:
    """The width, a multiple of ``multiple``, for which ``of(width)`` is nearest to the target, the smaller of two, and
    what it then is above it. ``of`` grows with the width; the search goes out from ``guess``, since some knobs have
    no small values. Raises ValueError where the count does not grow."""
    seen: dict[int, int] = {}

    def at(times: int) -> int:
        if times not in seen:
            seen[times] = of(times * multiple)
        return seen[times]

    low, high = 0, max(1, guess // multiple)  # at(low) < target <= at(high), where 0 stands for no width at all
    while high > 1 and at(high) >= target and at(high // 2) >= target:
        high //= 2
    if high > 1 and at(high) >= target:
        low = high // 2
    while at(high) < target:
        low, high = high, 2 * high
        if high * multiple > LIMIT or at(high) <= at(low):
            raise ValueError(f"the count does not grow to {target:,} with the width: {at(low):,} at {low * multiple:,}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    best = min([times for times in (low, high) if times], key=lambda times: abs(at(times) - target))
    return best * multiple, at(best) - target
