"""Batches made ready by a thread while the step before runs. Samples are pure, so there is nothing to keep in step."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch


def prefetch(
    make: Callable[[int], np.ndarray], indices: Iterable[int], device: torch.device, ahead: int = 4
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each index, make(index) (B, T+1) int64 as ids and targets, both (B, T), on ``device``. An error in the
    thread is raised here, at the batch that it struck. Closing the iterator ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def offer(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for index in indices:
                batch = torch.from_numpy(make(index))
                offer(batch.pin_memory() if device.type == "cuda" else batch)
                if stop.is_set():
                    return
            offer(None)
        except Exception as error:
            offer(error)

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
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
