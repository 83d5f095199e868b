"""Norms against references that are not ours."""

import math

import pytest
import torch
from conftest import parts, tiny_gpt
from torch import nn
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.llama import modeling_llama as llama

from components.norm import DynamicTanh, LayerNorm, NoNorm, RMSNorm, ScaleNorm
from parity.reference import randomize


def rows():
    return torch.randn(5, 32).double() * 3 + 2


def test_layernorm_equals_torch_and_the_formula(parity):
    x, ours, torchs = rows(), LayerNorm(32).double(), nn.LayerNorm(32).double()
    randomize(ours)
    torchs.load_state_dict(ours.state_dict())
    mean = x.mean(-1, keepdim=True)
    formula = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight
    parity("LayerNorm", "torch.nn.LayerNorm, float64", ours(x), torchs(x), 1e-14)
    parity("LayerNorm", "formula, float64", ours(x), formula + ours.bias, 1e-14)
    without = LayerNorm(32, bias=False).double()
    without.weight = ours.weight
    assert [name for name, _ in without.named_parameters()] == ["weight"]
    parity("LayerNorm", "formula, float64", without(x), formula, 1e-14)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_equals_llama_torch_and_the_formula(eps, parity):
    x, ours = rows(), randomize(RMSNorm(32, eps=eps).double())
    torchs, llamas = nn.RMSNorm(32, eps=eps).double(), llama.LlamaRMSNorm(32, eps=eps)
    for reference in (torchs, llamas):
        reference.load_state_dict(ours.state_dict())
    formula = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * ours.weight
    parity("RMSNorm", "torch.nn.RMSNorm, float64", ours(x), torchs(x), 1e-14)
    parity("RMSNorm", "formula, float64", ours(x), formula, 1e-14)
    parity("RMSNorm", "transformers LlamaRMSNorm", ours.float()(x.float()), llamas(x.float()))
    gemmas, minus_one = gemma2.Gemma2RMSNorm(32, eps=eps), RMSNorm(32, eps=eps, gain_minus_one=True)
    assert minus_one.weight.tolist() == [0.0] * 32
    gemmas.load_state_dict(randomize(minus_one).state_dict())
    parity("RMSNorm", "transformers Gemma2RMSNorm", minus_one(x.float()), gemmas(x.float()))
    plain = RMSNorm(32, eps=eps, gain=False)
    assert not list(plain.parameters())
    parity("RMSNorm", "formula, float64", plain.double()(x), formula / ours.weight.double(), 1e-6)


def test_scalenorm_equals_torch_and_the_formula(parity):
    x, ours = rows(), ScaleNorm(32)
    parity("ScaleNorm", "torch.nn.RMSNorm, while g is sqrt(C)", ours(x.float()), nn.RMSNorm(32, eps=0.0)(x.float()))
    randomize(ours)
    g = ours.weight.item()
    formula = [[g * float(value) / math.sqrt(sum(float(v) ** 2 for v in row)) for value in row] for row in x]
    parity("ScaleNorm", "formula in loops, float64", ours(x.float()), torch.tensor(formula, dtype=torch.float64))


def test_dynamic_tanh_equals_the_formula(parity):
    x, ours = rows(), DynamicTanh(32, alpha=0.7)
    assert ours.alpha.tolist() == [pytest.approx(0.7)]
    randomize(ours)
    alpha = ours.alpha.item()
    gains, biases = ours.weight.tolist(), ours.bias.tolist()
    formula = [[w * math.tanh(alpha * float(v)) + b for v, w, b in zip(r, gains, biases, strict=True)] for r in x]
    parity("DynamicTanh", "formula in loops, float64", ours(x.float()), torch.tensor(formula, dtype=torch.float64))


def test_no_norm_is_the_identity(parity):
    x = rows()
    parity("NoNorm", "torch.nn.Identity", NoNorm(32)(x), nn.Identity()(x), 1e-30)


def test_norms_start_where_their_papers_do(parity):
    x = rows().float()
    parity("DynamicTanh", "torch.tanh of half of x, at the start", DynamicTanh(32)(x), torch.tanh(x / 2))
    assert ScaleNorm(32).weight.shape == (1,) and ScaleNorm(32).weight.item() == pytest.approx(32**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", parts("norm"))
def test_zero_vectors_have_finite_values_and_gradients(part, dtype):
    x, norm = torch.zeros(3, 32, dtype=dtype, requires_grad=True), part.cls(32).to(dtype)
    out = norm(x)
    out.square().sum().add(out.sum()).backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in norm.parameters())


@pytest.mark.parametrize("part", parts("norm"))
def test_a_list_of_norms_mixes_them_over_the_depth(part):
    model = tiny_gpt(norm=[LayerNorm, part.cls])
    assert type(model.blocks[0].ffn_norm) is LayerNorm and type(model.norm) is part.cls
    assert model(torch.randint(50, (2, 9)))[0].isfinite().all()
