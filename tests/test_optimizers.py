"""Optimizers beyond parity: which parameters they treat alike, what they keep, and weights of two kinds."""

import io

import pytest
import torch
import torch.nn.functional as F
from conftest import parts, tiny_gpt
from runs import small_run
from safetensors.torch import load_file
from torch import nn

from components.optimizer import SOAP, AdamW, Muon, ScheduleFreeAdamW
from components.schedule import WarmupStableCosine, WarmupStableDecay, WarmupStableSqrt
from toolkit.compose import open_run
from toolkit.groups import parameter_groups
from toolkit.objective import Objective
from toolkit.registry import CATALOG
from toolkit.rundir.facts import memory
from toolkit.store import checkpoint


def gpt(**overrides):
    """A tiny GPT with a merged layer that says so, and a parameter with a rate of its own."""
    model = tiny_gpt(**overrides)
    model.blocks[0].mixer.qkv.merged = {"q": 32, "k": 32, "v": 32}
    model.blocks[1].ffn.down.weight.lr_scale = 0.5
    return model


def train(model, optimizer, count):
    ids = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        hidden, head = model(ids[:, :-1])
        F.cross_entropy(head.logits(hidden).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_soap_leaves_gradients_as_they_are():
    model = gpt()
    optimizer = SOAP(model)
    train(model, optimizer, 2)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)


@pytest.mark.parametrize("part", parts("optimizer"))
def test_a_saved_state_is_plain_and_goes_on_to_the_bit(part):
    model = gpt()
    optimizer, file = part.cls(model), io.BytesIO()
    train(model, optimizer, 12)  # past the tenth step, where SOAP turns its basis
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = gpt()
    restored = part.cls(other)
    other.load_state_dict(state["model"])
    restored.load_state_dict(state["optimizer"])
    train(model, optimizer, 10)
    train(other, restored, 10)
    assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("part", parts("optimizer"))
def test_a_dry_run_counts_the_state_that_a_step_makes(part):
    with torch.device("meta"):
        blank = gpt()
    counted = memory(Objective(blank, CATALOG["CrossEntropy"].cls()), part.cls(blank), 2, 8, False)["optimizer"]
    model = gpt()
    optimizer = part.cls(model)
    train(model, optimizer, 2)
    kept = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert counted == sum(t.numel() * t.element_size() for t in kept) > 0


def test_matrices_are_the_weights_of_linears_but_neither_tables_nor_the_output():
    model = gpt(tie_embeddings=False)
    groups = Muon(model, lr=1e-2, adamw_lr=1e-3, weight_decay=0.1, no_decay=("*.out.weight",)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    held = {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}
    assert held["matrices, no decay"] == ["blocks.0.mixer.out.weight", "blocks.1.mixer.out.weight"]
    assert held["matrices, decay, lr x 0.5"] == ["blocks.1.ffn.down.weight"]
    assert len(held["matrices, decay"]) == 5 and all(".weight" in name for name in held["matrices, decay"])
    assert held["decay"] == ["embed.weight", "unembed.weight"]
    peaks = {group["name"]: group["peak_lr"] for group in groups}
    assert peaks["matrices, decay"] == 1e-2 and peaks["matrices, decay, lr x 0.5"] == 5e-3 and peaks["decay"] == 1e-3
    splits = {group["name"]: group.get("split") for group in groups}
    assert splits["decay"] is None and splits["matrices, decay, lr x 0.5"] == [None]
    assert [32, 32, 32] in splits["matrices, decay"] and splits["matrices, decay"].count(None) == 1


def test_a_linear_that_shares_its_weight_with_a_table_is_no_matrix():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False))
    model[2].weight = model[0].weight
    (matrices,) = (group for group in Muon(model).param_groups if "split" in group)
    assert matrices["params"] == [model[1].weight]


def test_muon_takes_only_the_matrices_that_it_is_left():
    model = gpt()
    optimizer = Muon(model, no_matrix=("blocks.0.*",))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = [names[id(p)] for group in optimizer.param_groups if "split" in group for p in group["params"]]
    assert len(matrices) == 4 and all(name.startswith("blocks.1.") for name in matrices)
    with pytest.raises(ValueError, match="no hidden matrix.*@AdamW"):
        Muon(nn.Embedding(5, 4))
    with pytest.raises(ValueError, match="no hidden matrix.*no_matrix"):
        Muon(gpt(), no_matrix=("*",))
    for knob in ("no_decay", "no_matrix"):
        with pytest.raises(ValueError, match=f"{knob} pattern 'nothing.*' matches no parameter"):
            Muon(gpt(), **{knob: ("nothing.*",)})


def test_groups_without_matrices_are_what_they_were():
    assert [group["name"] for group in parameter_groups(gpt(), 1e-3, 0.1)] == ["decay, lr x 0.5", "decay", "no decay"]
    assert not any("split" in group for group in AdamW(gpt()).param_groups)


def test_soap_takes_a_parameter_of_three_dimensions_for_a_stack_of_matrices():
    class Holder(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight)

    stack, gradients = torch.randn(3, 5, 4), torch.randn(8, 3, 5, 4)
    whole, alone = Holder(stack.clone()), [Holder(matrix.clone()) for matrix in stack]
    for models, at in ([[whole], slice(None)], *([[one], i] for i, one in enumerate(alone))):
        optimizer = CATALOG["SOAP"].cls(models[0], precondition_frequency=3)
        for gradient in gradients:
            models[0].weight.grad = gradient[at].clone()
            optimizer.step()
    torch.testing.assert_close(whole.weight, torch.stack([one.weight for one in alone]))


# --- schedule-free: weights to train on, weights to judge by


def test_judging_puts_the_training_weights_back_to_the_bit():
    model = gpt()
    optimizer = ScheduleFreeAdamW(model)
    train(model, optimizer, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with checkpoint.evaluation_weights(model, optimizer) as kept:
        assert_same(kept, before)
        assert not torch.equal(model.embed.weight, before["embed.weight"])
    assert_same(model.state_dict(), before)
    with pytest.raises(OSError), checkpoint.evaluation_weights(model, optimizer):
        raise OSError("a full disk")
    assert_same(model.state_dict(), before)
    train(model, optimizer, 1)  # in training mode again
    with checkpoint.evaluation_weights(model, AdamW(model)) as kept:
        assert kept is None


FREE = {"bindings": ("Experiment.optimizer = @ScheduleFreeAdamW",)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert small_run(runs, "straight", **FREE) == 0
    return runs / "straight"


def states(run, step=12):
    return torch.load(run / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)


def test_how_often_one_evaluates_and_saves_changes_nothing(straight, tmp_path):
    often = ("Experiment.eval_every = 1", "Experiment.sample_every = 5", "Experiment.checkpoint_every = 3")
    assert small_run(tmp_path, "often", bindings=(*FREE["bindings"], *often)) == 0
    assert_same(states(straight)["training_weights"], states(tmp_path / "often")["training_weights"])


def test_a_schedule_free_run_resumes_to_the_bit(straight, tmp_path):
    assert small_run(tmp_path, "broken", "--stop-at", "5", **FREE) == 0
    assert small_run(tmp_path, "broken", "--resume", **FREE) == 0
    weights = [run / "checkpoints" / "step-00000012" / "model.safetensors" for run in (straight, tmp_path / "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    one, other = states(straight), states(tmp_path / "broken")
    assert_same(one["training_weights"], other["training_weights"])
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    for index, state in one["optimizer"]["state"].items():
        assert_same(state, other["optimizer"]["state"][index])


def test_a_checkpoint_holds_the_mean_of_the_iterates_and_that_is_what_generates(straight):
    folder = straight / "checkpoints" / "step-00000012"
    weights, state = load_file(folder / "model.safetensors"), states(straight)
    y, z = state["training_weights"], state["optimizer"]["state"]
    order = [name for name, value in y.items() if value.ndim >= 2] + [n for n, v in y.items() if v.ndim < 2]
    for index, name in enumerate(order):  # y = beta1 * mean + (1 - beta1) * z
        torch.testing.assert_close(weights[name], (y[name] - 0.1 * z[index]["z"]) / 0.9, rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights["embed.weight"], y["embed.weight"])
    assert_same(open_run(folder).model.state_dict(), weights)


# --- schedules: what they refuse


@pytest.mark.parametrize("cls", [WarmupStableDecay, WarmupStableSqrt, WarmupStableCosine])
def test_a_warm_up_and_a_decay_that_overlap_are_refused_with_the_remedy(cls):
    with pytest.raises(ValueError, match=r"warmup_steps to 50 or less.*decay_fraction to 0.4 or less"):
        cls(100, warmup_steps=60, decay_fraction=0.5)
    for knobs in (dict(warmup_steps=50, decay_fraction=0.5), dict(warmup_steps=60, decay_fraction=0.4)):
        values = [cls(100, **knobs)(step) for step in range(100)]
        assert max(values) == values[knobs["warmup_steps"] - 1] == 1.0 and values[-1] == 0.0
    for knobs in (dict(warmup_steps=0, decay_fraction=1.0), dict(warmup_steps=99, decay_fraction=1e-6)):
        assert cls(100, **knobs)(99) == 0.0


@pytest.mark.parametrize("part", parts("schedule"))
def test_a_run_of_one_step_trains_at_the_peak(part):
    knobs = {"warmup_steps": 0} if "warmup_steps" in part.knobs else {}
    assert part.cls(1, **knobs)(0) == 1.0
