"""Linear layers with the fastest matrix product that the CPU offers."""

from torch import Tensor, nn

from toolkit.cpu import products


class Linear(nn.Linear):
    """nn.Linear with a faster matrix product on some CPUs (toolkit.cpu.products): (..., I) -> (..., O)."""

    residual: bool = False  # True for a projection back into the residual stream: most inits draw smaller weights

    def forward(self, x: Tensor) -> Tensor:
        out = products.linear(x, self.weight, self.bias)
        return out.contiguous()  # attention kernels need the channels of a head next to each other in memory


class Merged(Linear):
    """Several matrices with the same input. One weight holds them, one below the other.

    ``dim`` is the number of inputs, and ``rows`` maps each matrix's name to its number of outputs. Inits and optimizers
    read the attribute ``merged`` (equal to ``rows``) and treat each matrix separately."""

    def __init__(self, dim: int, rows: dict[str, int], bias: bool = False):
        super().__init__(dim, sum(rows.values()), bias=bias)
        self.merged = rows

    def each(self, x: Tensor) -> tuple[Tensor, ...]:
        """Multiply x (..., dim) with each matrix: a view (..., outputs) for each, in the order of ``merged``."""
        return self(x).split(list(self.merged.values()), dim=-1)
