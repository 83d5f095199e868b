"""Prepares batches in a thread while earlier steps run. A batch depends only on its index, so results do not change."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable

import numpy as np
import torch

from toolkit.protocols import Data


def prefetch(
    data: Data, split: str, size: int, indices: Iterable[int], device: torch.device, ahead: int = 4
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Yield ids and targets, both (B, T) with B = ``size``, on ``device`` for each index of a batch of a split. Targets
    are the next tokens, or what the data's method ``targets`` returns.

    A thread makes up to ``ahead`` batches in advance. Its errors are raised by the iterator, at the batch that failed.
    Closing the iterator ends the thread."""
    ready: queue.Queue[tuple[torch.Tensor, ...] | Exception | None] = queue.Queue(maxsize=ahead)  # None after the last
    stop = threading.Event()

    def put_unless_stopped(item: tuple[torch.Tensor, ...] | Exception | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make_batches() -> None:
        try:
            for index in indices:
                tensors = [torch.from_numpy(array) for array in _arrays(data, split, index, size)]
                put_unless_stopped(tuple(each.pin_memory() if device.type == "cuda" else each for each in tensors))
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
            samples, *targets = (tensor.to(device, non_blocking=True) for tensor in item)
            yield samples[:, :-1].contiguous(), targets[0] if targets else samples[:, 1:].contiguous()
    finally:
        stop.set()
        thread.join()


def _arrays(data: Data, split: str, index: int, size: int) -> list[np.ndarray]:
    """The samples of a batch, (B, T+1), and their targets, (B, T), if the data has the method. The targets are a copy,
    as evaluation writes into them."""
    samples = data.batch(split, index, size)
    return [samples, np.array(data.targets(samples), dtype=np.int64)] if hasattr(data, "targets") else [samples]
