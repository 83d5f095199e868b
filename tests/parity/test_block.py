"""Blocks against references that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.attention import SDPA
from components.block import Parallel, PostNorm, PreNorm
from components.ffn import GELU
from components.mixer import SelfAttention
from components.norm import LayerNorm
from components.position import NoPE
from parity.reference import attention_loop, lone_context, randomize, relative_error


@pytest.mark.parametrize("block, norm_first", [(PreNorm, True), (PostNorm, False)])
def test_sequential_blocks_equal_torch_transformer_layers(block, norm_first):
    mixer = SelfAttention(32, 4, 4, 0, SDPA, (0, 1), bias=True)
    ours = randomize(block(32, mixer, GELU(32, bias=True), LayerNorm, (0, 1)))
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, batch_first=True, norm_first=norm_first)
    pairs = {"self_attn.in_proj_": "mixer.qkv.", "self_attn.out_proj.": "mixer.out.", "linear1.": "ffn.up."}
    pairs |= {"linear2.": "ffn.down.", "norm1.": "mixer_norm.", "norm2.": "ffn_norm."}
    state = ours.state_dict()
    theirs.load_state_dict({a + leaf: state[b + leaf] for a, b in pairs.items() for leaf in ("weight", "bias")})
    x, future = torch.randn(2, 13, 32), torch.ones(13, 13, dtype=torch.bool).triu(1)
    expected = theirs(x, src_mask=future)
    assert relative_error(ours(x, lone_context(NoPE(32, 4, 8, 13))), expected) < 1e-6


def test_the_parallel_block_equals_the_formula():
    mixer, x = SelfAttention(32, 4, 4, 0, SDPA, (0, 1), bias=True), torch.randn(2, 13, 32)
    ours = randomize(Parallel(32, mixer, GELU(32, bias=True), LayerNorm, (0, 1)))
    n = F.layer_norm(x, (32,), ours.norm.weight, ours.norm.bias, 1e-5)
    q, k, v = F.linear(n, mixer.qkv.weight, mixer.qkv.bias).view(2, 13, 3, 4, 8).unbind(2)
    mixed = F.linear(attention_loop(q, k, v).flatten(2).float(), mixer.out.weight, mixer.out.bias)
    up, down = ours.ffn.up, ours.ffn.down
    expected = x + mixed + F.linear(F.gelu(F.linear(n, up.weight, up.bias)), down.weight, down.bias)
    assert relative_error(ours(x, lone_context(NoPE(32, 4, 8, 13))), expected) < 1e-6
