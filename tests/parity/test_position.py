"""Position encodings against references that are not ours."""

import cmath
import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama

from components.position import ALiBi, RoPE, Sinusoidal
from parity.reference import llama_config, relative_error


def test_rope_turns_pairs_as_complex_numbers():
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)
    turned = RoPE(32, 4, 8, 64).rotate(q, k, torch.arange(64)[None])
    for before, after in zip((q, k), turned, strict=True):
        expected = torch.zeros_like(before, dtype=torch.float64)
        for position in range(64):
            for pair in range(4):
                turn = cmath.exp(1j * position * 10_000 ** (-2 * pair / 8))
                z = torch.complex(before[..., pair], before[..., pair + 4])[:, position].to(torch.complex128) * turn
                expected[:, position, :, pair], expected[:, position, :, pair + 4] = z.real, z.imag
        assert relative_error(after, expected) < 1e-6


@pytest.mark.parametrize("theirs", [llama, neox], ids=["llama", "gpt-neox"])
@pytest.mark.parametrize("built_for", [8, 4], ids=["built for this head size", "for another"])
def test_rope_equals_transformers(theirs, built_for):
    q, k, positions = torch.randn(2, 64, 4, 8), torch.randn(2, 64, 2, 8), torch.arange(64)[None]
    cos, sin = llama.LlamaRotaryEmbedding(llama_config())(q, positions)
    expected = theirs.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    turned = RoPE(4 * built_for, 4, built_for, 64).rotate(q, k, positions)
    assert max(map(relative_error, turned, expected)) < 1e-6


def test_rope_takes_positions_per_row_and_its_own_theta():
    q, positions = torch.randn(2, 9, 4, 8), torch.stack((torch.arange(9), torch.arange(40, 49)))
    config = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected = llama.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)[0]
    assert relative_error(RoPE(32, 4, 8, 64, theta=500_000.0).rotate(q, q, positions)[0], expected) < 1e-6


def test_rope_scores_depend_on_the_distance_alone():
    rope, q, k = RoPE(32, 4, 8, 1024), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)

    def score(i, j):
        return (rope.rotate(q, q, torch.tensor([[i]]))[0] * rope.rotate(k, k, torch.tensor([[j]]))[0]).sum(-1)

    for shift in (1, 100, 1000):
        assert relative_error(score(20 + shift, 3 + shift), score(20, 3)) < 1e-4
    assert relative_error(score(20, 3), score(20, 4)) > 1e-2


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
def test_alibi_equals_bloom_and_the_paper(n_head):
    alibi, at = ALiBi(32, n_head, 8, 64), torch.arange(64)
    assert relative_error(alibi.slopes, paper_slopes(n_head)) < 1e-6
    bias = alibi.score_bias(at, at)
    assert relative_error(bias[:, 40, 15], [-slope * 25 for slope in paper_slopes(n_head)]) < 1e-6
    theirs = build_alibi_tensor(torch.ones(1, 64), n_head, torch.float32)  # (H, 1, S): equal up to a constant a row
    assert relative_error(bias - bias[..., :1], (theirs - theirs[..., :1]).expand_as(bias)) < 1e-6


def test_sinusoidal_equals_the_formula():
    table = Sinusoidal(16, 4, 4, 1024, scale=1.0).embed(torch.zeros(1, 1024, 16), torch.arange(1024)[None])[0]
    expected = torch.zeros(1024, 16, dtype=torch.float64)
    for position in range(1024):
        for i in range(8):
            angle = position / 10_000 ** (2 * i / 16)
            expected[position, i], expected[position, 8 + i] = math.sin(angle), math.cos(angle)
    assert relative_error(table, expected) < 1e-4  # angles of up to 1023 in float32
    assert torch.equal(Sinusoidal(16, 4, 4, 1024).table, 0.02 * table)
