"""Matrices that lie in one layer: each yields what it would alone."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.linear import Merged

ROWS = {"q": 6, "k": 2, "v": 4}


@pytest.mark.parametrize("bias", [False, True])
def test_each_matrix_yields_what_it_would_alone(bias):
    torch.manual_seed(0)
    layer, x = Merged(5, ROWS, bias).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    found, first = dict(zip(layer.merged, layer.each(x), strict=True)), 0
    for name, rows in ROWS.items():
        own = slice(first, first + rows)
        wanted = F.linear(x, layer.weight[own], layer.bias[own] if bias else None)
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-12)
        first += rows
