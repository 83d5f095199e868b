"""Several matrices over the same input, kept as one: a layer that says whose rows are whose."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Merged(nn.Linear):
    """``rows`` {name: outputs} of matrices over ``dim`` inputs, one below the other. Inits and optimizers read them off
    ``merged`` and treat each as the matrix that it is."""

    def __init__(self, dim: int, rows: dict[str, int], bias: bool = False):
        super().__init__(dim, sum(rows.values()), bias=bias)
        self.merged = rows

    def each(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each matrix makes of x: (..., dim) -> (..., outputs), in the order of ``merged``.

        One product for all, and views of it. Training on a CPU without a compiler takes one for each: narrow results
        are sooner written, and no copy has to join their gradients."""
        rows = list(self.merged.values())
        if self.at_once(x.device.type, torch.compiler.is_compiling()) or not torch.is_grad_enabled():
            return self(x).split(rows, dim=-1)
        biases = [None] * len(rows) if self.bias is None else self.bias.split(rows)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(self.weight.split(rows), biases, strict=True))

    @staticmethod
    def at_once(device: str, compiled: bool) -> bool:
        """Whether training on this type of device takes one product for all."""
        return device != "cpu" or compiled
