"""Mixers against references that are not ours."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import parts, tiny_gpt
from torch import nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
from transformers.models.diffllama import modeling_diffllama as diffllama
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as hunyuan
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from components.attention import SDPA, MathAttention
from components.mixer import (
    DifferentialAttention,
    GatedLinearRecurrence,
    LatentAttention,
    SelfAttention,
    ShortConvolution,
    ValueResidual,
)
from components.norm import RMSNorm
from components.position import ALiBi, NoPE, RoPE
from parity.reference import attention_loop, lone_context, randomize
from toolkit.context import Context

FUTURE = torch.full((13, 13), -torch.inf).triu(1)  # what transformers' eager attention adds to its scores
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, vocab_size=50)
SIZES |= dict(rms_norm_eps=1e-6, pad_token_id=None, attn_implementation="eager")
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 9, [0] * 1 + [1] * 5 + [2] * 7])


def copy_into(module, **tensors):
    """Load tensors by name, dots written as two underscores; every parameter has to be named."""
    module.load_state_dict({name.replace("__", "."): value for name, value in tensors.items()})
    return module


def projections(mixer):
    """The matrices of a self-attention under the names that transformers gives them."""
    q, k, v = mixer.qkv.weight.split(tuple(mixer.qkv.merged.values()))
    return dict(q_proj__weight=q, k_proj__weight=k, v_proj__weight=v, o_proj__weight=mixer.out.weight)


def with_gradient(function, x):
    """What the function makes of x, and the gradient with respect to x of a fixed weighting of it."""
    x = x.clone().requires_grad_()
    out = function(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return out, torch.autograd.grad((out * weights.to(out.dtype)).sum(), x)[0]


def rotary(module, config, x):
    return module(config)(x, torch.arange(13)[None])


def rope():
    return lone_context(RoPE(32, 4, 8, 13))


def test_self_attention_equals_torch_multihead_attention(parity):
    x, ours = torch.randn(2, 13, 32), randomize(SelfAttention(32, 4, 4, 0, MathAttention, (0, 1), bias=True))
    theirs = copy_into(
        nn.MultiheadAttention(32, 4, batch_first=True),
        in_proj_weight=ours.qkv.weight,
        in_proj_bias=ours.qkv.bias,
        out_proj__weight=ours.out.weight,
        out_proj__bias=ours.out.bias,
    )
    expected = with_gradient(lambda x: theirs(x, x, x, attn_mask=FUTURE, need_weights=False)[0], x)
    context = lone_context(NoPE(32, 4, 8, 13))
    parity("SelfAttention", "torch.nn.MultiheadAttention", with_gradient(lambda x: ours(x, context), x), expected)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_qk_norm_before_the_rotation_equals_qwen3(parity, n_kv_head):
    ours = randomize(SelfAttention(32, 4, n_kv_head, 0, SDPA, (0, 1), qk_norm=RMSNorm))
    config = qwen3.Qwen3Config(**SIZES, num_key_value_heads=n_kv_head, head_dim=8)
    norms = dict(q_norm__weight=ours.q_norm.weight, k_norm__weight=ours.k_norm.weight)
    theirs = copy_into(qwen3.Qwen3Attention(config, 0), **projections(ours), **norms)
    x = torch.randn(2, 13, 32)
    turns = rotary(qwen3.Qwen3RotaryEmbedding, config, x)
    expected = with_gradient(lambda x: theirs(x, turns, FUTURE)[0], x)
    parity("SelfAttention", "transformers Qwen3 (QK-norm)", with_gradient(lambda x: ours(x, rope()), x), expected)


def test_qk_norm_after_the_rotation_equals_hunyuan(parity):
    ours = randomize(SelfAttention(32, 4, 2, 0, SDPA, (0, 1), qk_norm=RMSNorm, qk_norm_after_rotation=True))
    config = hunyuan.HunYuanDenseV1Config(**SIZES, num_key_value_heads=2, head_dim=8)
    norms = dict(query_layernorm__weight=ours.q_norm.weight, key_layernorm__weight=ours.k_norm.weight)
    theirs = copy_into(hunyuan.HunYuanDenseV1Attention(config, 0), **projections(ours), **norms)
    x = torch.randn(2, 13, 32)
    turns = rotary(hunyuan.HunYuanDenseV1RotaryEmbedding, config, x)
    expected = with_gradient(lambda x: theirs(x, turns, FUTURE)[0], x)
    ours = with_gradient(lambda x, mixer=ours: mixer(x, rope()), x)
    parity("SelfAttention", "transformers Hunyuan (QK-norm after rotation)", ours, expected)


def test_the_output_gate_equals_qwen3_next(parity):
    ours = randomize(SelfAttention(32, 4, 2, 0, SDPA, (0, 1), qk_norm=RMSNorm, gate=True))
    turn = dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=1.0)
    config = qwen3_next.Qwen3NextConfig(**SIZES, num_key_value_heads=2, head_dim=8, rope_parameters=turn)
    state = projections(ours)
    by_head = (state["q_proj__weight"].view(4, 8, 32), ours.gate.weight.view(4, 8, 32))
    state["q_proj__weight"] = torch.cat(by_head, dim=1).flatten(0, 1)  # per head: rows of q, then of the gate
    norms = dict(q_norm__weight=ours.q_norm.weight - 1, k_norm__weight=ours.k_norm.weight - 1)  # theirs: 1 + gain
    theirs = copy_into(qwen3_next.Qwen3NextAttention(config, 0), **state, **norms)
    x = torch.randn(2, 13, 32)
    turns = rotary(qwen3_next.Qwen3NextRotaryEmbedding, config, x)
    expected = with_gradient(lambda x: theirs(x, turns, FUTURE)[0], x)
    ours = with_gradient(lambda x, mixer=ours: mixer(x, rope()), x)
    parity("SelfAttention", "transformers Qwen3-Next (output gate)", ours, expected)


def test_a_norm_order_without_a_norm_is_refused():
    with pytest.raises(ValueError, match="SelfAttention.qk_norm is None"):
        SelfAttention(32, 4, 4, 0, SDPA, (0, 1), qk_norm_after_rotation=True)


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_value_residual_equals_the_formula(parity, n_kv_head):
    """Three layers on inputs of their own; the share of each is its own."""
    layers = [randomize(ValueResidual(32, 4, n_kv_head, 0, SDPA, (i, 3))) for i in range(3)]
    context, first = lone_context(NoPE(32, 4, 8, 13)), None
    for i, layer in enumerate(layers):
        x = torch.randn(2, 13, 32)
        q, k, v = (x.double() @ part.double().T for part in layer.qkv.weight.split((32, 8 * n_kv_head, 8 * n_kv_head)))
        first = v if i == 0 else first
        v = v if i == 0 else (1 - layer.share.double()) * v + layer.share.double() * first
        mixed = attention_loop(*(t.unflatten(2, (-1, 8)) for t in (q, k, v))).flatten(2)
        expected = mixed @ layer.out.weight.double().T
        parity("ValueResidual", "formula of the paper, float64 loop", layer(x, context), expected)


def test_a_value_residual_has_to_begin_in_the_first_layer():
    ids = torch.randint(50, (2, 13))
    assert tiny_gpt(mixer=[ValueResidual, SelfAttention], n_layer=3)(ids)[0].isfinite().all()
    with pytest.raises(ValueError, match="layer 1.*put @ValueResidual first in the list GPT.mixer"):
        tiny_gpt(mixer=[SelfAttention, ValueResidual])(ids)
    assert [name for name, _ in tiny_gpt(mixer=ValueResidual).named_parameters() if "share" in name] == [
        "blocks.1.mixer.share"
    ]


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_differential_attention_equals_diffllama(parity, n_kv_head, layer):
    ours = randomize(DifferentialAttention(32, 4, n_kv_head, 0, SDPA, (layer, 4)))
    nn.init.ones_(ours.norm.weight)  # theirs has no gain
    config = diffllama.DiffLlamaConfig(**{**SIZES, "rms_norm_eps": 1e-5}, num_key_value_heads=n_kv_head, head_dim=8)
    vectors = {f"lambda_{name}": getattr(ours, f"lambda_{name}") for name in ("q1", "k1", "q2", "k2")}
    theirs = copy_into(diffllama.DiffLlamaAttention(config, layer), **projections(ours), **vectors)
    x = torch.randn(2, 13, 32)
    turns = rotary(diffllama.DiffLlamaRotaryEmbedding, config, x)
    expected = with_gradient(lambda x: theirs(x, turns, FUTURE)[0], x)
    ours = with_gradient(lambda x, mixer=ours: mixer(x, rope()), x)
    parity("DifferentialAttention", "transformers DiffLlama", ours, expected)


def test_differential_attention_with_a_gain_and_a_score_bias_equals_the_formula(parity):
    ours, alibi = randomize(DifferentialAttention(32, 4, 4, 0, MathAttention, (2, 4))), ALiBi(32, 4, 8, 13)
    x, context = torch.randn(2, 13, 32), lone_context(alibi)
    context.bias = [alibi.score_bias(torch.arange(13), torch.arange(13))]
    q, k, v = ((x.double() @ w.double().T).unflatten(2, (4, 8)) for w in ours.qkv.weight.chunk(3))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5 + context.bias[0] + FUTURE
    maps, start = scores.softmax(-1), 0.8 - 0.6 * math.exp(-0.6)
    share = (ours.lambda_q1.double() @ ours.lambda_k1.double()).exp() + start
    share = share - (ours.lambda_q2.double() @ ours.lambda_k2.double()).exp()
    heads = []
    for h in range(2):
        values = torch.cat((v[:, :, h], v[:, :, h + 2]), dim=-1)  # (B, T, 2D)
        mixed = (maps[:, h] - share * maps[:, h + 2]) @ values
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.norm.weight
        heads.append((1 - start) * mixed)
    expected = torch.cat(heads, dim=-1) @ ours.out.weight.double().T
    parity("DifferentialAttention", "formula of the paper, float64", ours(x, context), expected)


@pytest.mark.parametrize("knob, heads", [("n_head", (3, 3)), ("n_kv_head", (4, 1))])
def test_differential_attention_refuses_an_odd_number_of_heads(knob, heads):
    with pytest.raises(ValueError, match=rf"GPT.{knob} = {heads[1]} is odd: make it even"):
        DifferentialAttention(48, *heads, 0, SDPA, (0, 1))


@pytest.mark.parametrize("kernel", [SDPA, MathAttention])
@pytest.mark.parametrize("sizes", [{}, dict(q_rank=12, kv_rank=20, nope_dim=6, rope_dim=6, value_dim=10)])
def test_latent_attention_equals_deepseek_v2(parity, sizes, kernel):
    ours = randomize(LatentAttention(32, 4, 4, 0, kernel, (0, 1), **sizes))
    nope, value, rope_dim = sizes.get("nope_dim", 8), sizes.get("value_dim", 8), sizes.get("rope_dim", 4)
    config = deepseek.DeepseekV2Config(
        **SIZES,
        num_key_value_heads=4,
        q_lora_rank=sizes.get("q_rank"),
        kv_lora_rank=sizes.get("kv_rank", 32),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=value,
    )
    pairs = torch.arange(rope_dim).view(2, -1).T.flatten()  # they turn neighbours, we turn (i, i + rope_dim / 2)
    q = ours.q_up.weight.unflatten(0, (4, -1))
    q = torch.cat((q[:, :nope], q[:, nope:][:, pairs]), dim=1).flatten(0, 1)
    latent, turned = ours.kv_down.weight.split((config.kv_lora_rank, rope_dim))
    k, v = (part.unflatten(0, (4, -1)) for part in ours.kv_up.weight.split((4 * nope, 4 * value)))
    state = dict(kv_a_proj_with_mqa__weight=torch.cat((latent, turned[pairs])), o_proj__weight=ours.out.weight)
    state |= dict(kv_a_layernorm__weight=ours.kv_norm.weight, kv_b_proj__weight=torch.cat((k, v), dim=1).flatten(0, 1))
    if sizes:
        state |= dict(q_a_proj__weight=ours.q_down.weight, q_a_layernorm__weight=ours.q_norm.weight, q_b_proj__weight=q)
    else:
        state |= dict(q_proj__weight=q)
    theirs = copy_into(deepseek.DeepseekV2Attention(config, 0), **state)
    config.head_dim = rope_dim  # what their rotary module is built from
    x = torch.randn(2, 13, 32)
    turns = rotary(deepseek.DeepseekV2RotaryEmbedding, config, x)
    expected = with_gradient(lambda x: theirs(x, FUTURE, None, turns)[0], x)
    ours = with_gradient(lambda x, mixer=ours: mixer(x, rope()), x)
    parity("LatentAttention", "transformers DeepSeek-V2", ours, expected)


def test_latent_attention_caches_the_latent_and_one_rotated_key():
    keys, turned = LatentAttention(32, 4, 4, 0, SDPA, (0, 1), kv_rank=12, rope_dim=4).init_cache(3, 20)
    assert keys.shape == (3, 20, 12) and turned.shape == (3, 20, 1, 4)


def test_latent_attention_refuses_what_it_would_not_use():
    with pytest.raises(ValueError, match="GPT.n_kv_head = 4 or None"):
        LatentAttention(32, 4, 2, 0, SDPA, (0, 1))
    with pytest.raises(ValueError, match="LatentAttention.rope_dim = 3 must be even"):
        LatentAttention(32, 4, 4, 0, SDPA, (0, 1), rope_dim=3)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
def test_gated_linear_recurrence_equals_the_loop(parity, documents):
    ours, x = randomize(GatedLinearRecurrence(32, 4, 4, 0, None, (0, 1), bias=True)), torch.randn(2, 13, 32)

    def loop(x):
        z, c, g = (x @ ours.zcg.weight.double().T + ours.zcg.bias.double()).chunk(3, dim=-1)
        rows = []
        for b in range(2):
            h, states = torch.zeros(32, dtype=torch.float64), []
            for t in range(13):
                if documents is not None and t and documents[b, t] != documents[b, t - 1]:
                    h = torch.zeros(32, dtype=torch.float64)
                gate = 1 / (1 + torch.exp(-z[b, t]))
                h = (1 - gate) * h + gate * c[b, t]
                states.append(h * g[b, t] / (1 + torch.exp(-g[b, t])))
            rows.append(torch.stack(states))
        return torch.stack(rows) @ ours.out.weight.double().T + ours.out.bias.double()

    context = Context(documents=documents)
    result = with_gradient(lambda x: ours(x, context), x)
    parity("GatedLinearRecurrence", "step by step, float64", result, with_gradient(loop, x.double()))


@pytest.mark.parametrize("width", [1, 3, 4])
def test_short_convolution_equals_lfm2(parity, width):
    ours, x = randomize(ShortConvolution(32, 4, 4, 0, None, (0, 1), width=width)), torch.randn(2, 13, 32)
    config = lfm2.Lfm2Config(**{k: v for k, v in SIZES.items() if k != "rms_norm_eps"}, conv_L_cache=width)
    theirs = copy_into(
        lfm2.Lfm2ShortConv(config, 0),
        conv__weight=ours.conv.weight,
        in_proj__weight=ours.bcu.weight,
        out_proj__weight=ours.out.weight,
    )
    result = with_gradient(lambda x: ours(x, Context()), x)
    parity("ShortConvolution", "transformers LFM2", result, with_gradient(theirs, x))


def test_short_convolution_of_packed_documents_equals_torch_conv1d_of_each(parity):
    ours, x = randomize(ShortConvolution(32, 4, 4, 0, None, (0, 1))), torch.randn(2, 13, 32)
    expected = torch.zeros(2, 13, 32)
    for row, ids in enumerate(DOCUMENTS):
        for document in ids.unique():
            b, c, u = (ours.bcu.weight @ x[row, ids == document].T).chunk(3)  # (C, length)
            conv = F.conv1d(F.pad(b * u, (3, 0))[None], ours.conv.weight, groups=32)[0]
            expected[row, ids == document] = (ours.out.weight @ (c * conv)).T
    parity("ShortConvolution", "torch conv1d, document by document", ours(x, Context(documents=DOCUMENTS)), expected)


@pytest.mark.parametrize("part", parts("mixer"))
def test_a_cache_that_was_used_is_as_good_as_new(part):
    """Generation starts again at position 0 with the same cache where the window slides."""
    model, ids = tiny_gpt(mixer=part.cls).eval(), torch.randint(50, (2, 13))
    cache = model.init_cache(2)
    model(ids.flip(1), Context(cache=cache, start=torch.tensor(0)))
    again = model(ids, Context(cache=cache, start=torch.tensor(0)))[0]
    torch.testing.assert_close(again, model(ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", parts("mixer"))
def test_packed_documents_decode_from_a_cache_as_in_one_pass(part):
    model, ids = tiny_gpt(max_len=13, mixer=part.cls).eval(), torch.randint(50, (2, 13))
    cache, start, out = model.init_cache(2), 0, []
    for chunk in ids.split([3, 1, 5, 4], dim=1):
        out.append(model(chunk, Context(documents=DOCUMENTS, cache=cache, start=torch.tensor(start)))[0])
        start += chunk.shape[1]
    expected = model(ids, Context(documents=DOCUMENTS))[0]
    torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", parts("mixer"))
def test_merged_matrices_add_up_to_their_rows(part):
    for linear in tiny_gpt(mixer=part.cls).modules():
        if getattr(linear, "merged", None):
            assert sum(linear.merged.values()) == len(linear.weight)


def test_wide_heads_equal_attention_in_loops(parity):
    """Heads wider than C / H, as in Qwen3 and Gemma; tests/test_exchange.py compares whole models with theirs."""
    x, ours = torch.randn(2, 13, 32), randomize(SelfAttention(32, 4, 2, 0, MathAttention, (0, 1), head_dim=12))
    assert ours.out.weight.shape == (32, 48)
    q, k, v = (part.view(2, 13, -1, 12) for part in ours.qkv.each(x))
    k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
    expected = F.linear(attention_loop(q, k, v).flatten(2).float(), ours.out.weight)
    parity("SelfAttention", "attention in loops, wide heads", ours(x, lone_context(NoPE(32, 4, 8, 13))), expected)
