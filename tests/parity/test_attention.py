"""Attention kernels against references that are not ours."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import parts

from components.attention import (
    FlashAttention,
    FlexAttention,
    LinearAttention,
    SigmoidAttention,
    SlidingWindow,
    SoftcapAttention,
)
from parity.reference import attention_loop
from toolkit.context import Mask
from toolkit.cpu import blockwise

PLAIN = ("MathAttention", "SDPA", "FlashAttention", "FlexAttention", "SlidingWindow")  # the last: its window is longer
SOFTMAX = [p for p in parts("attention") if p.values[0].name in PLAIN]
FLEX = "torch flex_attention on a CPU"
CASES = ["plain", "bias", "documents", "offset", "all"]
KERNELS = {
    "window": (SlidingWindow(4, 8, window=3), dict(window=3)),
    "window of 1": (SlidingWindow(4, 8, window=1), dict(window=1)),
    "softcap": (SoftcapAttention(4, 8, softcap=2.0), dict(softcap=2.0)),
    "flex": (FlexAttention(4, 8, window=3, softcap=2.0), dict(window=3, softcap=2.0)),
    "flex window": (FlexAttention(4, 8, window=3), dict(window=3)),
    "sigmoid": (SigmoidAttention(4, 8), dict(weigh=lambda scores: sigmoid(scores, -math.log(len(scores))))),
    "sigmoid -2": (SigmoidAttention(4, 8, bias=-2.0), dict(weigh=lambda scores: sigmoid(scores, -2.0))),
}


def sigmoid(scores, bias):
    return [1 / (1 + math.exp(-score - bias)) for score in scores]


def masked(case, n_kv_head=4):
    """q, k, v (values of another width), the mask, and what the loop needs to know of it."""
    start = 4 if case in ("offset", "all") else 0
    queries = 9 - start - (1 if start else 0)  # an offset leaves a key beyond the last query: it is not to be seen
    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, 9, n_kv_head, 8), torch.randn(2, 9, n_kv_head, 12)
    documents = torch.tensor([[0] * 3 + [1] * 6, [0] * 5 + [1, 2, 2, 2]]) if case in ("documents", "all") else None
    bias = torch.randn(4, queries, 9) if case in ("bias", "all") else None
    mask = None if case == "plain" else Mask(torch.tensor(start), queries, 9, documents, bias)
    return (q, k, v), mask, dict(start=start, documents=documents, bias=bias)


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("part", SOFTMAX)
def test_softmax_attention_equals_the_loop_and_torch(part, n_kv_head, width, parity):
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, n_kv_head, 8), torch.randn(2, 9, n_kv_head, width)
    out = part.cls(4, 8)(q, k, v)
    parity(part.name, "softmax loop in float64", out, attention_loop(q, k, v))
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    parity(part.name, "torch scaled_dot_product_attention", out, theirs)


@pytest.mark.parametrize("case", CASES[1:])
@pytest.mark.parametrize("part", SOFTMAX)
def test_softmax_attention_under_a_mask_equals_the_loop(part, case, parity):
    if not ({"bias", "documents", "offset"} if case == "all" else {case}) <= part.cls.supports:
        pytest.skip(f"{part.name} does not declare {case}")
    inputs, mask, known = masked(case)
    parity(part.name, "softmax loop in float64", part.cls(4, 8)(*inputs, mask), attention_loop(*inputs, **known))


@pytest.mark.parametrize("part", SOFTMAX)
def test_softmax_attention_gradients_equal_torch(part, parity):
    q, k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in range(3))
    weight, heads_first = torch.randn(2, 9, 4, 8), [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    ours = torch.autograd.grad((part.cls(4, 8)(q, k, v) * weight).sum(), (q, k, v))
    parity(part.name, "torch scaled_dot_product_attention, gradients", ours, expected, 1e-5)


@pytest.mark.parametrize("n_kv_head, width", [(4, 8), (2, 12), (1, 8)])
@pytest.mark.parametrize("length", [2, 64, 150])
def test_blocks_of_queries_equal_torch_in_value_and_gradients(length, n_kv_head, width, parity):
    assert blockwise.fits("cpu", torch.float32, 2, length, 4)
    q, k, v = (torch.randn(2, length, *shape) for shape in ((4, 8), (n_kv_head, 8), (n_kv_head, width)))
    inputs, weight = [x.requires_grad_() for x in (q, k, v)], torch.randn(2, length, 4, width)
    ours = FlashAttention(4, 8)(q, k, v)
    heads_first = (t.double().transpose(1, 2) for t in inputs)
    theirs = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    parity("FlashAttention", "torch scaled_dot_product_attention, in blocks", ours, theirs)
    expected = torch.autograd.grad((theirs * weight).sum(), inputs)
    found = torch.autograd.grad((ours * weight).sum(), inputs)
    assert type(ours.grad_fn).__name__ == "_BlockwiseBackward"
    parity("FlashAttention", "torch scaled_dot_product_attention, in blocks, gradients", found, expected, 2e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("length, heads", [(70, 4), (1, 4), (70, 1)])
def test_blocks_of_queries_compile_into_one_call_each_way(length, heads):
    inputs = [torch.randn(2, length, heads, 8, requires_grad=True) for _ in range(3)]
    torch.compiler.reset()
    compiled = torch.compile(FlashAttention(4, 8), backend="aot_eager", fullgraph=True)
    ours, theirs = (
        torch.autograd.grad(part(*inputs).square().sum(), inputs) for part in (compiled, FlashAttention(4, 8))
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    plain = [x.detach() for x in inputs]
    torch.library.opcheck(torch.ops.toolkit.blockwise, plain)
    _, *kept = torch.ops.toolkit.blockwise(*plain)
    torch.library.opcheck(torch.ops.toolkit.blockwise_backward, (torch.randn(2, length, heads, 8), *kept))


def test_flash_attention_says_what_trains():
    kernel, wide = FlashAttention(4, 8), torch.randn(2, 8, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert kernel.implementation("cpu", torch.float32, 8, 256) == "products over blocks of 64 queries"
    for elsewhere in (("cpu", torch.float32, 8, 2048), ("cpu", torch.bfloat16, 8, 256)):
        assert kernel.implementation(*elsewhere) == "PyTorch fused SDPA"
    assert type(kernel(wide, wide, wide).grad_fn).__name__ != "_BlockwiseBackward"
    with torch.autocast("cpu", torch.bfloat16):  # whatever a mixer hands over
        assert kernel(wide.float(), wide.float(), wide.float()).dtype == torch.bfloat16
    with torch.no_grad():  # a single forward pass is as fast with PyTorch's kernel
        narrow = wide.float()
        expected = F.scaled_dot_product_attention(*[narrow.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
        assert torch.equal(kernel(narrow, narrow, narrow), expected)


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", KERNELS)
def test_other_weights_equal_the_loop(which, case, n_kv_head, parity):
    (kernel, formula), (inputs, mask, known) = KERNELS[which], masked(case, n_kv_head)
    name, reference = type(kernel).__name__, "loop in float64: window, soft-cap or sigmoid"
    parity(name, reference, kernel(*inputs, mask), attention_loop(*inputs, **known, **formula))


@pytest.mark.parametrize("window, softcap", [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_window_and_softcap_equal_transformers(window, softcap, parity):
    """Gemma 2 has both; what its window lets through is the library's as well. Values and gradients."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, eager_attention_forward

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    module = Gemma2Attention(Gemma2Config(**sizes), 0).eval()
    sees = sliding_window_causal_mask_function(window) if window else causal_mask_function
    at = torch.arange(13)
    mask = torch.where(sees(0, 0, at[:, None], at[None]), 0.0, -torch.inf)
    q, k, v = (3 * torch.randn(2, 13, heads, 8) for heads in (4, 2, 2))
    inputs, weight = [t.requires_grad_() for t in (q, k, v)], torch.randn(2, 13, 4, 8)
    heads_first = [t.transpose(1, 2) for t in inputs]
    theirs = eager_attention_forward(module, *heads_first, mask, scaling=8**-0.5, softcap=softcap)[0]
    expected = torch.autograd.grad((theirs * weight).sum(), inputs)
    kernels = [FlexAttention(4, 8, window=window, softcap=softcap)]
    kernels += [SlidingWindow(4, 8, window=window)] if window and not softcap else []
    kernels += [SoftcapAttention(4, 8, softcap=softcap)] if softcap and not window else []
    for kernel in kernels:
        ours, name = kernel(*inputs), type(kernel).__name__
        parity(name, "transformers Gemma 2 eager attention", ours, theirs)
        gradients = torch.autograd.grad((ours * weight).sum(), inputs)
        parity(name, "transformers Gemma 2 eager attention, gradients", gradients, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window, softcap", [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_flex_attention_itself_equals_what_stands_in_for_it_and_the_loop(window, softcap, case, n_kv_head, parity):
    kernel, (inputs, mask, known) = FlexAttention(4, 8, window=window, softcap=softcap), masked(case, n_kv_head)
    real, formula = kernel.flex(*inputs, mask), dict(window=window, softcap=softcap)
    parity("FlexAttention", FLEX, kernel(*inputs, mask), real)
    parity(
        "FlexAttention",
        "loop in float64, against flex_attention itself",
        real,
        attention_loop(*inputs, **known, **formula),
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on any Function
@pytest.mark.parametrize("case", ["plain", "all"])
def test_flex_attention_itself_compiles_into_one_graph_with_its_mask(case, parity):
    """As a compiled model on CUDA traces it: over more than one block of its mask, gradients off."""
    torch.compiler.reset()
    kernel = FlexAttention(2, 16, window=70, softcap=2.0)
    q, k, v = torch.randn(3, 2, 150, 2, 16)
    documents = torch.tensor([[0] * 40 + [1] * 110, [0] * 139 + [1] * 11])
    mask = None if case == "plain" else Mask(torch.tensor(0), 150, 150, documents, torch.randn(2, 150, 150))
    with torch.no_grad():
        compiled = torch.compile(kernel.flex, backend="aot_eager", fullgraph=True)(q, k, v, mask)
        parity("FlexAttention", f"{FLEX}, compiled", kernel(q, k, v, mask), compiled)
        low = kernel.flex(q, k, v.bfloat16(), mask)
    assert low.dtype == torch.bfloat16


def recurrence(q, k, v, eps, start=0, documents=None):
    """phi(k) v^T and phi(k) summed up from token to token, and begun afresh with each document, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    out, share = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(start + q.shape[1]):
                if t == 0 or (documents is not None and documents[b, t] != documents[b, t - 1]):
                    memory, total = torch.zeros(q.shape[3], v.shape[3]).double(), torch.zeros(q.shape[3]).double()
                phi = F.elu(k[b, t, h // share]) + 1
                memory, total = memory + torch.outer(phi, v[b, t, h // share]), total + phi
                if t >= start:
                    phi = F.elu(q[b, t - start, h]) + 1
                    out[b, t - start, h] = phi @ memory / (phi @ total + eps)
    return out


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("case", ["plain", "documents", "offset"])
def test_linear_attention_equals_the_published_recurrence(case, n_kv_head, eps, parity):
    inputs, mask, known = masked(case, n_kv_head)
    expected = recurrence(*inputs, eps, known["start"], known["documents"])
    out = LinearAttention(4, 8, eps=eps)(*inputs, mask)
    parity("LinearAttention", "recurrence in float64, eq. 16 to 20 of the paper", out, expected)


@pytest.mark.parametrize("bias", [None, -2.0])
def test_sigmoid_attention_does_not_depend_on_what_comes_later(bias):
    kernel, (q, k, v) = SigmoidAttention(4, 8, bias=bias), torch.randn(3, 2, 13, 4, 8)
    assert torch.allclose(kernel(q, k, v)[:, :5], kernel(q[:, :5], k[:, :5], v[:, :5]), atol=1e-6)


def test_values_of_another_width_do_not_reach_the_flash_package(monkeypatch, parity):
    kernel, (inputs, _, _) = FlashAttention(4, 8), masked("plain")
    monkeypatch.setattr("components.attention._in_half", lambda device, dtype: True)
    monkeypatch.setattr(kernel, "package", lambda *arguments, **keywords: pytest.fail("the package was called"))
    parity("FlashAttention", "softmax loop in float64", kernel(*inputs), attention_loop(*inputs))
