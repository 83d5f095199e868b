"""The documented model against references that are not ours."""

import math

import pytest
import torch
from conftest import tiny_gpt

from components.attention import SDPA
from components.init import GPT2Init
from components.loss import ChunkedCrossEntropy


@pytest.mark.parametrize("vocab_size, expected", [(100_277, 161_985_792), (50_257, 123_570_432)])
def test_the_documented_model_has_the_documented_parameters(vocab_size, expected):
    with torch.device("meta"):
        model = tiny_gpt(vocab_size, 1024, dim=768, n_layer=12, n_head=12, pad_vocab_to=128, init=GPT2Init)
    assert sum(p.numel() for p in model.parameters()) - model.padding == expected


def test_the_loss_at_step_0_is_what_the_init_implies():
    """Hidden states of norm sqrt(768) and rows of std 0.02 give logits of variance 768 * 0.02^2: ln V plus half of it.
    One layer shows it as twelve do, since residual projections shrink with the depth."""
    model = tiny_gpt(100_277, 64, dim=768, n_layer=1, n_head=12, pad_vocab_to=128, attention=SDPA, init=GPT2Init)
    ids = torch.randint(100_277, (4, 65))
    with torch.no_grad():
        hidden, head = model(ids[:, :-1])
        _, nats, count = ChunkedCrossEntropy()(hidden.flatten(0, 1), head, ids[:, 1:].flatten())
    assert (nats / count).item() == pytest.approx(11.67, abs=0.1)
    assert (nats / count).item() == pytest.approx(math.log(100_277) + 0.02**2 * 768 / 2, abs=0.1)
