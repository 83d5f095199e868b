"""Finds spikes: steps with a loss or gradient norm far above those of the steps before."""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import TypedDict

WINDOW = 128  # number of accepted steps with which a new step is compared


class SpikeState(TypedDict):
    """The state that checkpoints save: [loss, norm] of the last accepted steps, and the number of spikes so far."""

    history: list[list[float]]
    count: int


class Spikes:
    """The rule of OLMo-core's SkipStepOptimizer: a step is a spike if its loss or gradient norm exceeds the mean of the
    last 128 accepted steps by more than ``sigmas`` standard deviations. With ``sigmas`` None no step is a spike."""

    def __init__(self, sigmas: float | None, state: SpikeState | None = None):
        self.sigmas = sigmas
        self.state: SpikeState = state or {"history": [], "count": 0}

    def is_spike(self, loss: float, norm: float) -> bool:
        """Decide whether a step is a spike, and record it. The first 128 steps are never spikes."""
        if self.sigmas is None:
            return False
        history = self.state["history"]
        if len(history) == WINDOW:
            for value, past in zip((loss, norm), zip(*history, strict=True), strict=True):
                if value > fmean(past) + self.sigmas * pstdev(past):
                    self.state["count"] += 1
                    return True
        self.state["history"] = [*history[-(WINDOW - 1) :], [loss, norm]]
        return False
