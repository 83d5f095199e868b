"""Losses against references that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from torch import nn

from components.loss import ChunkedCrossEntropy, CrossEntropy
from toolkit.model import Head

KNOBS = [dict(), dict(z_loss=0.1), dict(label_smoothing=0.2), dict(z_loss=0.1, label_smoothing=0.2)]


def reference(hidden, weight, targets, softcap, vocab=50, z_loss=0.0, label_smoothing=0.0):
    """Torch's cross-entropy, with its own label smoothing, and the z-loss under autograd, over the true vocabulary."""
    logits = (hidden @ weight.T)[:, :vocab]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_z = torch.logsumexp(logits[targets != -100], dim=-1)
    plain = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return plain + z_loss * (log_z**2).sum()


def by_hand(hidden, weight, targets, softcap, vocab=50, z_loss=0.0, label_smoothing=0.0):
    """One target at a time, in float64: sum over q log(1/p), q the smoothed target, and z_loss * log(sum exp)^2."""
    hidden, weight, total = hidden.double(), weight.double(), 0.0
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target == -100:
            continue
        logits = weight[:vocab] @ row
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_z = logits.exp().sum().log()
        q = torch.full((vocab,), label_smoothing / vocab, dtype=torch.float64)
        q[target] += 1 - label_smoothing
        total = total + (q * (log_z - logits)).sum() + z_loss * log_z**2
    return total


def loss_inputs(dtype=torch.float32):
    hidden, weight, targets = torch.randn(37, 16), torch.randn(64, 16), torch.randint(50, (37,))
    targets[[0, 5, 6, 7, 30]] = -100
    return hidden.to(dtype).requires_grad_(), weight.requires_grad_(), targets


def gradients(value, *inputs):
    return torch.autograd.grad(3.0 * value, inputs)  # a factor: the chain rule goes on


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_equals_the_formula_in_value_and_gradients(softcap, knobs, parity):
    hidden, weight, targets = loss_inputs()
    expected = by_hand(hidden, weight, targets, softcap, **knobs)
    objective, nats, count = CrossEntropy(**knobs)(hidden, Head(weight, 50, softcap), targets)
    name = "the formula in float64, z-loss and smoothing too"
    parity("CrossEntropy", name, objective, expected)
    parity("CrossEntropy", "the plain nats in float64", nats, by_hand(hidden, weight, targets, softcap))
    ours, theirs = gradients(objective, hidden, weight), gradients(expected, hidden, weight)
    parity("CrossEntropy", f"{name}: gradients", ours, theirs, 1e-5)
    assert count == 32


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_cross_entropy_equals_torch_in_value_and_gradients(softcap, rows, knobs, parity):
    hidden, weight, targets = loss_inputs()
    expected, plain = (reference(hidden, weight, targets, softcap, **k) for k in (knobs, {}))
    loss, head = ChunkedCrossEntropy(rows=rows, **knobs), Head(weight, 50, softcap)
    objective, nats, count = loss(hidden, head, targets)
    name = "F.cross_entropy, its label_smoothing, z-loss by autograd"
    parity("ChunkedCrossEntropy", name, (objective, nats), (expected, plain))
    assert count == 32 and not nats.requires_grad and (knobs or torch.equal(objective, nats))
    ours, theirs = gradients(objective, hidden, weight), gradients(expected, hidden, weight)
    parity("ChunkedCrossEntropy", f"{name}: gradients", ours, theirs, 1e-5)
    with torch.no_grad():
        parity("ChunkedCrossEntropy", f"{name}: no_grad", loss(hidden, head, targets)[:2], (expected, plain))


def test_padding_of_the_table_takes_no_share_of_the_smoothing():
    hidden, weight, targets = loss_inputs()
    raised = torch.cat((weight[:50], weight[50:] + 100)).detach().requires_grad_()
    for cls in (CrossEntropy, ChunkedCrossEntropy):
        loss = cls(z_loss=0.1, label_smoothing=0.2)
        one, other = (loss(hidden, Head(table, 50, None), targets)[0] for table in (weight, raised))
        assert torch.equal(one, other) and not torch.autograd.grad(other, raised)[0][50:].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_chunked_cross_entropy_differentiates_what_asks_for_it(frozen, parity):
    hidden, weight, targets = loss_inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    wanted = weight if frozen == "hidden" else hidden
    ours = torch.autograd.grad(ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0], wanted)
    theirs = torch.autograd.grad(reference(hidden, weight, targets, None), wanted)
    parity("ChunkedCrossEntropy", "F.cross_entropy, one input frozen: gradients", ours, theirs, 1e-5)


@pytest.mark.parametrize("cls", [CrossEntropy, ChunkedCrossEntropy])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_large_logits_neither_overflow_nor_lose_the_value(cls, knobs, parity):
    hidden, weight, targets = loss_inputs()
    value = cls(**knobs)(hidden * 1e3, Head(weight, 50, None), targets)[0]
    theirs = reference(hidden * 1e3, weight, targets, None, **knobs)
    parity(cls.__name__, "torch at logits of some thousands", value, theirs)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_chunked_cross_entropy_under_autocast_stays_near_float32(knobs, parity):
    hidden, weight, targets = loss_inputs()
    expected, loss = reference(hidden, weight, targets, None, **knobs), ChunkedCrossEntropy(rows=8, **knobs)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(hidden, Head(weight, 50, None), targets)[0]
    assert value.dtype == torch.float32
    parity("ChunkedCrossEntropy", "torch in float32, ours under bfloat16 autocast", value, expected, 0.01)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (value, expected)), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        evaluated = loss(hidden, Head(weight, 50, None), targets)[0]
    torch.testing.assert_close(evaluated, value)


class Loss(nn.Module):
    """Model and loss, as the toolkit compiles them."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids, targets):
        hidden, head = self.model(ids)
        return self.loss(hidden.flatten(0, 1), head, targets.flatten())[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on any Function
@pytest.mark.parametrize("softcap, knobs", [(None, KNOBS[0]), (3.0, KNOBS[3])], ids=str)
@pytest.mark.parametrize("cls", [CrossEntropy, ChunkedCrossEntropy])
def test_losses_compile_with_the_model_into_one_graph_and_equal_torch(cls, softcap, knobs, parity):
    model, ids, targets = tiny_gpt(n_layer=1, logit_softcap=softcap), *torch.randint(50, (2, 2, 13))
    targets[0, :5] = -100
    hidden, head = model(ids)
    expected = reference(hidden.flatten(0, 1), head.weight, targets.flatten(), softcap, **knobs)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    compiled = Loss(model, cls(**knobs) if cls is CrossEntropy else cls(rows=8, **knobs))
    torch.compiler.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    value = compiled(ids, targets)
    parity(cls.__name__, "torch in eager, ours compiled in one graph", value, expected)
    ours = torch.autograd.grad(value, list(model.parameters()))
    parity(cls.__name__, "torch in eager, ours compiled in one graph: gradients", ours, theirs, 1e-4)
    with torch.no_grad():
        parity(cls.__name__, "torch in eager, ours compiled in one graph", compiled(ids, targets), expected)


@pytest.mark.parametrize("rows", [8, 37])
def test_chunked_cross_entropy_repeats_to_the_last_bit_and_backward_goes_once(rows):
    hidden, weight, targets = loss_inputs()
    loss, head = ChunkedCrossEntropy(rows=rows), Head(weight, 50, None)
    value = loss(hidden, head, targets)[0]
    first = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss(hidden, head, targets)[0], (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # never a wrong gradient
        torch.autograd.grad(2 * value, (hidden, weight))


def test_the_one_call_that_a_compiler_sees_is_the_eager_loss(parity):
    hidden, weight, targets = loss_inputs()
    fixed = (targets, 50, 3.0, 8, 0.1, 0.2)
    ours = torch.ops.toolkit.linear_cross_entropy(hidden.detach(), weight.detach(), *fixed)
    objective, nats, _ = ChunkedCrossEntropy(8, 0.1, 0.2)(hidden, Head(weight, 50, 3.0), targets)
    theirs = (objective, nats, *torch.autograd.grad(objective, (hidden, weight)))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    torch.library.opcheck(torch.ops.toolkit.linear_cross_entropy, (hidden.detach(), weight.detach(), *fixed))
