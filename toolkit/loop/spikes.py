"""Steps that stand out: which loss or gradient norm is too far above the last ones to be trusted."""

from __future__ import annotations

from statistics import fmean, pstdev

WINDOW = 128  # accepted steps that a new one is compared with


class Spikes:
    """The skip rule of OLMo-core's SkipStepOptimizer: a step is a spike when its loss or its gradient norm lies above
    the mean of the last 128 accepted steps by more than ``sigmas`` standard deviations. None never finds one.

    ``state`` is all that it remembers: {"history": [[loss, norm], ...], "count": spikes so far}."""

    def __init__(self, sigmas: float | None, state: dict | None = None):
        self.sigmas = sigmas
        self.state = state or {"history": [], "count": 0}

    def is_spike(self, loss: float, norm: float) -> bool:
        """Judge one step, and remember it. Until 128 steps have been accepted, none is a spike."""
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
