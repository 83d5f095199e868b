"""Attention kernels against references that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from conftest import parts

from parity.reference import attention_loop, relative_error
from toolkit.context import Mask


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("part", parts("attention"))
def test_attention_equals_the_softmax_loop_and_torch(part, n_kv_head):
    if n_kv_head < 4 and "gqa" not in part.cls.supports:
        pytest.skip("no grouped heads")
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, n_kv_head, 8), torch.randn(2, 9, n_kv_head, 8)
    out = part.cls(4, 8)(q, k, v)
    assert relative_error(out, attention_loop(q, k, v)) < 1e-6
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert relative_error(out, theirs) < 1e-6


@pytest.mark.parametrize("what", ["bias", "documents", "offset", "all"])
@pytest.mark.parametrize("part", parts("attention"))
def test_attention_under_a_mask_equals_the_softmax_loop(part, what):
    if not ({"bias", "documents", "offset"} if what == "all" else {what}) <= part.cls.supports:
        pytest.skip(f"{part.name} does not declare {what}")
    start = 4 if what in ("offset", "all") else 0
    queries = 9 - start - (1 if start else 0)  # an offset leaves a key beyond the last query: it is not to be seen
    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, 9, 4, 8), torch.randn(2, 9, 4, 8)
    documents = torch.tensor([[0] * 3 + [1] * 6, [0] * 5 + [1, 2, 2, 2]]) if what in ("documents", "all") else None
    bias = torch.randn(4, queries, 9) if what in ("bias", "all") else None
    out = part.cls(4, 8)(q, k, v, Mask(torch.tensor(start), queries, 9, documents, bias))
    assert relative_error(out, attention_loop(q, k, v, start, documents, bias)) < 1e-6


@pytest.mark.parametrize("part", parts("attention"))
def test_attention_gradients_equal_torch(part):
    q, k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in range(3))
    weight, heads_first = torch.randn(2, 9, 4, 8), [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    ours = torch.autograd.grad((part.cls(4, 8)(q, k, v) * weight).sum(), (q, k, v))
    assert max(map(relative_error, ours, expected)) < 1e-5
