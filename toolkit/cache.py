"""The decoding cache of a mixer: tensors (B,S,...) with an entry for each position of the text, filled by generation.

Shapes: B batch, S positions in the cache, T new positions, G key/value heads, D head dim."""

import torch
from torch import Tensor, nn

from toolkit.context import Context


def empty_cache(linear: nn.Linear, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Zeros of these shapes, in the dtype of the outputs of ``linear`` (bfloat16 under autocast) and on its device.

    A cache (B,S,G,D) is stored in memory as (B,G,S,D): the positions of one head are next to each other, because
    attention reads them together."""
    device = linear.weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else linear.weight.dtype
    zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
    return tuple(t if t.ndim < 4 else t.transpose(1, 2).contiguous().transpose(1, 2) for t in zeros)


def update_cache(context: Context, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
    """Write tensors (B,T,...) into the cache of a layer, from position ``context.start`` on, and return the cache
    (B,S,...) in their dtypes.

    If ``context.end`` is known, only the positions before it are returned. Without a cache, ``new`` is returned."""
    if context.cache is None:
        return new
    length, end = new[0].shape[1], context.end
    if end is None:
        assert context.start is not None, "a cache needs a start"
        slots = context.start + torch.arange(length, device=new[0].device)  # (T,)
        for cached, values in zip(context.cache[layer], new, strict=True):
            cached.index_copy_(1, slots, values.to(cached.dtype))
    else:
        for cached, values in zip(context.cache[layer], new, strict=True):
            cached[:, end - length : end] = values
    return tuple(cached[:, :end].to(values.dtype) for cached, values in zip(context.cache[layer], new, strict=True))
