"""Mixers against references that are not ours."""

import torch
from torch import nn

from components.attention import MathAttention
from components.mixer import SelfAttention
from components.position import NoPE
from parity.reference import lone_context, randomize, relative_error


def copy_into(module, **tensors):
    """Load tensors by name, dots written as two underscores; every parameter has to be named."""
    module.load_state_dict({name.replace("__", "."): value for name, value in tensors.items()})
    return module


def test_self_attention_equals_torch_multihead_attention():
    x, ours = torch.randn(2, 13, 32), randomize(SelfAttention(32, 4, 4, 0, MathAttention, (0, 1), bias=True))
    theirs = copy_into(
        nn.MultiheadAttention(32, 4, batch_first=True),
        in_proj_weight=ours.qkv.weight,
        in_proj_bias=ours.qkv.bias,
        out_proj__weight=ours.out.weight,
        out_proj__bias=ours.out.bias,
    )
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=future, need_weights=False)[0]
    assert relative_error(ours(x, lone_context(NoPE(32, 4, 8, 13))), expected) < 1e-6
