"""Linear layers whose products take the fastest way there is."""

from torch import Tensor, nn

from toolkit.cpu import products


class Linear(nn.Linear):
    """torch's own, but for how some CPUs multiply (toolkit.cpu.products)."""

    def forward(self, x: Tensor) -> Tensor:
        out = products.linear(x, self.weight, self.bias)
        return out.contiguous()  # attention kernels want a head's channels side by side


class Merged(Linear):
    """Several matrices over the same input, kept as one: ``rows`` {name: outputs} of matrices over ``dim`` inputs, one
    below the other. Inits and optimizers read them off ``merged`` and treat each as the matrix that it is."""

    def __init__(self, dim: int, rows: dict[str, int], bias: bool = False):
        super().__init__(dim, sum(rows.values()), bias=bias)
        self.merged = rows

    def each(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each matrix makes of x: (..., dim) -> (..., outputs), in the order of ``merged``, views of one."""
        return self(x).split(list(self.merged.values()), dim=-1)
