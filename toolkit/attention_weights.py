"""The attention weights of any kernel, seen from outside: which keys each query reads, and how much of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from toolkit.context import Mask

TOLERANCE = 0.02  # of the largest output: half precision keeps to it


def weights(kernel: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor | None:
    """(B,H,T,S) float32: the weight of each value in each output of an attention kernel.

    A kernel whose outputs are weighted sums of its values returns its weights if it is given the identity matrix in
    place of the values. The result is checked: the weights times ``v`` must give the kernel's own output. None if they
    do not, so the kernel is no weighted sum. The weights of a softmax are at least 0 and sum to 1
    (``is_distribution``); those of other kernels need not be."""
    keys, width = k.shape[1], v.shape[-1]
    identity = torch.eye(keys, dtype=v.dtype, device=v.device)[None, :, None, :].expand(*v.shape[:3], keys)
    # A kernel may accept only values of the width that it was built for, so it gets the identity in such slices.
    padded = nn.functional.pad(identity, (0, -keys % width))
    slices = [kernel.forward(q, k, part.contiguous(), mask) for part in padded.split(width, dim=-1)]
    weighted = torch.cat(slices, dim=-1)[..., :keys].transpose(1, 2).float()  # (B,T,H,S) -> (B,H,T,S)
    values = v.float().repeat_interleave(q.shape[2] // v.shape[2], dim=2)  # (B,S,H,Dv)
    own = kernel.forward(q, k, v, mask).float()
    difference = (torch.einsum("bhts,bshd->bthd", weighted, values) - own).abs().max()
    return weighted if difference <= TOLERANCE * own.abs().max() else None


def is_distribution(weighted: Tensor) -> bool:
    """Whether weights (..., S) are at least 0 and sum to 1 over the keys, as those of a softmax do."""
    return bool((weighted >= -1e-3).all() and ((weighted.sum(-1) - 1).abs() <= TOLERANCE).all())


def kernels(model: nn.Module) -> dict[str, nn.Module]:
    """{module name: attention kernel} of the kernels of ``model.mixers``."""
    parts = {getattr(mixer, "attention", None) for mixer in getattr(model, "mixers", ())}
    return {name: module for name, module in model.named_modules() if module in parts}


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor | None]]:
    """Record the attention weights of every forward pass within the ``with`` block: {name of the kernel's module:
    weights}. A kernel that runs several times in a pass (differential attention) is there as NAME, NAME#2 and so on;
    a further pass replaces the weights of the one before. The kernels are those of ``model.mixers``. No gradient flows
    through the weights. Memory: B * H * T * S floats for each kernel."""
    weights_of: dict[str, Tensor | None] = {}
    calls: dict[str, int] = {}

    def record(name: str, kernel: nn.Module, inputs: tuple, options: dict) -> None:
        calls[name] = calls.get(name, 0) + 1
        with torch.no_grad():
            weights_of[name if calls[name] == 1 else f"{name}#{calls[name]}"] = weights(kernel, *inputs, **options)

    def start_pass(*_: object) -> None:
        calls.clear()

    handles = [model.register_forward_pre_hook(start_pass)]
    for name, module in kernels(model).items():
        handles.append(
            module.register_forward_pre_hook(
                lambda kernel, inputs, options, name=name: record(name, kernel, inputs, options), with_kwargs=True
            )
        )
    try:
        yield weights_of
    finally:
        for handle in handles:
            handle.remove()
