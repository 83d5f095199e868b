"""Attention weights seen from outside: equal to the softmax where there is one, None where there is no weighted sum."""

import pytest
import torch
from conftest import tiny_gpt
from torch import nn

from toolkit import attention_weights
from toolkit.compose import load_shelf
from toolkit.registry import CATALOG

load_shelf()
KERNELS = [entry.name for entry in CATALOG.values() if entry.kind == "attention"]


def random_qkv(groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, 2, 16), (2, 7, groups, 16), (2, 7, groups, 16)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("name", ["MathAttention", "SDPA", "FlashAttention", "FlexAttention"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_softmax_kernel_gives_its_softmax(name, groups):
    q, k, v = random_qkv(groups)
    keys = k.repeat_interleave(2 // groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / 4
    expected = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    weighted = attention_weights.weights(CATALOG[name].cls(2, 16), q, k, v)
    assert torch.allclose(weighted, expected, atol=1e-5)
    assert attention_weights.is_distribution(weighted)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_of_the_shelf_gives_causal_weights(name):
    q, k, v = random_qkv()
    weighted = attention_weights.weights(CATALOG[name].cls(2, 16), q, k, v)
    assert weighted.shape == (2, 2, 7, 7)
    assert weighted.triu(1).abs().max() < 1e-6


class Squares(nn.Module):
    """Not a weighted sum of its values."""

    def forward(self, q, k, v, mask=None):
        return (v**2).cumsum(1)


class Halves(nn.Module):
    """A weighted sum whose weights do not sum to 1."""

    def forward(self, q, k, v, mask=None):
        return v / 2


def test_what_is_no_softmax_is_told_apart():
    q, k, v = random_qkv()
    assert attention_weights.weights(Squares(), q, k, v) is None
    halves = attention_weights.weights(Halves(), q, k, v)
    assert torch.allclose(halves, torch.eye(7).expand(2, 2, 7, 7) / 2)
    assert not attention_weights.is_distribution(halves)


@pytest.mark.parametrize(("mixer", "calls"), [("SelfAttention", 1), ("DifferentialAttention", 2)])
def test_the_weights_of_a_model_are_recorded_and_change_nothing(mixer, calls):
    model = tiny_gpt(mixer=CATALOG[mixer].cls)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        hidden = model(ids)[0]
        with attention_weights.recorded(model) as found:
            again = model(ids)[0]
            assert len(found) == calls * len(model.mixers)
            model(ids[:, :5])
    assert torch.equal(hidden, again)
    assert all(each.shape[-2:] == (5, 5) and attention_weights.is_distribution(each) for each in found.values())
    assert not any(module._forward_pre_hooks for module in model.modules())
