"""Position encodings against references that are not ours."""

import cmath
import math

import pytest
import torch
from conftest import parts, tiny_gpt
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi import modeling_phi as phi
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from components.position import (
    ALiBi,
    Kerple,
    Learned,
    LinearRoPE,
    Llama3RoPE,
    NoPE,
    NTKRoPE,
    RoPE,
    Sinusoidal,
    T5Bias,
    XPos,
    YaRN,
)
from parity.reference import llama_config, randomize, relative_error

POSITIONS = torch.arange(64)[None]
ROTATING = [p for p in parts("position") if hasattr(p.values[0].cls, "rotate")]
BIASED = [p for p in parts("position") if hasattr(p.values[0].cls, "score_bias")]


def queries_and_keys(batch=2, length=64, head_dim=8):
    return torch.randn(batch, length, 4, head_dim), torch.randn(batch, length, 2, head_dim)


def llamas(q, k, positions, **rope):
    """q and k as transformers' Llama turns them, from its own table of frequencies."""
    longest = rope.pop("max_position_embeddings", 64)
    rope = {"rope_type": "default", "rope_theta": 10_000.0} | rope
    cos, sin = llama.LlamaRotaryEmbedding(llama_config(max_position_embeddings=longest, rope_parameters=rope))(
        q, positions
    )
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


def test_rope_turns_pairs_as_complex_numbers(parity):
    before = queries_and_keys(1)
    expected = tuple(torch.zeros_like(x, dtype=torch.float64) for x in before)
    for x, turned in zip(before, expected, strict=True):
        for position in range(64):
            for pair in range(4):
                turn = cmath.exp(1j * position * 10_000 ** (-2 * pair / 8))
                z = torch.complex(x[..., pair], x[..., pair + 4])[:, position].to(torch.complex128) * turn
                turned[:, position, :, pair], turned[:, position, :, pair + 4] = z.real, z.imag
    parity("RoPE", "formula in complex numbers, float64", RoPE(32, 4, 8, 64).rotate(*before, POSITIONS), expected)


@pytest.mark.parametrize("theirs", [llama, neox], ids=["llama", "gpt-neox"])
@pytest.mark.parametrize("built_for", [8, 4], ids=["built for this head size", "for another"])
def test_rope_equals_transformers(theirs, built_for, parity):
    q, k = queries_and_keys()
    cos, sin = llama.LlamaRotaryEmbedding(llama_config())(q, POSITIONS)
    expected = theirs.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    turned = RoPE(4 * built_for, 4, built_for, 64).rotate(q, k, POSITIONS)
    parity("RoPE", f"transformers {theirs.__name__.split('.')[-1]}", turned, expected)


def test_rope_takes_positions_per_row_and_its_own_theta(parity):
    q, positions = torch.randn(2, 9, 4, 8), torch.stack((torch.arange(9), torch.arange(40, 49)))
    expected = llamas(q, q, positions, rope_theta=500_000.0)
    turned = RoPE(32, 4, 8, 64, theta=500_000.0).rotate(q, q, positions)
    parity("RoPE", "transformers modeling_llama", turned, expected)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_partial_rope_equals_gpt_neox_and_phi(fraction, parity):
    q, k = queries_and_keys(head_dim=16)
    turned = RoPE(64, 4, 16, 64, fraction=fraction).rotate(q, k, POSITIONS)
    sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction}
    cos, sin = neox.GPTNeoXRotaryEmbedding(neox.GPTNeoXConfig(**sizes))(q, POSITIONS)
    whole = neox.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    parity("RoPE", "transformers modeling_gpt_neox, partial", turned, whole)
    cos, sin = phi.PhiRotaryEmbedding(phi.PhiConfig(**sizes))(q, POSITIONS)
    width = int(16 * fraction)
    first = phi.apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim=2)
    whole = tuple(torch.cat((a, b[..., width:]), dim=-1) for a, b in zip(first, (q, k), strict=True))
    parity("RoPE", "transformers modeling_phi, partial", turned, whole)


def test_a_fraction_of_rope_is_rounded_to_whole_pairs_and_never_to_none():
    q, _ = queries_and_keys(head_dim=16)
    for fraction, width in ((0.01, 2), (0.1, 2), (0.2, 4), (0.3, 4), (0.99, 16)):
        turned = RoPE(64, 4, 16, 64, fraction=fraction).rotate(q, q, POSITIONS)[0]
        moved = (turned != q).any(0).any(0).any(0)
        assert moved.tolist() == [True] * width + [False] * (16 - width)


@pytest.mark.parametrize("scale", [1.0, 4.0, 7.5])
def test_linear_rope_equals_transformers(scale, parity):
    q, k = queries_and_keys()
    expected = llamas(q, k, POSITIONS, rope_type="linear", factor=scale, rope_theta=1000.0)
    turned = LinearRoPE(32, 4, 8, 64, scale=scale, theta=1000.0).rotate(q, k, POSITIONS)
    parity("LinearRoPE", "transformers rope_type linear", turned, expected)


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_ntk_rope_equals_transformers(scale, parity):
    """At a factor of 1 the dynamic variant scales by the length over the trained length."""
    q, k = queries_and_keys()
    turned = NTKRoPE(32, 4, 8, 64, scale=scale).rotate(q, k, POSITIONS)
    short = int(64 / scale)
    dynamic = llamas(q, k, POSITIONS, rope_type="dynamic", factor=1.0, max_position_embeddings=short)
    parity("NTKRoPE", "transformers rope_type dynamic", turned, dynamic)
    changed = llamas(q, k, POSITIONS, rope_theta=10_000.0 * scale ** (8 / 6))
    parity("NTKRoPE", "transformers modeling_llama, theta changed", turned, changed)
    lone = NTKRoPE(8, 4, 2, 64, scale=scale).rotate(q[..., :2], k[..., :2], POSITIONS)
    assert all(x.isfinite().all() for x in lone)


@pytest.mark.parametrize("scale, length", [(1.0, 2048), (4.0, 2048), (16.0, 4096), (4.0, 64), (4.0, 12)])
@pytest.mark.parametrize("betas", [(32.0, 1.0), (8.0, 2.0)])
def test_yarn_equals_transformers(scale, length, betas, parity):
    q, k = torch.randn(1, 64, 4, 64), torch.randn(1, 64, 2, 64)
    named = dict(beta_fast=betas[0], beta_slow=betas[1])
    config = llama_config(
        hidden_size=256,
        max_position_embeddings=int(length * scale),
        rope_parameters=named
        | {"rope_type": "yarn", "rope_theta": 1e4, "factor": scale, "original_max_position_embeddings": length},
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, POSITIONS)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    turned = YaRN(256, 4, 64, 64, scale=scale, original_len=length, **named).rotate(q, k, POSITIONS)
    parity("YaRN", "transformers rope_type yarn", turned, expected)
    default = YaRN(256, 4, 64, int(length * scale), scale=scale, **named).rotate(q, k, POSITIONS)
    assert all(torch.equal(one, other) for one, other in zip(turned, default, strict=True))


@pytest.mark.parametrize("scale, length", [(1.0, 2048), (8.0, 2048), (8.0, 64), (4.0, 12)])
@pytest.mark.parametrize("betas", [(4.0, 1.0), (3.0, 0.5)])
def test_llama3_rope_equals_transformers(scale, length, betas, parity):
    q, k = queries_and_keys()
    named = dict(high_freq_factor=betas[0], low_freq_factor=betas[1], original_max_position_embeddings=length)
    expected = llamas(q, k, POSITIONS, rope_type="llama3", factor=scale, **named)
    part = Llama3RoPE(32, 4, 8, 64, scale=scale, original_len=length, beta_fast=betas[0], beta_slow=betas[1])
    # One unit in the last place of a frequency is 1.2e-7 of it; after 63 positions that is 63 * 0.48 * 1.2e-7 = 3.6e-6.
    parity("Llama3RoPE", "transformers rope_type llama3", part.rotate(q, k, POSITIONS), expected, 4e-6)


def test_yarn_multiplies_scores_by_the_temperature_of_the_paper():
    q, k = queries_and_keys()
    turned = YaRN(32, 4, 8, 64, scale=8.0, original_len=8).rotate(q, k, POSITIONS)
    for before, after in zip((q, k), turned, strict=True):
        assert relative_error(after.norm(dim=-1) / before.norm(dim=-1), torch.full(before.shape[:3], 1.20794)) < 1e-5


@pytest.mark.parametrize("shift", [0, 512 * 32 - 64], ids=["start", "far end of the longest context"])
def test_xpos_scores_equal_the_formula(shift, parity):
    xpos = XPos(32, 4, 8, 512 * 32)
    q, k = torch.randn(1, 64, 1, 8), torch.randn(1, 64, 1, 8)
    turned, against = (x[0, :, 0].double() for x in xpos.rotate(q, k, POSITIONS + shift))
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for n in range(64):
        for m in range(n + 1):
            for i in range(4):
                a = complex(q[0, n, 0, i], q[0, n, 0, i + 4])
                b = complex(k[0, m, 0, i], k[0, m, 0, i + 4])
                turn = cmath.exp(1j * (n - m) * 10_000 ** (-2 * i / 8))
                expected[n, m] += (a * b.conjugate() * turn).real * ((2 * i / 8 + 0.4) / 1.4) ** ((n - m) / 512)
    tolerance = 2e-6 if shift == 0 else 2e-3  # float32 holds angles of 16,320 radians to 1e-3
    where = "formula in complex numbers, float64" + (", positions from 16,320" if shift else "")
    parity("XPos", where, (turned @ against.T).tril(), expected, tolerance)


def test_xpos_fades_by_the_formula_alone_where_nothing_turns(parity):
    """theta so large that three of four pairs stand still: what is left are the gains."""
    q = torch.ones(1, 1, 1, 8).index_fill(3, torch.tensor([0, 4]), 0.0)  # the first pair turns whatever theta is
    xpos = XPos(32, 4, 8, 512 * 32, theta=1e38)
    for n, m in ((0, 0), (9, 2), (16_000, 15_993), (16_383, 0), (16_383, 16_383)):
        a, b = xpos.rotate(q, q, torch.tensor([[n]]))[0], xpos.rotate(q, q, torch.tensor([[m]]))[1]
        expected = sum(2 * ((2 * i / 8 + 0.4) / 1.4) ** ((n - m) / 512) for i in (1, 2, 3))
        parity("XPos", "formula of the gains, float64", (a * b).sum(), expected, 2e-6)


def test_xpos_is_finite_over_its_longest_context_and_refuses_a_longer_one():
    xpos, q = XPos(32, 4, 8, 512 * 32), torch.randn(1, 2, 4, 8, requires_grad=True)
    ends = torch.tensor([[0, 512 * 32 - 1]])
    turned, against = xpos.rotate(q, q, ends)
    scores = torch.einsum("bthd,bshd->bhts", turned, against)  # all four, the future as well
    assert scores.isfinite().all() and torch.autograd.grad(scores.sum(), q)[0].isfinite().all()
    with pytest.raises(ValueError, match="set XPos.scale_base = 513 or more"):
        XPos(32, 4, 8, 512 * 32 + 1)


@pytest.mark.parametrize("part", ROTATING)
def test_rotated_scores_depend_on_the_distance_alone(part):
    position, q, k = part.cls(32, 4, 8, 1024), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)

    def score(i, j):
        at_i, at_j = torch.tensor([[i]]), torch.tensor([[j]])
        return (position.rotate(q, q, at_i)[0] * position.rotate(k, k, at_j)[1]).sum(-1)

    for shift in (1, 100, 1000):
        assert relative_error(score(20 + shift, 3 + shift), score(20, 3)) < 1e-4
    assert relative_error(score(20, 3), score(20, 4)) > 1e-3


@pytest.mark.parametrize("part", ROTATING)
def test_rotations_take_positions_per_row_and_heads_of_another_size(part):
    q, k, positions = (
        torch.randn(2, 5, 4, 12),
        torch.randn(2, 5, 2, 12),
        torch.tensor([[0, 1, 2, 3, 4], [9, 0, 1, 7, 2]]),
    )
    one, other = part.cls(32, 4, 8, 64), part.cls(48, 4, 12, 64)
    both = one.rotate(q, k, positions)
    for row in range(2):
        alone = other.rotate(q[row : row + 1], k[row : row + 1], positions[row : row + 1])
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(both, alone, strict=True))
    with pytest.raises(ValueError, match=f"{part.name} rotates pairs.*GPT.n_head"):
        part.cls(28, 4, 7, 64)


def paper_slopes(n):
    """The function of the ALiBi paper's repository (ofirpress/attention_with_linear_biases)."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    closest = 2 ** math.floor(math.log2(n))
    if closest == n:
        return power_of_2(n)
    return power_of_2(closest) + paper_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("n_head", [1, 2, 6, 8, 12, 16, 20])
def test_alibi_equals_bloom_and_the_paper(n_head, parity):
    alibi, at = ALiBi(32, n_head, 8, 64), torch.arange(64)
    parity("ALiBi", "the paper's slopes", alibi.slopes, paper_slopes(n_head))
    bias = alibi.score_bias(at, at)
    parity("ALiBi", "the paper's slopes", bias[:, 40, 15], [-slope * 25 for slope in paper_slopes(n_head)])
    theirs = build_alibi_tensor(torch.ones(1, 64), n_head, torch.float32)  # (H, 1, S): equal up to a constant a row
    theirs = (theirs - theirs[..., :1]).expand_as(bias)
    parity("ALiBi", "transformers build_alibi_tensor (Bloom)", bias - bias[..., :1], theirs)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 17), (8, 20), (7, 100), (2, 2)])
def test_t5_bias_equals_transformers(num_buckets, max_distance, parity):
    sizes = dict(d_model=32, d_kv=8, num_heads=4, relative_attention_num_buckets=num_buckets)
    config = T5Config(**sizes, relative_attention_max_distance=max_distance, is_decoder=True)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours, at = T5Bias(32, 4, 8, 64, num_buckets=num_buckets, max_distance=max_distance), torch.arange(300)
    theirs.relative_attention_bias.load_state_dict(randomize(ours).table.state_dict())
    parity("T5Bias", "transformers T5Attention, a decoder", ours.score_bias(at, at), theirs.compute_bias(300, 300)[0])


def test_t5_bias_refuses_buckets_that_leave_no_room():
    with pytest.raises(ValueError, match="T5Bias.max_distance = 16.*T5Bias.num_buckets"):
        T5Bias(32, 4, 8, 64, max_distance=16)


def test_kerple_equals_the_formula(parity):
    ours = Kerple(32, 4, 8, 64)
    r1, r2 = ours.log_r1.detach().double().exp(), ours.log_r2.detach().double().exp()
    assert (0 < r1).all() and (r1 <= 2).all() and (0 < r2).all() and (r2 <= 1).all()
    expected = torch.zeros(4, 40, 64, dtype=torch.float64)
    for h in range(4):
        for i in range(40):
            for j in range(i + 21):
                expected[h, i, j] = -r1[h] * math.log(1 + r2[h] * abs(20 + i - j))
    bias = ours.score_bias(torch.arange(20, 60), torch.arange(64))
    seen = torch.arange(20, 60)[:, None] >= torch.arange(64)
    parity("Kerple", "formula in loops, float64", torch.where(seen, bias, 0.0), expected)


@pytest.mark.parametrize("part", BIASED)
def test_a_score_bias_and_its_gradients_are_finite_for_keys_in_the_future(part):
    position = part.cls(32, 4, 8, 64)
    bias = position.score_bias(torch.tensor([0, 5]), torch.arange(2000))
    assert bias.shape == (4, 2, 2000) and bias.isfinite().all()
    parameters = list(position.parameters())
    assert all(g.isfinite().all() for g in (torch.autograd.grad(bias.sum(), parameters) if parameters else ()))


def test_a_list_of_positions_rotates_in_the_layers_that_it_names(monkeypatch):
    calls, rotate = [], RoPE.rotate
    monkeypatch.setattr(RoPE, "rotate", lambda self, *args: calls.append(self) or rotate(self, *args))
    model = tiny_gpt(position=[RoPE, NoPE], n_layer=4)
    model(torch.randint(50, (1, 9)))
    assert [mixer.position for mixer in model.mixers] == [0, 1, 0, 1] and len(calls) == 2


def test_sinusoidal_equals_the_formula(parity):
    table = Sinusoidal(16, 4, 4, 1024, scale=1.0).embed(torch.zeros(1, 1024, 16), torch.arange(1024)[None])[0]
    expected = torch.zeros(1024, 16, dtype=torch.float64)
    for position in range(1024):
        for i in range(8):
            angle = position / 10_000 ** (2 * i / 16)
            expected[position, i], expected[position, 8 + i] = math.sin(angle), math.cos(angle)
    parity("Sinusoidal", "formula in loops, float64", table, expected, 1e-4)  # angles of up to 1023 in float32
    assert torch.equal(Sinusoidal(16, 4, 4, 1024).table, 0.02 * table)


def test_learned_adds_the_row_of_the_position(parity):
    learned, x = Learned(16, 4, 4, 32), torch.randn(2, 9, 16)
    positions = torch.stack((torch.arange(9), torch.arange(20, 29)))
    expected = torch.stack(
        [torch.stack([x[b, t] + learned.table.weight[positions[b, t]] for t in range(9)]) for b in (0, 1)]
    )
    parity("Learned", "rows added one at a time", learned.embed(x, positions), expected)


def test_nope_has_nothing_to_offer(parity):
    """Without a position, what a last token sees does not depend on the order of those before it."""
    assert not any(hasattr(NoPE, method) for method in ("embed", "rotate", "score_bias"))
    model, ids = tiny_gpt(position=NoPE, n_layer=1), torch.randint(50, (2, 9))
    shuffled = torch.cat((ids[:, torch.randperm(8)], ids[:, 8:]), dim=1)
    parity("NoPE", "the same tokens in another order", model(shuffled)[0][:, -1], model(ids)[0][:, -1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_rope_compiled_takes_its_angles_in_one_call_and_turns_alike(parity):
    part, found = RoPE(16, 2, 8, 32), []
    q, k, positions = torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8), torch.arange(12)[None]
    torch.compiler.reset()
    compiled = torch.compile(part.rotate, backend="aot_eager", fullgraph=True)(q, k, positions)
    for ours, theirs in zip(compiled, part.rotate(q, k, positions), strict=True):
        torch.testing.assert_close(ours, theirs)
    q, k = q.requires_grad_(), k.requires_grad_()  # turned back by a function of its own, and by autograd
    for rotate in (part.rotate, torch.compile(part.rotate, backend="aot_eager", fullgraph=True)):
        q.grad = k.grad = None
        sum((turned * turned.detach().flip(1)).sum() for turned in rotate(q, k, positions)).backward()
        found.append((q.grad, k.grad))
    parity("RoPE", "autograd through the same formula, compiled", *found)
    arguments = positions, torch.rand(4)
    torch.library.opcheck(torch.ops.toolkit.angles, arguments)
