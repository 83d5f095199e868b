"""Feed-forward networks against references that are not ours."""

import pytest
import torch
from transformers.models.llama import modeling_llama as llama

from components.ffn import GELU, SwiGLU
from parity.reference import llama_config, randomize, relative_error
from toolkit.context import Context


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_llama_and_the_formula(bias):
    x, ours = torch.randn(2, 5, 32), randomize(SwiGLU(32, hidden=96, bias=bias))
    theirs = llama.LlamaMLP(llama_config(mlp_bias=bias))
    halves = {"gate_proj": slice(0, 96), "up_proj": slice(96, 192)}
    with torch.no_grad():
        for ours_leaf, theirs_leaf in (("weight", "weight"), ("bias", "bias"))[: 1 + bias]:
            for name, rows in halves.items():
                getattr(getattr(theirs, name), theirs_leaf).copy_(getattr(ours.gate_up, ours_leaf)[rows])
            getattr(theirs.down_proj, theirs_leaf).copy_(getattr(ours.down, ours_leaf))
    assert relative_error(ours(x, Context()), theirs(x)) < 1e-6
    gate, up = (x @ ours.gate_up.weight[rows].T + (ours.gate_up.bias[rows] if bias else 0) for rows in halves.values())
    formula = (gate / (1 + (-gate).exp()) * up) @ ours.down.weight.T + (ours.down.bias if bias else 0)
    assert relative_error(ours(x, Context()), formula) < 1e-6


def test_gelu_equals_the_formula():
    x, ours = torch.randn(2, 5, 32), randomize(GELU(32, bias=True))
    up = x @ ours.up.weight.T + ours.up.bias
    formula = (0.5 * up * (1 + torch.erf(up / 2**0.5))) @ ours.down.weight.T + ours.down.bias
    assert relative_error(ours(x, Context()), formula) < 1e-6


@pytest.mark.parametrize("dim", [384, 768, 1024])
def test_default_widths_hold_as_many_parameters_as_the_plain_4c_network(dim):
    swiglu, gelu = (sum(p.numel() for p in ffn(dim).parameters()) for ffn in (SwiGLU, GELU))
    assert gelu == 8 * dim * dim and gelu <= swiglu < gelu + 3 * dim * 256
