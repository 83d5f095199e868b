"""Matrices that lie in one layer: whichever way they are multiplied, the results are those of the layer as a whole."""

import pytest
import torch

from toolkit.merged import Merged

ROWS = {"q": 6, "k": 2, "v": 4}


@pytest.mark.parametrize("bias", [False, True])
def test_one_after_the_other_is_all_at_once(bias):
    """Values, and gradients of input, weight and bias, against one product in float64."""
    torch.manual_seed(0)
    layer = Merged(5, ROWS, bias).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    taken = layer.each(x)
    assert [part.shape for part in taken] == [(2, 3, rows) for rows in ROWS.values()]
    assert all(part.is_contiguous() for part in taken)  # no views of one product: it did go one by one
    direction = torch.randn(2, 3, 12, dtype=torch.float64)
    wanted = (layer(x), *torch.autograd.grad((layer(x) * direction).sum(), [x, *layer.parameters()]))
    value = sum((part * d).sum() for part, d in zip(taken, direction.split(list(ROWS.values()), -1), strict=True))
    found = (torch.cat(taken, dim=-1), *torch.autograd.grad(value, [x, *layer.parameters()]))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_without_gradients_and_in_a_compiler_it_is_one_product():
    layer, x = Merged(5, ROWS), torch.randn(2, 3, 5)
    with torch.no_grad():
        parts = layer.each(x)
    assert [part.data_ptr() for part in parts] == [parts[0].data_ptr() + 4 * at for at in (0, 6, 8)]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: layer.each(x), backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer.each(x))
    (graph,) = graphs
    assert sum("linear" in str(node.target) for node in graph.graph.nodes) == 1
