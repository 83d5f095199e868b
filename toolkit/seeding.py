"""Randomness by name: every draw has its own seed, so that swapping one part moves no other part's numbers."""

import contextlib
import hashlib

import torch
from torch import nn


def named_seed(*names: object) -> int:
    """32 bits of SHA-256 of the names: equal in every process, unlike hash()."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextlib.contextmanager
def seeded(*names: object):
    """Inside, torch's CPU generator starts from ``named_seed(*names)``; outside, it is as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(named_seed(*names))  # torch.manual_seed would reseed CUDA for good
        yield


def initialize(model: nn.Module, init, seed: int) -> None:
    """Draw each weight and bias of Linear and Embedding layers through ``init``, each from a generator of its own,
    seeded by (seed, name). A module with ``draw`` fills its own instead; other parameters stay as constructed. What a
    layer says of itself (``residual``, ``merged``, ``tied``) is told to the init as an attribute of the parameter."""
    for path, module in model.named_modules():
        draw = getattr(module, "draw", init if isinstance(module, nn.Linear | nn.Embedding) else None)
        for leaf, parameter in module.named_parameters(recurse=False) if draw else ():
            name = f"{path}.{leaf}" if path else leaf
            parameter.residual = getattr(module, "residual", False)
            parameter.merged = getattr(module, "merged", None)
            parameter.tied = getattr(module, "tied", False)
            with torch.no_grad():
                draw(name, parameter, torch.Generator().manual_seed(named_seed(seed, name)))
