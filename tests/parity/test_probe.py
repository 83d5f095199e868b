"""The probes of the shelf against plain computations with numpy, over modules that are called by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_gpt
from torch import nn

from components.attention import SDPA
from components.ffn import GELU, ReLU, SwiGLU
from components.loss import CrossEntropy
from components.optimizer import AdamW
from components.probe import Activations, AttentionEntropy, DeadUnits, EffectiveRank, LogitScale, Updates
from toolkit.objective import Objective
from toolkit.probing import prober

SLOTS = {"default": {}, "grouped": {"attention": SDPA, "n_kv_head": 2, "n_layer": 3}, "relu": {"ffn": ReLU}}


@pytest.fixture(params=SLOTS.values(), ids=SLOTS)
def scene(request):
    """A model after one step of AdamW, a copy of the model before it, and a batch that is not the step's."""
    model = tiny_gpt(**request.param)
    for block in model.blocks:
        for norm in (block.mixer_norm, block.ffn_norm):
            nn.init.normal_(norm.weight, 1.0, 0.5)
            nn.init.normal_(norm.bias)
    objective, ids = Objective(model, CrossEntropy()), torch.randint(50, (4, 3, 25))
    before, batch = copy.deepcopy(model), (ids[0, :2, :-1], ids[0, :2, 1:])
    optimizer, copied = AdamW(model, lr=1e-2), prober.copy_of(objective)
    prober.fill(copied, objective)
    objective(ids[1, :, :-1], ids[1, :, 1:])[0].backward()
    optimizer.step()
    optimizer.zero_grad()

    def observe(probe):
        """The values of a probe: numbers, and arrays."""
        seen = prober.observe({"it": probe}, copied, objective, batch, lambda: torch.autocast("cpu", enabled=False))
        assert not seen.left_out
        return {name.removeprefix("probe/it/"): value for name, value in (seen.row | seen.distributions).items()}

    return observe, before, model, batch


def by_hand(model, ids):
    """The outputs of blocks, mixers and ffns, the inputs of down and attention, and the logits, in float64 arrays: each
    module of a pre-norm GPT is called by hand."""
    from toolkit.context import Context

    context, outputs, hidden, queries = Context(), {}, {}, {}
    model(ids, context)  # fills positions and bias
    x = model.embed(ids)
    for index, block in enumerate(model.blocks):
        name, mixer = f"blocks.{index}", block.mixer
        normed = block.mixer_norm(x)
        sizes = [rows // mixer.head_dim for rows in mixer.qkv.merged.values()]
        q, k, _ = mixer.qkv(normed).unflatten(2, (-1, mixer.head_dim)).split(sizes, dim=2)
        queries[f"{name}.mixer.attention"] = model.positions[0].rotate(q, k, context.positions)
        mixed = mixer(normed, context)
        x, normed = x + mixed, block.ffn_norm(x + mixed)
        ffn = block.ffn
        if isinstance(ffn, SwiGLU):
            gate, up = ffn.gate_up.each(normed)
            hidden[f"{name}.ffn.down"] = gate * gate.sigmoid() * up
        else:
            hidden[f"{name}.ffn.down"] = ffn.up(normed).clamp_min(0)
        out = ffn.down(hidden[f"{name}.ffn.down"])
        x = x + out
        outputs |= {name: x, f"{name}.mixer": mixed, f"{name}.ffn": out}
    logits = (model.norm(x) @ model.embed.weight.T)[..., :50]
    to_numpy = {name: value.detach().double().numpy() for name, value in outputs.items()}
    return to_numpy, hidden, queries, logits


def table(parity, part, reference, ours, theirs, tolerance=2e-6):
    """Compare two dicts of numbers, statistic by statistic."""
    assert ours.keys() == theirs.keys()
    for statistic in {name.partition("/")[0] for name in ours}:
        names = [name for name in ours if name.partition("/")[0] == statistic]
        one, other = (torch.tensor([float(values[name]) for name in names]).double() for values in (ours, theirs))
        parity(part, f"{reference}: {statistic}", one, other, tolerance)


def test_activations(scene, parity):
    observe, before, _, (ids, _) = scene
    expected = {}
    for name, x in by_hand(before, ids)[0].items():
        expected[f"rms/{name}"] = np.sqrt(np.mean(x**2))
        expected[f"largest/{name}"] = np.max(np.abs(x))
        expected[f"kurtosis/{name}"] = np.mean((x - x.mean()) ** 4) / np.var(x) ** 2
    table(parity, "Activations", "numpy", observe(Activations()), expected)


def test_updates(scene, parity):
    observe, before, after, (ids, targets) = scene
    loss = nn.functional.cross_entropy(by_hand(before, ids)[3].flatten(0, 1), targets.flatten())
    parameters = dict(before.named_parameters())
    gradients = torch.autograd.grad(loss, parameters.values())
    expected = {f"gradient_norm/{n}": np.linalg.norm(g) for n, g in zip(parameters, gradients, strict=True)}
    for (name, one), other in zip(parameters.items(), after.parameters(), strict=True):
        one, other = (each.detach().double().numpy() for each in (one, other))
        if np.any(one):
            expected[f"update_ratio/{name}"] = np.sqrt(np.sum((other - one) ** 2)) / np.sqrt(np.sum(one**2))
    assert any(np.any(value != 1) for name, value in expected.items() if name.startswith("update_ratio"))
    table(parity, "Updates", "numpy", observe(Updates()), expected, 1e-5)


def test_attention_entropy(scene, parity):
    observe, before, _, (ids, _) = scene
    expected, heads = {}, {}
    for name, (q, k) in by_hand(before, ids)[2].items():
        q, k = (x.detach().double().numpy() for x in (q, k))
        share, entropies = q.shape[2] // k.shape[2], np.zeros(q.shape[:3])
        for b, t, h in np.ndindex(*q.shape[:3]):
            scores = np.exp(k[b, : t + 1, h // share] @ q[b, t, h] / math.sqrt(q.shape[3]))
            weights = scores / scores.sum()
            entropies[b, t, h] = -np.sum(weights * np.log(weights))
        expected[f"entropy_nats/{name}"] = entropies.mean()
        heads[f"head_entropy_nats/{name}"] = entropies.mean((0, 1))
    found = observe(AttentionEntropy())
    assert found.keys() == expected.keys() | heads.keys()
    table(parity, "AttentionEntropy", "a loop over queries", {name: found[name] for name in expected}, expected)
    for name, theirs in heads.items():
        parity("AttentionEntropy", "a loop over queries: head_entropy_nats", found[name], theirs, 2e-6)


def test_dead_units(scene, parity):
    observe, before, _, (ids, _) = scene
    for threshold in (0.0, 0.1, 0.7):
        expected = {}
        for name, units in by_hand(before, ids)[1].items():
            units = units.detach().numpy().reshape(-1, units.shape[-1])
            limit = threshold * np.sqrt(np.mean(units.astype(np.float64) ** 2))
            dead = [all(abs(value) <= limit for value in units[:, unit]) for unit in range(units.shape[1])]
            expected[f"dead_share/{name}"] = sum(dead) / len(dead)
        found = observe(DeadUnits(threshold))
        assert found == pytest.approx(expected)
        if threshold == 0.7:
            assert 0 < min(expected.values()) and max(expected.values()) < 1
            table(parity, "DeadUnits", "a loop over units", found, expected)


def test_effective_rank(scene, parity):
    observe, before, _, (ids, _) = scene
    outputs = {name: x for name, x in by_hand(before, ids)[0].items() if name.count(".") == 1}
    for tokens, step in ((1000, 1), (48, 1), (20, 3)):  # 48 tokens, at most so many
        expected = {}
        for name, x in outputs.items():
            singular = np.linalg.svd(x.reshape(48, -1)[::step], compute_uv=False)
            p = singular / singular.sum()
            expected[f"rank/{name}"] = np.exp(-np.sum(p * np.log(p)))
        table(parity, "EffectiveRank", "numpy's svd", observe(EffectiveRank(tokens)), expected)


def test_the_effective_rank_of_known_matrices():
    """r equal singular values have rank r; of one direction, rank 1 (Roy & Vetterli 2007, properties 1 and 2)."""
    q, _ = torch.linalg.qr(torch.randn(40, 12, dtype=torch.float64))
    for rank in (1, 5, 12):
        assert EffectiveRank.effective_rank(3 * q[:, :rank] @ torch.eye(12).double()[:rank]).item() == pytest.approx(
            rank, rel=1e-4
        )
    assert EffectiveRank.effective_rank(torch.ones(7, 3).double()).item() == pytest.approx(1, rel=1e-4)


def test_logit_scale(scene, parity):
    observe, before, _, (ids, _) = scene
    logits = by_hand(before, ids)[3].detach().double().numpy()
    expected = {
        "rms": np.sqrt(np.mean(logits**2)),
        "largest": np.max(np.abs(logits)),
        "log_z_nats": np.mean(np.log(np.sum(np.exp(logits), axis=-1))),
    }
    table(parity, "LogitScale", "numpy", observe(LogitScale()), expected)


def test_dead_units_of_an_ffn_with_known_dead_units():
    """Five units of a ReLU network never pass zero; in a GELU network they are small, not zero."""
    for ffn, threshold, dead in ((ReLU, 0.0, 5), (GELU, 0.0, 0), (GELU, 0.01, 5), (SwiGLU, 0.01, 0)):
        model = tiny_gpt(ffn=ffn, n_layer=1)
        if ffn is not SwiGLU:
            model.blocks[0].ffn.up = nn.Linear(32, model.blocks[0].ffn.up.out_features)
            nn.init.constant_(model.blocks[0].ffn.up.bias[:5], -60.0) if ffn is ReLU else None
            with torch.no_grad():
                model.blocks[0].ffn.up.bias[:5] = -60.0 if ffn is ReLU else -4.6
                model.blocks[0].ffn.up.weight[:5] *= 0.01
        objective, ids = Objective(model, CrossEntropy()), torch.randint(50, (2, 2, 20))
        precision = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
        found = prober.observe({"it": DeadUnits(threshold)}, objective, objective, (ids[0], ids[1]), precision)
        units = model.blocks[0].ffn.down.in_features
        assert found.row["probe/it/dead_share/blocks.0.ffn.down"] == pytest.approx(dead / units)
