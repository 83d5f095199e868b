"""Blocks against references that are not ours."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from torch import nn
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from components.attention import SDPA
from components.block import (
    DeepNorm,
    HyperConnections,
    LayerScale,
    MixerOnly,
    Parallel,
    PostNorm,
    PreNorm,
    ReZero,
    Sandwich,
)
from components.ffn import GELU, SwiGLU
from components.mixer import SelfAttention
from components.norm import LayerNorm, RMSNorm
from components.position import NoPE, RoPE
from parity.reference import attention_loop, lone_context, randomize


def built(block, depth=(0, 1)):
    mixer = SelfAttention(32, 4, 4, 0, SDPA, depth, bias=True)
    return randomize(block(32, mixer, GELU(32, bias=True), LayerNorm, depth))


def torch_layer(ours, norm_first, mixer_scale=1.0, ffn_scale=1.0, norms=True, eps=1e-5):
    """PyTorch's layer with the weights of ours; what scales a sublayer's output goes into its last matrix and bias."""
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, batch_first=True, norm_first=norm_first)
    pairs = {"self_attn.in_proj_": "mixer.qkv.", "self_attn.out_proj.": "mixer.out.", "linear1.": "ffn.up."}
    pairs |= {"linear2.": "ffn.down."} | ({"norm1.": "mixer_norm.", "norm2.": "ffn_norm."} if norms else {})
    if norms:
        theirs.norm1.eps = theirs.norm2.eps = eps
    else:
        theirs.norm1 = theirs.norm2 = nn.Identity()
    scales = {"mixer.out.": mixer_scale, "ffn.down.": ffn_scale}
    state = {}
    for a, b in pairs.items():
        for leaf in ("weight", "bias"):
            value, scale = ours.state_dict()[b + leaf], torch.as_tensor(scales.get(b, 1.0))
            state[a + leaf] = value * (scale[:, None] if scale.ndim and value.ndim == 2 else scale)
    theirs.load_state_dict(state)
    return partial(theirs, src_mask=torch.ones(13, 13, dtype=torch.bool).triu(1))


def run(block, x):
    return block(x, lone_context(NoPE(32, 4, 8, 13)))


@pytest.mark.parametrize("block, norm_first", [(PreNorm, True), (PostNorm, False)])
def test_sequential_blocks_equal_torch_transformer_layers(block, norm_first, parity):
    ours, x = built(block), torch.randn(2, 13, 32)
    parity(block.__name__, "torch.nn.TransformerEncoderLayer", run(ours, x), torch_layer(ours, norm_first)(x))


def test_the_parallel_block_equals_the_formula(parity):
    ours, x = built(Parallel), torch.randn(2, 13, 32)
    mixer, up, down = ours.mixer, ours.ffn.up, ours.ffn.down
    n = F.layer_norm(x, (32,), ours.norm.weight, ours.norm.bias, 1e-5)
    q, k, v = F.linear(n, mixer.qkv.weight, mixer.qkv.bias).view(2, 13, 3, 4, 8).unbind(2)
    mixed = F.linear(attention_loop(q, k, v).flatten(2).float(), mixer.out.weight, mixer.out.bias)
    expected = x + mixed + F.linear(F.gelu(F.linear(n, up.weight, up.bias)), down.weight, down.bias)
    parity("Parallel", "the formula, attention in loops", run(ours, x), expected)


def test_a_mixer_alone_equals_the_formula_and_has_no_ffn(parity):
    ours, x = built(MixerOnly), torch.randn(2, 13, 32)
    mixer = ours.mixer
    n = F.layer_norm(x, (32,), ours.norm.weight, ours.norm.bias, 1e-5)
    q, k, v = F.linear(n, mixer.qkv.weight, mixer.qkv.bias).view(2, 13, 3, 4, 8).unbind(2)
    mixed = F.linear(attention_loop(q, k, v).flatten(2).float(), mixer.out.weight, mixer.out.bias)
    parity("MixerOnly", "the formula, attention in loops", run(ours, x), x + mixed)
    assert {name.partition(".")[0] for name, _ in ours.named_parameters()} == {"mixer", "norm"}


def test_the_parallel_block_with_two_norms_equals_gpt_neox(parity):
    mixer = SelfAttention(32, 4, 4, 0, SDPA, (0, 1), bias=True)
    ours = randomize(Parallel(32, mixer, GELU(32, bias=True), LayerNorm, (0, 1), two_norms=True))
    x = torch.randn(2, 13, 32)
    mixed, n = mixer(ours.norm(x), lone_context(NoPE(32, 4, 8, 13))), ours.ffn_norm(x)
    up, down = ours.ffn.up, ours.ffn.down
    expected = x + mixed + F.linear(F.gelu(F.linear(n, up.weight, up.bias)), down.weight, down.bias)
    parity("Parallel", "the formula with two norms", ours(x, lone_context(NoPE(32, 4, 8, 13))), expected)


def test_the_sandwich_equals_gemma2(parity):
    mixer = SelfAttention(32, 4, 2, 0, SDPA, (0, 1))
    ours, x = randomize(Sandwich(32, mixer, SwiGLU(32, hidden=96), RMSNorm, (0, 1))), torch.randn(2, 13, 32)
    config = gemma2.Gemma2Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=96, vocab_size=50
    )
    config.update(dict(hidden_activation="silu", query_pre_attn_scalar=8, attn_logit_softcapping=None))
    config._attn_implementation = "eager"
    theirs = gemma2.Gemma2DecoderLayer(config, 0)
    q, k, v = mixer.qkv.weight.split((32, 16, 16))
    gate, up = ours.ffn.gate_up.weight.chunk(2)
    names = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": mixer.out.weight}
    names |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": ours.ffn.down.weight}
    norms = {"input_layernorm": ours.mixer_norm, "post_attention_layernorm": ours.mixer_out_norm}
    norms |= {"pre_feedforward_layernorm": ours.ffn_norm, "post_feedforward_layernorm": ours.ffn_out_norm}
    names |= {name: norm.weight - 1 for name, norm in norms.items()}  # their gain counts from 1
    theirs.load_state_dict({f"{name}.weight": value for name, value in names.items()})
    angles = gemma2.Gemma2RotaryEmbedding(config)(x, torch.arange(13)[None])
    future = torch.zeros(13, 13).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf)[None, None]
    expected = theirs(x, position_embeddings=angles, attention_mask=future)
    parity("Sandwich", "transformers Gemma2DecoderLayer", ours(x, lone_context(RoPE(32, 4, 8, 13))), expected)


def test_rezero_equals_a_torch_layer_without_norms(parity):
    ours, x = built(ReZero), torch.randn(2, 13, 32)
    theirs = torch_layer(ours, True, ours.alpha.item(), ours.alpha.item(), norms=False)
    parity("ReZero", "torch.nn.TransformerEncoderLayer, no norms", run(ours, x), theirs(x))
    assert torch.equal(run(ReZero(32, ours.mixer, ours.ffn, LayerNorm, (0, 1)), x), x)  # as it starts


def test_layerscale_equals_a_torch_layer_with_scaled_outputs(parity):
    ours, x = built(LayerScale), torch.randn(2, 13, 32)
    theirs = torch_layer(ours, True, ours.mixer_gain.detach(), ours.ffn_gain.detach())
    parity("LayerScale", "torch.nn.TransformerEncoderLayer, outputs scaled", run(ours, x), theirs(x))
    fresh = LayerScale(32, ours.mixer, ours.ffn, LayerNorm, (0, 1), initial=1e-5)
    assert (fresh.mixer_gain == 1e-5).all() and (fresh.ffn_gain == 1e-5).all()


@pytest.mark.parametrize("n_layer", [1, 12])
def test_deepnorm_equals_a_torch_layer_with_scaled_outputs(n_layer, parity):
    """norm(alpha x + f) = norm(x + f / alpha), with an eps that is alpha^2 smaller."""
    ours, x, alpha = built(DeepNorm, (0, n_layer)), torch.randn(2, 13, 32), (2 * n_layer) ** 0.25
    theirs = torch_layer(ours, False, 1 / alpha, 1 / alpha, eps=1e-5 / alpha**2)
    parity("DeepNorm", "torch.nn.TransformerEncoderLayer, outputs scaled", run(ours, x), theirs(x))


# --- hyper-connections


class Summed(nn.Module):
    """A sublayer that is nobody's: tanh of a matrix times the sum of all tokens so far."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) / 8)

    def forward(self, x, context):
        return torch.tanh(x.cumsum(1) @ self.weight)


def layer_norm(x, module):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * module.weight + module.bias


def hyper_connection(streams, part, norm, sublayer):
    """One sublayer by the paper's matrix [[0, beta], [alpha_m, alpha_r]], token by token: streams (B, T, n, C)."""
    batch, length, n, dim = streams.shape
    read, kept = torch.zeros(batch, length, dim).double(), torch.zeros_like(streams)
    write = torch.zeros(batch, length, n).double()
    for b in range(batch):
        for t in range(length):
            h = streams[b, t]
            matrix = torch.zeros(n + 1, n + 1).double()
            matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = part.write, part.read, part.mix.view(n, n)
            for i in range(n if part.norm is not None else 0):
                change = torch.tanh(part.weight @ layer_norm(h[i], part.norm))  # read, mix 1..n, write
                matrix[1 + i] += part.factor[0] * change[: n + 1]
                matrix[0, 1 + i] += part.factor[1] * change[n + 1]
            for i in range(n):
                read[b, t] += matrix[1 + i, 0] * h[i]
                for j in range(n):
                    kept[b, t, j] += matrix[1 + i, 1 + j] * h[i]
            write[b, t] = matrix[0, 1:]
            read[b, t] = layer_norm(read[b, t].clone(), norm)
    out = sublayer(read, None)
    for j in range(n):
        kept[:, :, j] += write[:, :, j, None] * out
    return kept


@torch.no_grad()
@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_hyper_connections_equal_the_formula(streams, dynamic, n_layer, parity):
    blocks = []
    for i in range(n_layer):
        block = HyperConnections(32, Summed(i), Summed(9 + i), LayerNorm, (i, n_layer), streams, dynamic)
        blocks.append(randomize(block).double())
    x = torch.randn(2, 5, 32).double()
    context, ours, theirs = lone_context(None), x, torch.stack([x] * streams, dim=2)
    for block in blocks:
        ours = block(ours, context)
        theirs = hyper_connection(theirs, block.mixer_streams, block.mixer_norm, block.mixer)
        theirs = hyper_connection(theirs, block.ffn_streams, block.ffn_norm, block.ffn)
    parity("HyperConnections", "the formula in loops", ours, theirs.sum(2), 1e-12)


@pytest.mark.parametrize("streams, dynamic", [(1, True), (2, True), (4, True), (4, False)])
def test_hyper_connections_start_as_a_pre_norm_network(streams, dynamic, parity):
    """Bit by bit: every stream is what PreNorm has. The sum of a power of two of them loses nothing either."""
    ids, last = torch.randint(50, (2, 13)), []
    for block in (partial(HyperConnections, streams=streams, dynamic=dynamic), PreNorm):
        model = tiny_gpt(n_layer=3, block=block)
        model.norm.register_forward_hook(lambda module, args, out: last.append((args[0], out)))
        model(ids)
    (summed, ours), (plain, theirs) = last
    assert torch.equal(summed, streams * plain)
    parity("HyperConnections", "PreNorm, at the start", ours, theirs, 1e-4)  # the norm's eps sees n times the stream


def test_the_reading_weights_start_at_the_streams_in_turn():
    model = tiny_gpt(n_layer=3, block=HyperConnections)
    parts = [part for block in model.blocks for part in (block.mixer_streams, block.ffn_streams)]
    assert [part.read.tolist().index(1) for part in parts] == [0, 1, 2, 3, 0, 1]
    assert all(part.read.sum() == 1 for part in parts)


class Plain(nn.Module):
    """A block that takes x of any shape."""

    def __init__(self, dim, mixer, ffn, norm, depth):
        super().__init__()

    def forward(self, x, context):
        return x


@pytest.mark.parametrize("blocks", [[PreNorm, HyperConnections], [HyperConnections, Plain, HyperConnections]])
def test_hyper_connections_beside_other_blocks_are_refused(blocks):
    model = tiny_gpt(n_layer=3, block=blocks)
    with pytest.raises(ValueError, match="GPT.block = @HyperConnections"):
        model(torch.randint(50, (2, 13)))
