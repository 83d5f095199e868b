"""Prepares batches in a thread while earlier steps run. A batch depends only on its index, so results do not change."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable

import numpy as np
import torch


def prefetch(
    make: Callable[[int], np.ndarray], indices: Iterable[int], device: torch.device, ahead: int = 4
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Yield ids and targets, both (B, T), on ``device`` for each index: make(index) returns (B, T+1) int64.

    A thread makes up to ``ahead`` batches in advance. Its errors are raised by the iterator, at the batch that failed.
    Closing the iterator ends the thread."""
    ready: queue.Queue[torch.Tensor | Exception | None] = queue.Queue(maxsize=ahead)  # None after the last batch
    stop = threading.Event()

    def put_unless_stopped(item: torch.Tensor | Exception | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make_batches() -> None:
        try:
            for index in indices:
                batch = torch.from_numpy(make(index))
                put_unless_stopped(batch.pin_memory() if device.type == "cuda" else batch)
                if stop.is_set():
                    return
            put_unless_stopped(None)
        except Exception as error:
            put_unless_stopped(error)

    thread = threading.Thread(target=make_batches, daemon=True, name="prefetch")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            batch = item.to(device, non_blocking=True)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    finally:
        stop.set()
        thread.join()
