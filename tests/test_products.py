"""Products by oneDNN against PyTorch's own, on any CPU: there they are forced, here they are chosen where they win."""

import pytest
import torch
import torch.nn.functional as F
from runs import facts, rows, small_run
from torch.profiler import ProfilerActivity, profile

from components.loss import ChunkedCrossEntropy
from toolkit.cpu import products
from toolkit.linear import Linear
from toolkit.model import Head

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN")


@pytest.fixture
def forced(monkeypatch):
    """Products of any size take oneDNN, whatever the processor."""
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "SMALLEST", 1)


def onednn_calls(work) -> int:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:  # torch 2.11 warns without
        work()
    return sum(event.count for event in profiled.key_averages() if event.key == "mkldnn::_linear_pointwise")


def inputs(*shape, outputs=24):
    x, weight = torch.randn(*shape), torch.randn(outputs, shape[-1], requires_grad=True)
    return x.requires_grad_(), weight, torch.randn(outputs, requires_grad=True)


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: F.pad(x, (0, 3))[..., :-3],
    "repeated": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 16), (1, 16)], ids=str)
def test_linear_equals_torch_in_float64_in_value_and_gradients(shape, layout, biased, forced, parity):
    x, weight, bias = inputs(*shape)
    given = (x, weight, bias) if biased else (x, weight)
    lain = LAYOUTS[layout]
    ours = products.linear(lain(x), *given[1:])
    theirs = F.linear(lain(x.double()), *(t.double() for t in given[1:]))
    grad = LAYOUTS[layout](torch.randn_like(ours))
    parity("products.linear", "F.linear in float64", ours, theirs)
    ours, theirs = torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, given, grad.double())
    parity("products.linear", "F.linear in float64: gradients", ours, theirs)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
def test_few_rows_are_columns_times_weight_and_equal_torch(rows, monkeypatch, parity):
    monkeypatch.setattr(products, "LIGHT", 24 * 16 - 1)
    given = inputs(rows, 1, 16)
    ours, theirs = products.linear(*given), F.linear(*(t.double() for t in given))
    assert (products.linear(*given[:2]).stride(-1) != 1) == (rows <= 8)  # it lies by columns
    parity("products.linear, few rows", "F.linear in float64", ours, theirs)
    ours, theirs = (torch.autograd.grad(y.pow(3).sum(), given) for y in (ours, theirs))
    parity("products.linear, few rows", "F.linear in float64: gradients", ours, theirs)
    layer = Linear(16, 24)
    assert layer(given[0]).is_contiguous() and products.linear(given[0][:0], layer.weight).shape == (0, 1, 24)


def test_linear_differentiates_what_asks_for_it_and_twice(forced, parity):
    x, weight, _ = inputs(7, 16)
    assert onednn_calls(lambda: products.linear(x, weight.detach()).sum().backward()) == 2 and weight.grad is None
    found = []
    for multiply, cast in ((products.linear, torch.Tensor.float), (F.linear, torch.Tensor.double)):
        a, w = (cast(t.detach()).requires_grad_() for t in (x, weight))
        first = torch.autograd.grad(multiply(a, w).pow(3).sum(), (a, w), create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (a, w)))
    parity("products.linear", "F.linear in float64: second derivatives", *found, 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on any Function
def test_a_compiled_layer_is_one_graph_and_equals_torch(forced, parity):
    layer, (x, _, _) = Linear(16, 24), inputs(3, 5, 16)
    wanted = [x, *layer.parameters()]
    theirs = F.linear(x, layer.weight, layer.bias)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    counted = onednn_calls(lambda: torch.autograd.grad(compiled(x).sum(), wanted))
    assert counted == 2
    ours = compiled(x)
    parity("products.linear", "F.linear, ours compiled", ours, theirs)
    ours, theirs = (torch.autograd.grad(y.square().sum(), wanted) for y in (ours, theirs))
    parity("products.linear", "F.linear, ours compiled: gradients", ours, theirs)
    torch.library.opcheck(torch.ops.toolkit.product, (x.detach().flatten(0, 1), layer.weight.detach()))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [None, 16, 10])  # one chunk, all oneDNN's; even ones; a short last one
def test_the_loss_by_onednn_equals_the_plain_loss(chunk, softcap, forced, parity, monkeypatch):
    (hidden, _, _), weight = inputs(32, 16), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(50, (32,))
    targets[[0, 5, 31]] = -100
    loss, head, found = ChunkedCrossEntropy(chunk, z_loss=0.1, label_smoothing=0.2), Head(weight, 50, softcap), []
    for onednn in (True, False):
        monkeypatch.setattr(products, "ONEDNN", onednn)
        value, nats, _ = loss(hidden, head, targets)
        with torch.no_grad():
            evaluated = loss(hidden, head, targets)[0]
        found.append((value, nats, evaluated, *torch.autograd.grad(value, (hidden, weight))))
    parity("ChunkedCrossEntropy", "itself, multiplied by oneDNN and by MKL", *found, 1e-5)
    monkeypatch.setattr(products, "ONEDNN", True)
    chunks = 1 if chunk is None else -(-32 // chunk)
    assert onednn_calls(lambda: loss(hidden, head, targets)) == (3 if chunks == 1 else 2 * chunks)


def test_what_onednn_is_not_for_stays_with_torch(forced, monkeypatch):
    x, weight, _ = inputs(7, 16)
    assert products.fits(x, weight)
    assert not products.fits(x.double(), weight.double()) and not products.fits(x.bfloat16(), weight.bfloat16())
    assert not products.fits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.fits(x, weight) and products.linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(products, "SMALLEST", 7 * 16 * 24 + 1)
    assert not products.fits(x, weight) and onednn_calls(lambda: products.linear(x, weight)) == 0
    monkeypatch.setattr(products, "SMALLEST", 7 * 16 * 24)
    assert products.fits(x, weight) and onednn_calls(lambda: products.linear(x, weight)) == 1


@pytest.mark.parametrize("onednn", [False, True])
def test_facts_name_the_library_that_a_run_multiplies_with(onednn, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", onednn)
    monkeypatch.setattr(products, "SMALLEST", 1000)
    calls = onednn_calls(lambda: small_run(tmp_path, "a"))
    assert (calls > 0) == onednn == facts(tmp_path / "a")["products"].startswith("oneDNN from 1,000 ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, several, where inductor is first used
@pytest.mark.slow
def test_a_compiled_run_multiplies_by_onednn_and_equals_the_eager_one(forced, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 1000)  # training, and evaluation, whose graph is another
    torch.compiler.reset()
    small_run(tmp_path, "eager", bindings=("Experiment.steps = 4",))
    compiled = ("Experiment.steps = 4", "Experiment.compile = True")
    assert onednn_calls(lambda: small_run(tmp_path, "compiled", bindings=compiled)) > 0
    for one, other in zip(*(rows(tmp_path / name) for name in ("eager", "compiled")), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
