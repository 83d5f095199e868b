"""Optimizers against references that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from torch import nn

from components.optimizer import SGD, AdamW
from parity.reference import relative_error


def steps(model, optimizer, count=5):
    ids = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        hidden, head = model(ids[:, :-1])
        F.cross_entropy(head.logits(hidden).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.state_dict()


def hand_made_groups(model, weight_decay):
    """Everything with two dimensions decays, but the token table, which the test exempts by its name."""
    named = list(model.named_parameters())
    decay = [p for name, p in named if p.ndim >= 2 and name != "embed.weight"]
    no_decay = [p for name, p in named if p.ndim < 2 or name == "embed.weight"]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def test_adamw_equals_torch_over_hand_made_groups():
    ours, theirs = tiny_gpt(), tiny_gpt()
    adamw = AdamW(ours, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5, no_decay=("embed.*",))
    torchs = torch.optim.AdamW(hand_made_groups(theirs, 0.5), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    mine, yours = steps(ours, adamw), steps(theirs, torchs)
    assert max(relative_error(mine[name], yours[name]) for name in yours) < 1e-4


def test_adamw_equals_the_formula():
    layer, lr, b1, b2, eps, decay = nn.Linear(8, 8, bias=False), 1e-2, 0.9, 0.95, 1e-8, 0.1
    optimizer, w = AdamW(layer, lr=lr), layer.weight.detach().double().clone()
    m = v = torch.zeros(8, 8)
    for t in range(1, 6):
        gradient = torch.randn(8, 8, dtype=torch.float64)
        layer.weight.grad = gradient.float()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        w = w * (1 - lr * decay) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    assert relative_error(layer.weight, w) < 1e-6


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch_over_hand_made_groups(nesterov):
    ours, theirs = tiny_gpt(), tiny_gpt()
    sgd = SGD(ours, lr=1e-2, momentum=0.8, nesterov=nesterov, weight_decay=0.5, no_decay=("embed.*",))
    torchs = torch.optim.SGD(hand_made_groups(theirs, 0.5), lr=1e-2, momentum=0.8, nesterov=nesterov, foreach=False)
    mine, yours = steps(ours, sgd), steps(theirs, torchs)
    assert max(relative_error(mine[name], yours[name]) for name in yours) < 1e-5
