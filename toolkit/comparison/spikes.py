"""The guard on training losses that jump."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from toolkit.comparison.banner import Banner
from toolkit.comparison.runs import Run

SPIKE_SD, SPIKE_NATS, SPIKE_WINDOW = 8.0, 0.2, 5  # a spike is this far above the median before it


def spiked(runs: list[Run]) -> Iterable[Banner]:
    """Training losses that jump, after warm-up, far above those just before; and steps that were skipped for that."""
    for run in runs:
        skipped_steps, count = run.curve("skipped/count")
        if len(count):
            yield Banner(
                "spiked", f"{run.name}: {count[-1]:.0f} steps were skipped, the last at step {skipped_steps[-1]:,.0f}"
            )
        steps, loss = run.curve("train/loss_nats")
        warm = [value for key, value in run.config.items() if key.endswith(".warmup_steps") and isinstance(value, int)]
        after_warmup = steps >= max(warm, default=run.steps // 10)
        steps, loss = steps[after_warmup], loss[after_warmup]
        spike_indices = spikes(loss)
        if len(spike_indices):
            worst = spike_indices[np.argmax(loss[spike_indices])]
            median_before = np.median(loss[max(0, worst - SPIKE_WINDOW) : worst])
            text = f"training loss jumped from {median_before:.3f} to {loss[worst]:.3f} at step {steps[worst]:,.0f}"
            points = "1 point lies" if len(spike_indices) == 1 else f"{len(spike_indices)} points lie"
            limit = f"more than {SPIKE_SD:g} robust sd and {SPIKE_NATS:g} nats"
            median_of = f"the median of the {SPIKE_WINDOW} points before"
            yield Banner("spiked", f"{run.name}: {text} ({points} {limit} above {median_of})")


def spikes(loss: np.ndarray) -> np.ndarray:
    """Indices of points that lie more than SPIKE_SD robust standard deviations, and more than SPIKE_NATS, above the
    median of the SPIKE_WINDOW points before them. A loss that falls, however fast, has no spikes."""
    if len(loss) <= SPIKE_WINDOW + 1:
        return np.array([], dtype=int)
    rise = np.array([loss[i] - np.median(loss[i - SPIKE_WINDOW : i]) for i in range(SPIKE_WINDOW, len(loss))])
    change = np.diff(loss)  # differences between neighbours: the trend adds little to their spread
    sd = (
        1.4826 * np.median(np.abs(change - np.median(change))) / np.sqrt(2)
    )  # sd of a normal distribution, from its median absolute deviation
    return SPIKE_WINDOW + np.flatnonzero(rise > max(SPIKE_SD * sd, SPIKE_NATS))
