"""The benchmarks run and count right; how fast anything is, no test says."""

import json
from pathlib import Path

import pytest

from benchmarks import probes, train
from benchmarks.__main__ import cpu, gpu
from benchmarks.measure import interleave
from benchmarks.peers import Sizes
from benchmarks.steps import flops

KEPT = Path(train.__file__).parent / "results" / "epyc-2-cores-avx512.json"
TINY = ["--dim", "32", "--layers", "1", "--heads", "2", "--context", "16", "--hidden", "48", "--batch", "2"]


def test_a_round_whose_probe_moved_is_run_again_until_no_repeats_are_left():
    probes, turns = iter([1.0, 1.05, 1.3, 1.3, 2.0]), {"a": iter(range(10)), "b": iter(range(10, 30, 2))}
    rounds = interleave({name: values.__next__ for name, values in turns.items()}, 3, probes.__next__, repeats=1)
    assert rounds.values == {"a": [0, 2, 3], "b": [10, 14, 16]}  # the second round was thrown away
    assert (rounds.repeated, rounds.restless, len(rounds.probes)) == (1, 1, 3)


def test_flops_by_the_causal_count():
    assert flops(Sizes(100, dim=8, layers=2, heads=2, context=16, hidden=24)) == 6 * (2 * (4 * 64 + 3 * 8 * 24) + 1056)


def test_each_bar_finds_its_figure():
    found = json.loads(KEPT.read_text())
    figures = {bar.what: bar.of(found[bar.benchmark]) for bar in cpu()}
    table = next(table for table in found["train"]["tables"] if table["sizes"]["vocab"] == 8192)
    over = table["contestants"]["toolkit eager"]["over_fastest_peer"]["median"]
    assert figures["training, eager, 8,192 tokens: over the fastest peer"] == over
    for products, share in (("torch.mm", "of_plain"), ("the faster library", "of_bound")):
        share = table["contestants"]["toolkit compiled"][share]["median"]
        assert figures[f"training, compiled, 8,192 tokens: of its products by {products} alone"] == share
    assert len(figures) == 21 and all(figure > 0 for figure in figures.values())


def test_each_bar_of_a_gpu_finds_its_figure_and_an_h200_is_known():
    found = json.loads(KEPT.read_text())
    for table, sizes in zip(found["train"]["tables"], (train.ON_GPU, Sizes(50_257)), strict=True):
        table["sizes"]["vocab"] = sizes.vocab
        for contestant in table["contestants"].values():
            contestant["tokens_per_s"] = [432_999, 433_000, 433_001]
            contestant["mfu"] = train.mfu(contestant["tokens_per_s"], sizes, "NVIDIA H200")
        lines = list(train.on_gpu(table["contestants"], "NVIDIA H200"))
        assert len(lines) == len(table["contestants"]) + 1
        assert train.mfu([1.0], sizes, "NVIDIA L40") is None
    figures = {bar.what: bar.of(found[bar.benchmark]) for bar in gpu()}
    assert figures["training, 100,277 tokens: of the bf16 peak, causal count"] == pytest.approx(0.45, abs=1e-3)
    assert all(figure > 0 for figure in figures.values())


@pytest.mark.slow
def test_training_steps_are_measured_against_a_peer(capsys):
    pytest.importorskip("litgpt", reason="the peers come with the extra bench")
    names = ["toolkit eager", "transformers eager"]
    assert train.main([*TINY, "--vocab", "300", "--rounds", "2", "--steps", "1", "--json", "--only", *names]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tables"]
    ours, theirs = (found["contestants"][name] for name in names)
    assert abs(ours["parameters"] - 84 * 32 - theirs["parameters"]) <= 0.01 * theirs["parameters"]  # 84 rows of padding
    assert ours["over_fastest_peer"]["median"] > 0 and len(ours["tokens_per_s"]) == 2 and ours["peak"] > ours["before"]


def test_the_share_of_probes_is_measured(capsys):
    line = ["gin/model/tiny.gin", "-p", "GPT.dim = 32", "-p", "SyntheticStories.stories = 60"]
    line += ["-p", "SyntheticStories.val_stories = 10", "-p", "Experiment.seq_len = 32"]
    assert probes.main([*line, "--rounds", "2", "--steps", "1", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert list(shares) == ["all", "Activations", "Updates", *list(shares)[3:]] and len(shares) == 7
    assert all(len(each) == 2 and min(each) > 0 for each in shares.values())
