"""Losses against references that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from torch import nn

from components.loss import ChunkedCrossEntropy
from parity.reference import relative_error
from toolkit.model import Head


def cross_entropy(hidden, weight, targets, softcap, vocab=50):
    logits = (hidden @ weight.T)[:, :vocab]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


def loss_inputs(dtype=torch.float32):
    hidden, weight, targets = torch.randn(37, 16), torch.randn(64, 16), torch.randint(50, (37,))
    targets[[0, 5, 6, 7, 30]] = -100
    return hidden.to(dtype).requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_cross_entropy_equals_torch_in_value_and_gradients(softcap, rows):
    hidden, weight, targets = loss_inputs()
    expected = cross_entropy(hidden, weight, targets, softcap)
    objective, nats, count = ChunkedCrossEntropy(rows=rows)(hidden, Head(weight, 50, softcap), targets)
    assert relative_error(objective, expected) < 1e-6 and torch.equal(objective, nats) and count == 32
    ours = torch.autograd.grad(3.0 * objective, (hidden, weight))  # a factor: the chain rule goes on
    theirs = torch.autograd.grad(3.0 * expected, (hidden, weight))
    assert max(map(relative_error, ours, theirs)) < 1e-5
    with torch.no_grad():
        evaluated = ChunkedCrossEntropy(rows=rows)(hidden, Head(weight, 50, softcap), targets)[0]
    assert relative_error(evaluated, expected) < 1e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_chunked_cross_entropy_differentiates_what_asks_for_it(frozen):
    hidden, weight, targets = loss_inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    wanted = weight if frozen == "hidden" else hidden
    ours = torch.autograd.grad(ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0], wanted)
    assert relative_error(ours[0], torch.autograd.grad(cross_entropy(hidden, weight, targets, None), wanted)[0]) < 1e-5


def test_chunked_cross_entropy_survives_large_logits():
    hidden, weight, targets = loss_inputs()
    value = ChunkedCrossEntropy(rows=8)(hidden * 1e3, Head(weight, 50, None), targets)[0]
    assert relative_error(value, cross_entropy(hidden * 1e3, weight, targets, None)) < 1e-6


def test_chunked_cross_entropy_under_autocast_stays_near_float32():
    hidden, weight, targets = loss_inputs()
    expected = cross_entropy(hidden, weight, targets, None)
    with torch.autocast("cpu", torch.bfloat16):
        value = ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0]
    assert value.dtype == torch.float32 and relative_error(value, expected) < 0.01
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (value, expected)), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        evaluated = ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0]
    assert relative_error(evaluated, value) < 1e-6


class Loss(nn.Module):
    """Model and loss, as the toolkit compiles them; ``chunked`` or F.cross_entropy over all logits."""

    def __init__(self, model, chunked):
        super().__init__()
        self.model, self.chunked = model, ChunkedCrossEntropy(rows=8) if chunked else None

    def forward(self, ids, targets):
        hidden, head = self.model(ids)
        if self.chunked is not None:
            return self.chunked(hidden.flatten(0, 1), head, targets.flatten())[0]
        return F.cross_entropy(head.logits(hidden).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on any Function
def test_chunked_cross_entropy_compiles_with_the_model_into_one_graph_and_equals_torch():
    model, ids, targets = tiny_gpt(n_layer=1), torch.randint(50, (2, 13)), torch.randint(50, (2, 13))
    targets[0, :5] = -100
    expected = Loss(model, chunked=False)(ids, targets)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    compiled = Loss(model, chunked=True)
    torch.compiler.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    value = compiled(ids, targets)
    assert relative_error(value, expected) < 1e-6
    assert max(map(relative_error, torch.autograd.grad(value, list(model.parameters())), gradients)) < 1e-4
    with torch.no_grad():
        assert relative_error(compiled(ids, targets), expected) < 1e-6
