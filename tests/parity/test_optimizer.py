"""Optimizers against references that are not ours."""

import pytest
import pytorch_optimizer
import schedulefree
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from torch import nn

from components.optimizer import SGD, SOAP, Adafactor, Adam, AdamW, Lion, Muon, ScheduleFreeAdamW


def steps(model, optimizer, count=5):
    """The weights after some steps of language modelling."""
    ids = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        hidden, head = model(ids[:, :-1])
        F.cross_entropy(head.logits(hidden).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return tuple(p.detach() for p in model.parameters())


def hand_made_groups(model, weight_decay):
    """Everything with two dimensions decays, but the token table, which the test exempts by its name."""
    named = list(model.named_parameters())
    decay = [p for name, p in named if p.ndim >= 2 and name != "embed.weight"]
    no_decay = [p for name, p in named if p.ndim < 2 or name == "embed.weight"]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


NO_TABLE = dict(weight_decay=0.5, no_decay=("embed.*",))
PLAIN = dict(foreach=False)
AGAINST_TORCH = [
    (AdamW, torch.optim.AdamW, dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6), PLAIN, 1e-4),
    (Adam, torch.optim.Adam, dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6), PLAIN, 1e-4),
    (SGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.8), PLAIN, 1e-5),
    (SGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.8, nesterov=True), PLAIN, 1e-5),
    (Adafactor, torch.optim.Adafactor, dict(lr=1e-2, beta2_decay=-0.5, eps=(1e-6, 1e-2)), PLAIN, 1e-5),
    (Lion, pytorch_optimizer.Lion, dict(lr=1e-3, betas=(0.8, 0.9)), PLAIN, 1e-5),
    (ScheduleFreeAdamW, schedulefree.AdamWScheduleFree, dict(lr=1e-2, betas=(0.8, 0.9)), PLAIN, 1e-4),
]


@pytest.mark.parametrize("cls, reference, knobs, plain, tolerance", AGAINST_TORCH)
def test_an_optimizer_equals_its_library_over_hand_made_groups(cls, reference, knobs, plain, tolerance, parity):
    ours, theirs = tiny_gpt(), tiny_gpt()
    other = reference(hand_made_groups(theirs, 0.5), **knobs, **plain)
    if hasattr(other, "train"):
        other.train()
    name = f"{reference.__module__.split('.')[0]}'s {reference.__name__} over hand-made groups"
    parity(cls.__name__, name, steps(ours, cls(ours, **knobs, **NO_TABLE)), steps(theirs, other), tolerance)


def follow(cls, update, parity, shape=(8, 6), count=6, **knobs):
    """One matrix under random gradients, beside ``update(w, gradient, t, memory) -> w`` in float64."""
    layer = nn.Linear(*reversed(shape), bias=False)
    optimizer, w, memory = cls(layer, **knobs), layer.weight.detach().double().clone(), {}
    for t in range(1, count + 1):
        gradient = torch.randn(shape)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        w = update(w, gradient.double(), t, memory)
    parity(cls.__name__, "the published formula in float64", layer.weight, w, 1e-6)
    return layer, optimizer, memory


def moments(gradient, t, memory, b1, b2):
    """Adam's mean and root mean square, both without their bias."""
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * gradient
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * gradient**2
    return memory["m"] / (1 - b1**t), (memory["v"] / (1 - b2**t)).sqrt()


def test_adamw_equals_the_formula(parity):
    def update(w, gradient, t, memory):
        mean, root = moments(gradient, t, memory, 0.9, 0.95)
        return w * (1 - 1e-2 * 0.1) - 1e-2 * mean / (root + 1e-8)

    follow(AdamW, update, parity, lr=1e-2)


def test_adam_equals_the_formula(parity):
    def update(w, gradient, t, memory):
        mean, root = moments(gradient + 0.3 * w, t, memory, 0.9, 0.95)
        return w - 1e-2 * mean / (root + 1e-8)

    follow(Adam, update, parity, lr=1e-2, weight_decay=0.3)


def test_lion_equals_the_formula(parity):
    def update(w, gradient, t, memory):
        m = memory.get("m", torch.zeros_like(gradient))
        direction = torch.sign(0.9 * m + 0.1 * gradient)
        memory["m"] = 0.99 * m + 0.01 * gradient
        return w - 1e-2 * (direction + 0.3 * w)

    follow(Lion, update, parity, lr=1e-2, weight_decay=0.3)


def test_adafactor_equals_the_formula(parity):
    def update(w, gradient, t, memory):
        keep, size = 1 - t**-0.8, 48**0.5
        memory["rows"] = keep * memory.get("rows", 0.0) + (1 - keep) * (gradient**2).mean(1)
        memory["columns"] = keep * memory.get("columns", 0.0) + (1 - keep) * (gradient**2).mean(0)
        v = torch.outer(memory["rows"], memory["columns"]) / memory["rows"].mean()
        move = gradient / v.sqrt()
        move = move / max(1.0, (move.norm() / size).item())
        return w * (1 - 0.3 * 0.2) - max(1e-3, (w.norm() / size).item()) * min(0.3, t**-0.5) * move

    follow(Adafactor, update, parity, lr=0.3, weight_decay=0.2)


def test_schedule_free_equals_the_formula(parity):
    """The paper's three sequences: z by Adam's steps, x their mean, gradients and decay at y between the two."""

    def update(y, gradient, t, memory):
        z, x = memory.get("z", y), memory.get("x", y)
        memory["v"] = 0.95 * memory.get("v", 0.0) + 0.05 * gradient**2
        root = (memory["v"] / (1 - 0.95**t)).sqrt()
        memory["z"] = z - 1e-2 * (gradient / (root + 1e-8) + 0.1 * y)
        memory["x"] = (1 - 1 / t) * x + memory["z"] / t
        return 0.1 * memory["z"] + 0.9 * memory["x"]

    layer, optimizer, memory = follow(ScheduleFreeAdamW, update, parity, lr=1e-2)
    optimizer.eval()
    parity("ScheduleFreeAdamW", "the mean of the iterates, to evaluate with", layer.weight, memory["x"], 1e-6)


# --- Muon


def merged_model():
    """A tiny GPT, untied, whose merged layers say so."""
    model = tiny_gpt(tie_embeddings=False, n_kv_head=2)
    for block in model.blocks:
        block.mixer.qkv.merged = {"q": 32, "k": 16, "v": 16}
        half = block.ffn.gate_up.weight.shape[0] // 2
        block.ffn.gate_up.merged = {"gate": half, "up": half}
    return model


class Pair:
    """torch.optim.Muon on matrices that are parameters of their own, torch.optim.AdamW on the rest."""

    def __init__(self, model, muon, adamw):
        self.pieces, rest = [], []
        for name, p in model.named_parameters():
            rows = {"qkv": [32, 16, 16], "gate_up": [p.shape[0] // 2] * 2}.get(name.split(".")[-2], [p.shape[0]])
            if name.startswith("blocks.") and p.ndim == 2:
                self.pieces.append((p, [nn.Parameter(part.clone()) for part in p.detach().split(rows)]))
            else:
                rest.append(p)
        decay, none = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": muon["weight_decay"]}, {"params": none, "weight_decay": 0.0}]
        self.muon = torch.optim.Muon([part for _, parts in self.pieces for part in parts], **muon)
        self.adamw = torch.optim.AdamW(groups, foreach=False, **adamw)

    def step(self):
        for p, parts in self.pieces:
            for part, gradient in zip(parts, p.grad.split([len(part) for part in parts]), strict=True):
                part.grad = gradient.clone()
        self.muon.step()
        self.adamw.step()
        with torch.no_grad():
            for p, parts in self.pieces:
                p.copy_(torch.cat(parts))


@pytest.mark.parametrize("nesterov, adjust", [(True, "match_rms_adamw"), (False, "original")])
def test_muon_equals_torch_on_each_merged_matrix_and_adamw_on_the_rest(nesterov, adjust, parity):
    ours, theirs = merged_model(), merged_model()
    knobs = dict(momentum=0.8, nesterov=nesterov, ns_steps=4, adjust_lr_fn=adjust, weight_decay=0.5)
    muon = Muon(ours, lr=1e-2, adamw_lr=3e-3, adamw_betas=(0.8, 0.9), adamw_eps=1e-6, **knobs)
    pair = Pair(theirs, dict(lr=1e-2, **knobs), dict(lr=3e-3, betas=(0.8, 0.9), eps=1e-6))
    for _ in range(5):  # the same gradients: in 16 bits the orthogonalisation would make much of a last digit
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        muon.step()
        pair.step()
    name = "torch's Muon for each merged matrix, its AdamW for the rest"
    parity("Muon", name, tuple(ours.parameters()), tuple(theirs.parameters()), 1e-5)


def test_muon_moves_each_merged_matrix_near_the_orthogonal_factor_of_its_own_gradient(parity):
    """Newton-Schulz leaves singular values between about 0.7 and 1.2; the singular vectors are the gradient's."""
    layer = nn.Linear(16, 40, bias=False)
    layer.merged = {"q": 16, "k": 8, "v": 16}
    before, layer.weight.grad = layer.weight.detach().clone(), torch.randn(40, 16)
    Muon(layer, lr=1.0, weight_decay=0.0).step()
    moved = (before - layer.weight.detach()) / (0.2 * 16**0.5)
    for update, gradient in zip(moved.split([16, 8, 16]), layer.weight.grad.split([16, 8, 16]), strict=True):
        u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
        parity("Muon", "U V^T by torch.linalg.svd, of each merged matrix", update, u @ vh, 0.4)
        singular = torch.linalg.svdvals(update)
        assert 0.5 < singular.min() and singular.max() < 1.3 < s.max()
        assert (u.T @ update @ vh.T).diagonal().min() > 0.5  # along the gradient's own directions


# --- SOAP


@pytest.mark.parametrize("longest", [10_000, 7])
def test_soap_equals_pytorch_optimizer(longest, parity):
    """Gradients of full rank: in a null space both divide rounding by rounding."""
    ours, theirs = (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    knobs = dict(lr=1e-2, betas=(0.9, 0.95), shampoo_beta=0.8, eps=1e-8, max_precondition_dim=longest)
    soap = SOAP(ours, weight_decay=0.5, precondition_frequency=3, **knobs)
    groups = [{"params": [p for p in theirs.parameters() if (p.ndim >= 2) == d]} for d in (True, False)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.5, 0.0
    reference = pytorch_optimizer.SOAP(groups, precondition_frequency=3, **knobs)
    for _ in range(20):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape) @ torch.diag(torch.arange(1.0, one.shape[-1] + 1))
            other.grad = one.grad.clone()
        soap.step()
        reference.step()
    parity("SOAP", "pytorch_optimizer.SOAP", tuple(ours.parameters()), tuple(theirs.parameters()), 1e-4)
