"""A trace of some steps by torch.profiler, into the run's folder, where TensorBoard and Perfetto open it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

BEFORE = 10  # steps that are let pass first: the first ones compile and warm up


@contextlib.contextmanager
def traced(steps: int | None, run_dir: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step. ``steps`` of them are traced, after 10 others; None traces none."""
    if steps is None:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(run_dir)),
        acc_events=True,  # of the one cycle that there is: torch 2.11 warns where this is not said
    ) as profiler:
        yield profiler.step
