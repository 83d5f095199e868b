"""Computes the logits of all chunks of positions in the same memory, one chunk after another; on a CPU in tiles.

Shapes: N positions, R positions of a chunk, C model dim, V rows of the table, including its padding."""

import torch
from torch import Tensor

from toolkit.cpu import products, switch

COLUMNS = 512  # MKL is fastest if the result of a product has this many columns
GAP = 64  # additional columns of the buffer: it is slow if the distance between its rows is a power of two


def buffer(hidden: Tensor, table: Tensor, rows: int) -> Tensor | None:
    """Memory for the logits of a chunk, (R, V) or wider, for hidden (N,C) and table (V,C). None if oneDNN multiplies,
    which allocates its result itself."""
    if products.fits(hidden[:rows], table):
        return None
    return hidden.new_empty(min(rows, len(hidden)), len(table) + (GAP if _tiled(hidden) else 0))


def logits(hidden: Tensor, table: Tensor, buffer: Tensor | None) -> Tensor:
    """hidden (R,C) times table^T (C,V), written into ``buffer``: (R, V). If the buffer is wider, so is the result."""
    if buffer is None:
        return products.product(hidden, table)
    out, columns = buffer[: len(hidden)], COLUMNS if _tiled(hidden) else len(table)
    for table_tile, tile in zip(table.T.split(columns, 1), out[:, : len(table)].split(columns, 1), strict=True):
        torch.mm(hidden, table_tile, out=tile)
    return out


def _tiled(hidden: Tensor) -> bool:
    """Whether to compute the product in tiles: on a CPU, without torch.compile."""
    return switch.FAST and hidden.device.type == "cpu" and not torch.compiler.is_compiling()
