"""Traces some steps with torch.profiler. TensorBoard and Perfetto can open the trace in the run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

BEFORE = 10  # untraced steps at the start, which compile and warm up


@contextlib.contextmanager
def traced(steps: int | None, run_dir: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step. Traces ``steps`` steps after the first 10; None traces no step."""
    if steps is None:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(run_dir)),
        acc_events=True,  # without it torch 2.11 warns, although there is only one cycle
    ) as profiler:
        yield profiler.step
