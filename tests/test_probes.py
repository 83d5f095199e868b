"""Probes: what they see, what a run records of them, and that they change nothing in training."""

import copy
import math
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gpt
from runs import arguments, assert_equal, assert_exact, command, facts, rows, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from components.attention import SDPA, FlashAttention
from components.block import HyperConnections, Parallel
from components.ffn import GELU, MixtureOfExperts
from components.loss import ChunkedCrossEntropy, CrossEntropy
from components.mixer import DifferentialAttention, GatedLinearRecurrence, LatentAttention, SelfAttention
from toolkit import run
from toolkit.compose import compose
from toolkit.conformance.purity import generator_states, is_same, state_of
from toolkit.cpu import switch
from toolkit.experiment import build
from toolkit.model import Head
from toolkit.objective import Objective
from toolkit.probing import prober
from toolkit.probing.capture import FORWARD, capture
from toolkit.probing.places import places
from toolkit.probing.views import NEEDS, Views
from toolkit.registry import CATALOG
from toolkit.store.journal import Journal

ROOT = Path(__file__).parent.parent
ALL = ("gin/probe/all.gin",)
EVERY = ("Experiment.probe_every = 5",)


def without_probes(found):
    """Rows without the metrics of probes; a row of these alone is left out."""
    kept = [{name: value for name, value in row.items() if not name.startswith("probe/")} for row in found]
    return [row for row in kept if row.keys() != {"step"}]


def probe_rows(folder):
    """{step: metrics of probes}."""
    return {
        row["step"]: {n: v for n, v in row.items() if n.startswith("probe/")}
        for row in rows(folder)
        if any(name.startswith("probe/") for name in row)
    }


def state(folder, step):
    """Everything that a checkpoint holds of the training, but for the digest of the config."""
    saved = torch.load(folder / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)
    weights = (folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()
    return weights, {name: value for name, value in saved.items() if name != "progress"}


def assert_same_training(plain, probed, step=12):
    (weights, saved), (other_weights, other_saved) = state(plain, step), state(probed, step)
    assert without_probes(rows(probed)) == rows(plain) and weights == other_weights
    assert_equal(saved, other_saved)
    assert (plain / "samples.md").read_text() == (probed / "samples.md").read_text()


def both(tmp_path, *bindings, overlays=(), **options):
    """The same run without and with all probes."""
    assert small_run(tmp_path, "plain", bindings=bindings, overlays=overlays, **options) == 0
    assert small_run(tmp_path, "probed", bindings=(*bindings, *EVERY), overlays=(*overlays, *ALL), **options) == 0
    return tmp_path / "plain", tmp_path / "probed"


SCHEDULE_FREE = ("gin/optimizer/schedule_free.gin",)
WAYS = {
    "plain": (),
    "dropout": ("GPT.dropout = 0.2",),
    "accumulate": ("Experiment.accumulate = 2", "GPT.dropout = 0.2"),
    "bfloat16": ("Experiment.precision = 'bfloat16'",),
    "documents": ("Experiment.mask_documents = True", "GPT.attention = @SDPA"),
    "spikes": ("Experiment.spike_sigmas = 6.0",),
    "untied": ("GPT.tie_embeddings = False", "GPT.recompute = True"),
}


# --- training


@pytest.mark.parametrize("way", WAYS)
def test_probes_change_nothing_in_training(way, tmp_path):
    plain, probed = both(tmp_path, *WAYS[way])
    assert_same_training(plain, probed)
    assert sorted(probe_rows(probed)) == [0, 5, 10, 11]
    assert facts(probed)["probes"][0] == "Activations" and facts(plain)["probes"] == []


def test_probes_change_nothing_for_an_optimizer_that_swaps_weights(tmp_path):
    plain, probed = both(tmp_path, overlays=SCHEDULE_FREE)
    assert_same_training(plain, probed)


@pytest.mark.slow
def test_probes_change_nothing_in_compiled_training(tmp_path):
    compilations = {}
    for name, overlays, more in (("plain", (), ()), ("probed", ALL, EVERY)):
        bindings = ("Experiment.compile = True", "GPT.dropout = 0.2", *more)
        words = arguments(tmp_path, name, overlays=overlays, bindings=bindings)
        done = command("toolkit.run", *words, TORCH_LOGS="recompiles")
        assert done.returncode == 0, done.stderr
        compilations[name] = done.stderr.count("Recompiling function")
    assert compilations["plain"] == compilations["probed"] == 1  # once without gradients, to evaluate
    assert facts(tmp_path / "probed")["compiled"]
    assert_same_training(tmp_path / "plain", tmp_path / "probed")
    assert small_run(tmp_path, "eager", bindings=("GPT.dropout = 0.2", *EVERY), overlays=ALL) == 0
    first, other = (probe_rows(tmp_path / name)[0] for name in ("probed", "eager"))
    same = [name for name in first if "update_ratio" not in name]
    assert {name: first[name] for name in same} == {name: other[name] for name in same}  # the copy is not compiled


@pytest.mark.slow
def test_two_processes_train_the_same_with_probes(tmp_path):
    two = ("Experiment.devices = 2", "GPT.dropout = 0.2", "Experiment.rank_timeout = 20")
    for name, overlays, more in (("plain", (), ()), ("probed", ALL, EVERY)):
        done = command("toolkit.run", *arguments(tmp_path, name, overlays=overlays, bindings=(*two, *more)))
        assert done.returncode == 0, done.stderr
    assert facts(tmp_path / "probed")["processes"] == 2
    assert_same_training(tmp_path / "plain", tmp_path / "probed")
    assert sorted(probe_rows(tmp_path / "probed")) == [0, 5, 10, 11]


@pytest.mark.parametrize("overlays", [ALL, (*ALL, *SCHEDULE_FREE)], ids=["AdamW", "ScheduleFree"])
def test_a_resumed_run_observes_the_same(overlays, tmp_path):
    """Stopped before, at and after a step that is observed."""
    bindings = (*EVERY, "GPT.dropout = 0.2")
    assert small_run(tmp_path, "straight", overlays=overlays, bindings=bindings) == 0
    resume = ()
    for stop in (5, 6, 10):
        assert small_run(tmp_path, "broken", *resume, "--stop-at", str(stop), overlays=overlays, bindings=bindings) == 0
        resume = ("--resume",)
    assert small_run(tmp_path, "broken", *resume, overlays=overlays, bindings=bindings) == 0
    assert_exact(tmp_path / "straight", tmp_path / "broken", 12)
    assert sorted(probe_rows(tmp_path / "straight")) == [0, 5, 10, 11]
    for folder in ("straight", "broken"):
        shown = EventAccumulator(str(tmp_path / folder), size_guidance={"histograms": 0}).Reload()
        names = shown.Tags()["histograms"]
        assert names[0] == "probe/AttentionEntropy/head_entropy_nats/blocks.0.mixer.attention"
        assert [event.step for event in shown.Histograms(names[0])] == [0, 5, 10, 11]


def test_probes_may_be_added_to_a_run_and_taken_away(tmp_path):
    assert small_run(tmp_path, "one", "--stop-at", "4") == 0
    assert small_run(tmp_path, "one", "--resume", "--allow-change", overlays=ALL, bindings=EVERY) == 0
    assert sorted(probe_rows(tmp_path / "one")) == [5, 10, 11]
    assert small_run(tmp_path, "plain") == 0
    assert without_probes(rows(tmp_path / "one")) == rows(tmp_path / "plain")


def test_a_run_without_the_slots_goes_on(tmp_path):
    """Its config is of a version without probes."""
    assert small_run(tmp_path, "old", "--stop-at", "4") == 0
    lines = (tmp_path / "old" / "config.gin").read_text().splitlines(keepends=True)
    old = [line for line in lines if "probe" not in line and not line.startswith("# seal")]
    assert len(old) <= len(lines) - 2
    (tmp_path / "old.gin").write_text("".join(old))
    base = ["--base", str(tmp_path / "old.gin"), "--runs", str(tmp_path), "--resume", "--name", "old"]
    assert run.main(base) == 0
    assert small_run(tmp_path, "plain") == 0
    assert rows(tmp_path / "old") == rows(tmp_path / "plain")


def test_a_run_is_observed_without_dropout_and_before_its_update(tmp_path):
    """At step 0, two runs that differ only in dropout have the same weights, but not the same updates."""
    for dropout in ("0.0", "0.4"):
        small = ("Experiment.steps = 3", f"GPT.dropout = {dropout}", "Experiment.probe_every = 2")
        assert small_run(tmp_path, dropout, overlays=ALL, bindings=small) == 0
    one, other = (probe_rows(tmp_path / dropout) for dropout in ("0.0", "0.4"))
    same = [name for name in one[0] if "update_ratio" not in name]
    assert all(one[0][name] == other[0][name] for name in same) and len(same) < len(one[0])
    assert any(one[0][name] != other[0][name] for name in one[0])
    assert all(one[2][name] != other[2][name] for name in same if "rms" in name)


class Draws:
    """Draws random numbers, which a probe must not do."""

    needs = {"activations", "gradients", "attention", "logits", "updates"}

    def observe(self, views):
        return {"draw": torch.rand(())}


def test_observing_leaves_model_and_generator_as_they_were(tmp_path):
    """Even with a probe that draws, whose values then depend on seed and step alone."""
    experiment = compose(["gin/model/check.gin"], ["GPT.dropout = 0.2"])[0].build()
    parts = build(experiment, torch.device("cpu"))
    parts.data.prepare()
    parts.probes, values = {"Draws": Draws()}, []
    parts.model.register_buffer("count", torch.ones(3))
    for parameter in parts.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    prober_of_run, journal = prober.Prober(experiment, parts, torch.device("cpu")), Journal(tmp_path, [], 0)
    for step, seed in ((0, 1), (1, 1), (50, 1), (0, 2)):
        torch.manual_seed(seed)
        before = state_of(parts.model) | generator_states()
        prober_of_run.keep_weights(step)
        assert all(p.numel() == 0 for p in prober_of_run.copy.parameters()) == (step == 1)
        prober_of_run.observe(step, journal)
        after = state_of(parts.model) | generator_states()
        assert [name for name in before if not is_same(before[name], after[name])] == []
        values.append(journal.latest.get("probe/Draws/draw"))
        assert all(p.numel() == 0 and p.grad is None for p in prober_of_run.copy.parameters())
    journal.close()
    assert values[0] == values[1] == values[3] != values[2]  # step 1 is not observed


# --- what the views show


class Scales(nn.Module):
    """An ffn that changes its input and its output in place, and runs one module twice."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim)

    def forward(self, x, context):
        out = self.down(self.act(self.up(x)))
        out *= 2
        return self.down(out).add_(1)


MODELS = {
    "default": {},
    "flash": {"attention": FlashAttention, "n_kv_head": 2},
    "experts": {"ffn": MixtureOfExperts},
    "streams": {"block": HyperConnections},
    "parallel": {"block": Parallel, "ffn": GELU},
    "hybrid": {"mixer": [SelfAttention, GatedLinearRecurrence]},
    "differential": {"mixer": DifferentialAttention},
    "latent": {"mixer": LatentAttention},
    "in place": {"ffn": Scales},
    "untied": {"tie_embeddings": False, "dropout": 0.3},
}


def half(enabled=False):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def look(objective, batch, needs=NEEDS, precision=half, after=None):
    captured = capture(objective, *batch, set(needs), precision)
    return Views("it", set(needs), objective.model, after or objective.model, batch, captured, precision)


def naive(objective, batch, precision):
    """Outputs, inputs and gradients of every call of a module, by hooks that copy, on a model of its own."""
    objective = copy.deepcopy(objective)
    outputs, inputs, tensors, calls = {}, {}, {}, {}

    def enter(name, module, args):
        calls[name] = calls.get(name, 0) + 1
        if args and torch.is_tensor(args[0]) and args[0].is_floating_point():
            inputs[name if calls[name] == 1 else f"{name}#{calls[name]}"] = args[0].detach().clone()

    def leave(name, module, args, out):
        if torch.is_tensor(out):
            key = name if calls[name] == 1 else f"{name}#{calls[name]}"
            outputs[key] = out.detach().clone()
            tensors[key] = out.clone()  # of which nothing is changed in place
            return tensors[key].clone()
        return None

    for name, module in objective.model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *call, name=name: enter(name, *call))
            module.register_forward_hook(lambda *call, name=name: leave(name, *call))
    with precision():
        total, _, count, _ = objective(*batch)
    names = list(tensors)
    gradients = torch.autograd.grad(total / count, [tensors[n] for n in names], retain_graph=False, allow_unused=True)
    return outputs, inputs, {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("precision", [half, lambda: half(True)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cpu", ["fast", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_views_show_what_a_separate_copy_computes(model, cpu, precision, monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, cpu)
    loss = ChunkedCrossEntropy() if cpu == "fast" else CrossEntropy()
    objective = Objective(tiny_gpt(**MODELS[model]), loss).eval()
    ids = torch.randint(50, (2, 25))
    batch = ids[:, :-1], ids[:, 1:]
    views = look(objective, batch, precision=precision)
    outputs, inputs, gradients = naive(objective, batch, precision)
    assert views.activations.keys() == outputs.keys() and views.inputs.keys() == inputs.keys()
    assert all(torch.equal(views.activations[name], outputs[name]) for name in outputs)
    assert all(torch.equal(views.inputs[name], inputs[name]) for name in inputs)
    assert views.gradients.keys() == gradients.keys()
    for name, theirs in gradients.items():
        torch.testing.assert_close(views.gradients[name], theirs, rtol=2e-2 if precision is not half else 1e-4, atol=0)
    if model == "in place":
        assert {"blocks.0.ffn.down", "blocks.0.ffn.down#2"} <= outputs.keys()
    reference = copy.deepcopy(objective)
    reference.zero_grad()
    with precision():
        total, _, count, _ = reference(*batch)
    (total / count).backward()
    own = {name: p.grad for name, p in reference.model.named_parameters() if p.grad is not None}
    assert views.weight_gradients.keys() == own.keys()
    assert all(torch.equal(views.weight_gradients[name], own[name]) for name in own)
    with precision():
        hidden, head = reference.model(batch[0])
        assert torch.equal(views.logits, head.logits(hidden).float().detach())


def test_updates_are_what_the_step_has_added():
    before = Objective(tiny_gpt(), CrossEntropy())
    after = copy.deepcopy(before.model)
    with torch.no_grad():
        after.blocks[1].ffn.down.weight += 0.25
    ids = torch.randint(50, (1, 9))
    updates = look(before, (ids[:, :-1], ids[:, 1:]), {"updates"}, after=after).updates
    assert len(updates) == len(list(after.parameters())) and "blocks.0" not in updates
    assert updates["blocks.0.ffn.down.weight"].abs().max() == 0
    torch.testing.assert_close(updates["blocks.1.ffn.down.weight"], torch.full((32, 88), 0.25))


def test_nothing_runs_that_no_probe_needs(monkeypatch):
    objective, ran = Objective(tiny_gpt(), CrossEntropy()).eval(), []
    objective.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    ids = torch.randint(50, (1, 9))
    batch = ids[:, :-1], ids[:, 1:]
    for needs, passes in ((set(), []), ({"updates"}, []), ({"logits"}, [False]), ({"gradients"}, [True])):
        ran.clear()
        views = look(objective, batch, needs)
        assert ran == passes
        for view in NEEDS - needs:
            with pytest.raises(ValueError, match=re.escape(f"it reads views.{view} without asking for it: add")):
                getattr(views, view)
    assert all(p.grad is None for p in objective.parameters()) is False
    assert FORWARD < NEEDS


def test_attention_is_that_of_each_call():
    objective = Objective(tiny_gpt(mixer=[DifferentialAttention, SelfAttention]), CrossEntropy()).eval()
    ids = torch.randint(50, (2, 9))
    attention = look(objective, (ids[:, :-1], ids[:, 1:]), {"attention"}).attention
    names = ["blocks.0.mixer.attention", "blocks.0.mixer.attention#2", "blocks.1.mixer.attention"]
    assert list(attention) == names
    assert all(attention[name].shape == (2, 4, 8, 8) for name in names)


# --- blocks, mixers and ffns by name


class Plain(nn.Module):
    """A stranger's model: no part of it is registered."""

    def __init__(self, vocab_size, max_len):
        super().__init__()
        self.max_len, self.vocab_size = max_len, vocab_size
        self.table, self.small = nn.Embedding(vocab_size, 16), nn.ModuleList([nn.Linear(1, 1)])
        layer = lambda: nn.ModuleDict({"near": nn.Linear(16, 16), "act": nn.ReLU(), "wide": nn.Linear(16, 16)})  # noqa: E731
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, ids, context=None):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer["wide"](layer["act"](layer["near"](x)))
        return x, Head(self.table.weight, self.vocab_size, None)


def test_places_of_models():
    assert places(tiny_gpt(n_layer=1)) == {"blocks.0": "block", "blocks.0.mixer": "mixer", "blocks.0.ffn": "ffn"}
    assert places(tiny_gpt(n_layer=1, ffn=MixtureOfExperts)).keys() == places(tiny_gpt(n_layer=1)).keys()
    expected = {f"layers.{i}{name}": kind for i in (0, 1) for name, kind in
                {"": "block", ".near": "part", ".wide": "part"}.items()}  # fmt: skip
    assert places(Plain(50, 32)) == expected
    assert places(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == {"0": "block", "1": "block"}
    assert places(nn.Linear(2, 2)) == {}
    inner = nn.Sequential(nn.Embedding(5, 4), nn.ModuleList([SelfAttention(4, 2, 2, 0, SDPA, (0, 1)), nn.Linear(4, 4)]))
    mixed = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "mix": SelfAttention(4, 2, 2, 0, SDPA, (0, 1))})])
    assert places(mixed) == {"0": "block", "0.mix": "mixer", "0.norm": "part"}
    assert places(inner[1]) == {"0": "mixer", "1": "block"}
    assert places(inner) == {"0": "block", "1": "block", "1.0": "mixer", "1.1": "part"}


def test_a_strangers_model_gives_what_there_is_and_says_what_is_not(caplog):
    from components.probe import Activations, AttentionEntropy, DeadUnits

    objective = Objective(Plain(50, 32), CrossEntropy())
    ids = torch.randint(50, (1, 9))
    probes = {"Activations": Activations(), "AttentionEntropy": AttentionEntropy(), "DeadUnits": DeadUnits()}
    seen = prober.observe(probes, objective, objective, (ids[:, :-1], ids[:, 1:]), half)
    assert {name.partition("/layers")[0].rpartition("/")[2] for name in seen.row} == {"rms", "largest", "kurtosis"}
    assert "probe/Activations/rms/layers.1.wide" in seen.row
    assert seen.left_out["probe/DeadUnits/dead_share/layers.0.near"] == "does not apply to this model"


def test_what_does_not_apply_is_left_out_and_said_once(tmp_path, caplog):
    bindings = (*EVERY, "GPT.attention = [@SigmoidAttention, @SDPA]", "GPT.ffn = @MixtureOfExperts")
    assert small_run(tmp_path, "one", overlays=ALL, bindings=bindings) == 0
    names = probe_rows(tmp_path / "one")[5]
    assert not any("dead_share" in name or "entropy_nats/blocks.0" in name for name in names)
    assert "probe/AttentionEntropy/entropy_nats/blocks.1.mixer.attention" in names
    warnings = [record.getMessage() for record in caplog.records if "probe" in record.getMessage()]
    assert warnings == [
        "probe AttentionEntropy: entropy_nats/blocks.0.mixer.attention: does not apply to this model; it is left out",
        "probe DeadUnits: dead_share/blocks.0.ffn, dead_share/blocks.1.ffn: does not apply to this model; "
        "it is left out",
    ]


def test_a_probe_that_finds_nothing_says_so(tmp_path, caplog):
    bindings = (*EVERY, "GPT.mixer = @ShortConvolution")
    assert small_run(tmp_path, "one", overlays=("gin/probe/attention_entropy.gin",), bindings=bindings) == 0
    assert not probe_rows(tmp_path / "one")
    said = [record.getMessage() for record in caplog.records if "probe" in record.getMessage()]
    assert said == ["probe AttentionEntropy: measures nothing: finds nothing to look at in GPT; it is left out"]


# --- what a probe may return


class Says:
    needs = {"activations"}

    def __init__(self, values):
        self.values = values

    def observe(self, views):
        return self.values


def observed(values):
    objective = Objective(tiny_gpt(), CrossEntropy())
    ids = torch.randint(50, (1, 9))
    return prober.observe({"Says": Says(values)}, objective, objective, (ids[:, :-1], ids[:, 1:]), half)


def test_the_probes_of_the_shelf_list_the_numbers_that_they_give():
    """A plan is checked against this list."""
    objective = Objective(tiny_gpt(), CrossEntropy())
    other = copy.deepcopy(objective)
    ids = torch.randint(50, (1, 9))
    probes = {e.name: e.cls() for e in CATALOG.values() if e.kind == "probe" and e.module.startswith("components.")}
    seen = prober.observe(probes, objective, other, (ids[:, :-1], ids[:, 1:]), half)
    given = {name: set() for name in probes}
    for metric in seen.row:
        _, name, statistic, *modules = metric.split("/")
        given[name].add(statistic + "/MODULE" * len(modules))
    assert given == {name: set(probe.statistics) for name, probe in probes.items()}


def test_numbers_arrays_and_the_rest_are_sorted():
    values = {"a": 1, "b/blocks.0": np.float32(0.5), "c": torch.tensor(2.0), "d/x": torch.ones(2, 3)}
    values |= {
        "e": np.arange(3),
        "f": None,
        "g": float("inf"),
        "h": torch.tensor(float("nan")),
        "i": np.array([1, np.nan]),
    }
    values |= {"j": np.array(4.0), "k": torch.tensor(True), "l": 10**400, "m": np.array(5.0, dtype=np.longdouble)}
    seen = observed(values)
    numbers = {"a": 1.0, "b/blocks.0": 0.5, "c": 2.0, "j": 4.0, "k": 1.0, "m": 5.0}
    assert seen.row == {f"probe/Says/{name}": value for name, value in numbers.items()}
    assert all(type(value) is float and math.isfinite(value) for value in seen.row.values())
    assert {name: array.shape for name, array in seen.distributions.items()} == {
        "probe/Says/d/x": (6,),
        "probe/Says/e": (3,),
    }
    assert {name[-1]: reason.split()[-1] for name, reason in seen.left_out.items()} == {
        "f": "model",
        **dict.fromkeys("ghil", "finite"),
    }


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "Says.observe returned None; it must return {'STATISTIC/MODULE': number or array}"),
        ({"a b": 1.0}, "'a b' is not a name; write STATISTIC"),
        ({"a/b/c": 1.0}, "'a/b/c' is not a name"),
        ({3: 1.0}, "3 is not a name"),
        ({"a": "1"}, "the value of a must be a number or an array, not '1'"),
        ({"a": True}, "the value of a must be a number or an array, not True"),
        ({"a": torch.ones(0)}, "a has 0 numbers; an array of a probe has 1 to 100,000"),
        ({"a": np.array(["x", "y"])}, "Says.observe: a is an array of <U1, which can't be read as numbers"),
        ({"a": np.array("x")}, "Says.observe: a is an array of <U1, which can't be read as numbers"),
        ({"a": torch.eye(2).to_sparse()}, "return a dense array of real numbers"),
        ({"a": torch.ones((), device="meta")}, "Says.observe: a is a tensor on the device meta, which holds no values"),
        ({"a": torch.ones(3, device="meta")}, "Says.observe: a is a tensor on the device meta, which holds no values"),
        ({"a": torch.tensor(1.0).to_sparse()}, "return a dense array of real numbers"),
        ({"a": torch.tensor([1j])}, "its numbers are complex"),
        ({"a": torch.tensor(1j)}, "its numbers are complex"),
        ({"a": np.array([1j])}, "its numbers are complex"),
        ({"a": np.ones(100_001)}, "a has 100,001 numbers; an array of a probe has 1 to 100,000: return a summary"),
    ],
)
def test_other_forms_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        observed(values)


# --- a stranger's probe, the config, and loggers


@pytest.fixture(scope="module")
def page():
    """The probe of docs/probes.md."""
    text = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def own(page, tmp_path_factory):
    """The probe of the page in a file of its own, and one with a mistake; other tests don't see them."""
    path = tmp_path_factory.mktemp("own") / "outliers.py"
    wrong = page.replace("class Outliers", "class Misspelt").replace('"activations"}', '"activation"}')
    path.write_text(page + wrong[wrong.index("@register") :])
    yield str(path)
    for name in ("Outliers", "Misspelt"):
        CATALOG.pop(name, None)
    sys.modules.pop("outliers", None)


def test_the_probe_of_the_page_runs_under_two_names(own, tmp_path):
    bindings = ("Experiment.probes = [@Outliers, @far/Outliers]", "far/Outliers.factor = 3.0", *EVERY)
    assert small_run(tmp_path, "one", "--import", own, bindings=bindings) == 0
    found = probe_rows(tmp_path / "one")
    assert sorted(found) == [0, 5, 10, 11]
    names = [f"probe/{name}/share/blocks.{i}" for name in ("Outliers", "far-Outliers") for i in (0, 1)]
    assert sorted(found[5]) == sorted(names)
    assert facts(tmp_path / "one")["probes"] == ["Outliers", "far-Outliers"]
    assert all(0 <= row[name] <= 1 for row in found.values() for name in names)
    assert any(row[names[0]] != row[names[2]] for row in found.values())


def test_the_probe_of_the_page_follows_the_rules(own):
    done = command("toolkit.components", "check", f"{own}:Outliers")
    assert done.returncode == 0 and "0 fail" in done.stdout, done.stdout


WRONG = {
    "twice": ("Experiment.probes = [@Outliers, @Outliers]", "Experiment.probes has Outliers twice"),
    "kind": ("Experiment.probes = [@Induction]", "@Induction is of kind evaluator; parts of kind probe are"),
    "one": ("Experiment.probes = @Outliers", "it takes a list: write [@Outliers]"),
    "needs": ("Experiment.probes = [@Misspelt]", "Misspelt.needs has 'activation'; the views are activations, "),
    "never": ("Experiment.probe_every = 0", "Experiment.probe_every = 0"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_wrong_probes_are_refused_before_anything_is_read(case, dry, own, tmp_path):
    binding, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        small_run(tmp_path, "one", *dry, "--import", own, bindings=(binding,))
    assert not (tmp_path / "one").exists()


def test_a_dry_run_names_the_probes(tmp_path, capsys):
    assert small_run(tmp_path, "one", "--dry-run", overlays=ALL) == 0
    assert "@Activations" in capsys.readouterr().out


class Locked(Plain):
    """A model that can't be copied."""

    def __init__(self, vocab_size, max_len):
        super().__init__(vocab_size, max_len)
        self.lock = threading.Lock()


def test_a_model_that_can_not_be_copied_is_refused():
    with pytest.raises(ValueError, match="Locked can't be copied, which probes need: .*; keep open files"):
        prober.copy_of(Objective(Locked(50, 32), CrossEntropy()))


def test_a_model_that_keeps_activations_is_probed(tmp_path):
    """A tensor of the last pass as an attribute can't be copied; the copy is made before the first pass."""
    source = tmp_path / "keeps.py"
    source.write_text(
        "import torch\nfrom components.mixer import SelfAttention\nfrom toolkit import register\n\n\n"
        '@register("mixer")\nclass Keeps(SelfAttention):\n    """Keeps its output."""\n\n'
        "    def __init__(self, dim, n_head, n_kv_head, position, attention, depth):\n"
        "        super().__init__(dim, n_head, n_kv_head, position, attention, depth)\n\n"
        "    def forward(self, x, context):\n        self.last = super().forward(x, context)\n"
        "        return self.last\n"
    )
    bindings = ("GPT.mixer = @Keeps", *EVERY)
    try:
        assert small_run(tmp_path, "one", "--import", str(source), overlays=ALL, bindings=bindings) == 0
    finally:
        CATALOG.pop("Keeps", None)
        sys.modules.pop("keeps", None)
    assert sorted(probe_rows(tmp_path / "one")) == [0, 5, 10, 11]


def test_loggers_without_histograms_go_on(tmp_path):
    said = []

    class Old:
        def __init__(self, run_dir, start_step):
            pass

        def log(self, step, metrics):
            said.append(metrics)

        def text(self, step, name, text):
            pass

        def close(self, summary):
            said.append("closed")

    class New(Old):
        def histogram(self, step, name, values):
            said.append((step, name, values.tolist()))

    (tmp_path / "metrics.jsonl").touch()
    journal = Journal(tmp_path, [Old], 0)
    journal.histogram(3, "probe/a/b", np.ones(2))
    journal.row(3, {"a": 1.0})
    journal.close()
    assert said == [{"a": 1.0}, "closed"]
    journal = Journal(tmp_path, [New], 4)
    journal.histogram(5, "probe/a/b", np.ones(2))
    journal.close()
    assert said[2:] == [(5, "probe/a/b", [1.0, 1.0]), "closed"]


def test_the_probe_batch_is_small_and_the_same(tmp_path):
    class Four:
        def windows(self, split):
            return {"val": 3}[split]

        def batch(self, split, index, size):
            assert (split, index) == ("val", 0)
            return np.arange(size * 9).reshape(size, 9)

    for batch_size, sequences in ((1, 1), (8, 1), (16, 2), (1000, 3)):
        ids, targets = prober.probe_batch(Four(), batch_size, torch.device("cpu"))
        assert ids.shape == (sequences, 8) and torch.equal(targets[:, :-1], ids[:, 1:])
