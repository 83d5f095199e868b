"""The logits of one chunk of positions after another, in the same memory. On a CPU they are computed in tiles.

Shapes: N positions, R positions of a chunk, C model dim, V rows of the table, which include its padding."""

import torch
from torch import Tensor

from toolkit.cpu import products, switch

COLUMNS = 512  # MKL is fastest if the result of a product has this many columns
GAP = 64  # additional columns of the buffer, so that its rows do not begin a power of two apart, which is slow


def buffer(hidden: Tensor, table: Tensor, rows: int) -> Tensor | None:
    """Memory for the logits of a chunk, (R, V) or wider, for hidden (N,C) and table (V,C). None if the library that
    multiplies allocates its result itself."""
    if products.fits(hidden[:rows], table):
        return None
    return hidden.new_empty(min(rows, len(hidden)), len(table) + (GAP if _tiled(hidden) else 0))


def logits(hidden: Tensor, table: Tensor, buffer: Tensor | None) -> Tensor:
    """hidden (R,C) times table^T (C,V), in the memory of ``buffer``: (R, V), and further columns if the buffer has
    them."""
    if buffer is None:
        return products.product(hidden, table)
    out, columns = buffer[: len(hidden)], COLUMNS if _tiled(hidden) else len(table)
    for table_tile, tile in zip(table.T.split(columns, 1), out[:, : len(table)].split(columns, 1), strict=True):
        torch.mm(hidden, table_tile, out=tile)
    return out


def _tiled(hidden: Tensor) -> bool:
    """Whether MKL multiplies."""
    return switch.FAST and hidden.device.type == "cpu" and not torch.compiler.is_compiling()
