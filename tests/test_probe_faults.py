"""``compare --probes`` locates faults that are planted in real runs, and is silent between runs that differ only in the
seed. The parts with the faults are in probe_faults.py."""

import itertools
import json
import sys
from dataclasses import dataclass

import pytest

from toolkit import compare, registry, run
from toolkit.comparison import board, figures
from toolkit.registry import CATALOG

SEEDS, MORE_SEEDS = range(3), range(3, 6)
BINDINGS = {
    "GPT.dim": "32",
    "GPT.n_layer": "4",
    "GPT.tie_embeddings": "False",
    "GPT.block": "@PreNorm",
    "GPT.norm": "@LayerNorm",
    "GPT.ffn": "@GELU",
    "GPT.attention": "@MathAttention",
    "GPT.position": "@RoPE",
    "GPT.init": "@GPT2Init",
    "Experiment.steps": "9",
    "Experiment.probe_every": "4",
    "Experiment.batch_size": "16",
    "Experiment.seq_len": "64",
    "Experiment.eval_every": "9",
    "Experiment.eval_windows": "4",
    "Experiment.checkpoint_every": "9",
    "Experiment.sample_every": "9",
    "Experiment.sample_tokens": "2",
    "SyntheticStories.stories": "60",
    "SyntheticStories.val_stories": "10",
    "warmup_steps": "2",
}


@dataclass(frozen=True)
class Fault:
    """A binding that plants the fault, its layer (None: the head), and the probes and statistics that belong to it. The
    module is anywhere in the layer."""

    binding: str
    layer: int | None
    statistics: tuple[str, ...]


def at(layer, part, usual, layers=4):
    """A slot's list with ``part`` in one layer."""
    return f"[{', '.join('@' + (part if i == layer else usual) for i in range(layers))}]"


ACTIVATIONS = ("Activations/rms", "Activations/largest", "Activations/kurtosis")
UPDATES = ("Updates/gradient_norm", "Updates/update_ratio")
RANK = ("EffectiveRank/rank",)
FAULTS = {  # the modules and statistics of each were written down before it was run
    "dead block": Fault(f"GPT.block = {at(2, 'DeadBlock', 'PreNorm')}", 2, (*ACTIVATIONS, *UPDATES, *RANK)),
    "unscaled residual": Fault("GPT.init = @UnscaledResidual", 1, (*ACTIVATIONS, *UPDATES, *RANK)),
    "norm off": Fault(f"GPT.norm = {at(2, 'NormOff', 'LayerNorm')}", 2, (*ACTIVATIONS, *UPDATES, *RANK)),
    "frozen matrix": Fault(f"GPT.ffn = {at(1, 'FrozenFFN', 'GELU')}", 1, ("Updates/update_ratio",)),
    "dying units": Fault(f"GPT.ffn = {at(2, 'DyingFFN', 'GELU')}", 2, ("DeadUnits/dead_share", *ACTIVATIONS)),
    "unscaled attention": Fault(
        f"GPT.attention = {at(1, 'UnscaledAttention', 'MathAttention')}",
        1,
        ("AttentionEntropy/entropy_nats", *ACTIVATIONS, "Updates/gradient_norm"),
    ),
    "no positions": Fault(
        f"GPT.position = {at(2, 'Nowhere', 'RoPE')}",
        2,
        ("AttentionEntropy/entropy_nats", *ACTIVATIONS, "Updates/gradient_norm"),
    ),
    "large init": Fault("GPT.init = @LargeInit", 2, (*ACTIVATIONS, *UPDATES, "AttentionEntropy/entropy_nats", *RANK)),
    "cut gradient": Fault(f"GPT.block = {at(2, 'CutGradient', 'PreNorm')}", 2, UPDATES),
    "fast block": Fault("GPT.init = @FastBlock", 1, ("Updates/update_ratio",)),
    "hot head": Fault(
        "GPT.init = @HotHead", None, ("LogitScale/rms", "LogitScale/largest", "LogitScale/log_z_nats", *UPDATES)
    ),
}


def train(runs, name, seed, binding=None):
    """A run through the command, with the six probes."""
    knobs = BINDINGS | {"Experiment.seed": str(seed)}
    if binding:
        key, value = binding.split(" = ", 1)
        knobs[key] = value
    flags = [flag for key, value in knobs.items() for flag in ("-p", f"{key} = {value}")]
    arguments = ["gin/model/tiny.gin", "gin/probe/all.gin", "--import", "probe_faults", *flags]
    assert run.main([*arguments, "--runs", str(runs), "--name", f"{name}-s{seed}"]) == 0


@pytest.fixture(autouse=True, scope="module")
def no_parts_are_left():
    """The faults are parts of this file alone; other tests in this process must not find them."""
    yield
    for entry in [entry for entry in CATALOG.values() if entry.module == "probe_faults"]:
        registry._remove(entry)
    sys.modules.pop("probe_faults", None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six runs without a fault."""
    folder = tmp_path_factory.mktemp("faults")
    for seed in (*SEEDS, *MORE_SEEDS):
        train(folder, "sound", seed)
    return folder


@pytest.fixture
def probes_of(runs, capsys, tmp_path, monkeypatch):
    """What ``compare --probes`` says of one arm: a function of two lists of run names."""
    monkeypatch.setattr(figures, "draw", lambda comparison: {})
    monkeypatch.setattr(board, "write", lambda comparison, folder: None)

    def call(sound, arm):
        named = [f"{word}={runs / name}" for word, names in (("sound", sound), ("arm", arm)) for name in names]
        capsys.readouterr()
        assert compare.main([*named, "--probes", "--json", "--out", str(tmp_path)]) == 0
        return json.loads(capsys.readouterr().out)["probes"]["arms"][0]

    return call


def is_in_place(module, layer):
    return module.startswith(f"blocks.{layer}.") if layer is not None else module in ("", "unembed.weight", "norm")


@pytest.mark.slow
def test_at_least_nine_of_ten_planted_faults_are_located(runs, probes_of):
    located, report = {}, []
    for name, fault in FAULTS.items():
        for seed in SEEDS:
            train(runs, name.replace(" ", "_"), seed, fault.binding)
        arm = probes_of([f"sound-s{s}" for s in SEEDS], [f"{name.replace(' ', '_')}-s{s}" for s in SEEDS])
        cell = arm["origin"] or (arm["first"] or [None])[0]
        what = cell and f"{cell['probe']}/{cell['statistic']}"
        located[name] = bool(cell) and is_in_place(cell["module"], fault.layer) and what in fault.statistics
        report.append(f"{name}: {cell and (cell['step'], cell['module'], what)} {located[name]}")
    print("\n".join(report))
    assert len(FAULTS) >= 10 and sum(located.values()) >= 0.9 * len(FAULTS), "\n".join(report)


@pytest.mark.slow
def test_runs_that_differ_only_in_the_seed_are_silent(probes_of):
    """The ten ways to divide six runs into two arms: at a level of 5 %, none or one of them may be told apart."""
    seeds, found = (*SEEDS, *MORE_SEEDS), []
    for rest in itertools.combinations(seeds[1:], 2):
        one = (seeds[0], *rest)
        arm = probes_of([f"sound-s{s}" for s in one], [f"sound-s{s}" for s in seeds if s not in one])
        assert not arm["paired"] and arm["cells"] > 300 and arm["origin"] is None
        found += arm["first"][:1]
    assert len(found) <= 1, found


@pytest.mark.slow
def test_runs_of_the_same_seeds_are_equal(runs, probes_of):
    for seed in SEEDS[:2]:
        train(runs, "again", seed)
    arm = probes_of(["sound-s0", "sound-s1"], ["again-s0", "again-s1"])
    assert arm["paired"] and arm["origin"] is None and arm["first"] == [] and arm["cells"] == 0 < arm["equal_cells"]
