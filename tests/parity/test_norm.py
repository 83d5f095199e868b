"""Norms against references that are not ours."""

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama as llama

from components.norm import LayerNorm, RMSNorm
from parity.reference import randomize, relative_error


def test_layernorm_equals_torch_and_the_formula():
    x, ours, torchs = torch.randn(5, 32).double() * 3 + 2, LayerNorm(32).double(), nn.LayerNorm(32).double()
    randomize(ours)
    torchs.load_state_dict(ours.state_dict())
    mean = x.mean(-1, keepdim=True)
    formula = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight + ours.bias
    assert relative_error(ours(x), torchs(x)) < 1e-14 and relative_error(ours(x), formula) < 1e-14


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_equals_llama_torch_and_the_formula(eps):
    x, ours = torch.randn(5, 32).double() * 3 + 2, randomize(RMSNorm(32, eps=eps).double())
    torchs, llamas = nn.RMSNorm(32, eps=eps).double(), llama.LlamaRMSNorm(32, eps=eps)
    for reference in (torchs, llamas):
        reference.load_state_dict(ours.state_dict())
    formula = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * ours.weight
    assert relative_error(ours(x), torchs(x)) < 1e-14 and relative_error(ours(x), formula) < 1e-14
    assert relative_error(ours.float()(x.float()), llamas(x.float())) < 1e-6
    plain = RMSNorm(32, eps=eps, gain=False)
    assert not list(plain.parameters()) and relative_error(plain(x), formula / ours.weight.double()) < 1e-6
