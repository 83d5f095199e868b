"""Seeds from names. Each random draw has its own seed, so a changed part does not change the draws of other parts."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


def named_seed(*names: object) -> int:
    """A 32-bit seed from the SHA-256 of the names. Unlike hash(), it is the same in every process."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextlib.contextmanager
def seeded(*names: object) -> Iterator[None]:
    """Seed torch's CPU generator with ``named_seed(*names)``, and restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(named_seed(*names))  # torch.manual_seed would also reseed CUDA for good
        yield


Fill = Callable[[str, torch.Tensor, torch.Generator], None]  # fills a parameter, given its name


def initialize(model: nn.Module, init: Fill, seed: int) -> None:
    """Fill each weight and bias of Linear and Embedding layers with ``init``.

    Each parameter gets its own generator, seeded by (seed, name). A module with a method ``draw`` fills its own
    parameters instead; all other parameters keep the values from their constructor. The attributes ``residual``,
    ``merged`` and ``tied`` of a layer are copied to its parameters first, so that the init can read them."""
    for path, module in model.named_modules():
        draw: Fill | None = getattr(module, "draw", init if isinstance(module, nn.Linear | nn.Embedding) else None)
        if draw is None:
            continue
        for suffix, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{suffix}" if path else suffix
            parameter.residual = getattr(module, "residual", False)
            parameter.merged = getattr(module, "merged", None)
            parameter.tied = getattr(module, "tied", False)
            with torch.no_grad():
                draw(name, parameter, torch.Generator().manual_seed(named_seed(seed, name)))
