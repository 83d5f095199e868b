"""The benchmarks run and count right; how fast anything is, no test says."""

import json
from pathlib import Path

import pytest

from benchmarks import evaluation, harness, probes, train
from benchmarks.__main__ import cpu, gpu
from benchmarks.measure import interleave
from benchmarks.peers import Sizes
from benchmarks.steps import flops
from components.stories import story
from components.tokenizer import Bytes
from toolkit.measures import Continuation
from toolkit.registry import CATALOG

KEPT = Path(train.__file__).parent / "results" / "epyc-2-cores-avx512.json"
TASKS = ("MinimalPairs", "MultipleChoice")
TINY = ["--dim", "32", "--layers", "1", "--heads", "2", "--context", "16", "--hidden", "48", "--batch", "2"]


def test_a_round_whose_probe_moved_is_run_again_until_no_repeats_are_left():
    probes, turns = iter([1.0, 1.05, 1.3, 1.3, 2.0]), {"a": iter(range(10)), "b": iter(range(10, 30, 2))}
    rounds = interleave({name: values.__next__ for name, values in turns.items()}, 3, probes.__next__, repeats=1)
    assert rounds.values == {"a": [0, 2, 3], "b": [10, 14, 16]}  # the second round was thrown away
    assert (rounds.repeated, rounds.restless, len(rounds.probes)) == (1, 1, 3)


def test_flops_by_the_causal_count():
    assert flops(Sizes(100, dim=8, layers=2, heads=2, context=16, hidden=24)) == 6 * (2 * (4 * 64 + 3 * 8 * 24) + 1056)


def evaluated(case: str, first: float) -> dict:
    """A table of the evaluation benchmark with the figures first, first + 1, and so on."""
    over = {task: {"median": first + place} for place, task in enumerate(TASKS)}
    share = {f"{task}, lm-eval": {"median": 0.0} for task in TASKS}
    share |= {f"{task}, toolkit": {"median": first + 2 + place} for place, task in enumerate(TASKS)}
    return {"case": case, "over_lm_eval": over, "of_training": share}


def test_each_bar_finds_its_figure():
    found = json.loads(KEPT.read_text())
    found["evaluation"] = {"tables": [evaluated(case, first) for case, first in (("tiny", 1.0), ("default", 5.0))]}
    figures = {bar.what: bar.of(found[bar.benchmark]) for bar in cpu()}
    measured = [figures.pop(what) for what in list(figures) if what.startswith(TASKS)]
    assert measured == [1, 3, 2, 4, 5, 7, 6, 8]  # for each case and task: over lm-eval, of training
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


def test_items_have_the_published_formats_and_their_tokens_are_counted_by_definition():
    texts = [story(0, index) for index in range(20)]
    rows = {"MinimalPairs": harness.minimal_pairs(texts, 30), "MultipleChoice": harness.multiple_choice(texts, 9)}
    for row in rows["MinimalPairs"]:
        assert sorted(row["sentence_good"].split()) == sorted(row["sentence_bad"].split())
    assert {len(row["endings"]) for row in rows["MultipleChoice"]} == {4}
    assert all(50 <= len(row["ctx_a"].split()) <= 80 for row in rows["MultipleChoice"])
    ours, subject = harness.evaluators(rows), evaluation.Subject.__new__(evaluation.Subject)
    subject.tokenizer, subject.sizes = Bytes(), Sizes(257, context=4096)
    pairs = harness.pairs(ours["MinimalPairs"])
    assert len(pairs) == 60 and subject.count_tokens(pairs) == sum(len(text.encode()) for _, text in pairs)
    pairs = harness.pairs(ours["MultipleChoice"])
    assert len(pairs) == 36
    assert subject.count_tokens(pairs) == sum(len((before + text).encode()) - 1 for before, text in pairs)


def test_a_peer_that_computes_something_else_is_refused():
    found = [Continuation(10.0, 5, False), Continuation(4.0, 2, False)]
    assert evaluation.difference(found, [10.0001, 4.0]) == pytest.approx(2e-5)
    for wrong in (4.01, float("nan")):
        with pytest.raises(ValueError, match="not the same model"):
            evaluation.difference(found, [10.0, wrong])


SMALL = evaluation.Case(Sizes(300, dim=32, layers=1, heads=2, context=256, hidden=88), 2, 4, 2, (2, 3))


@pytest.mark.slow
def test_evaluation_is_measured_against_lm_eval(capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="the peer comes with the extra bench")
    monkeypatch.setitem(evaluation.CASES, "tiny", SMALL)
    assert evaluation.main(["--only", "tiny", "--rounds", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tables"]
    assert set(found["over_lm_eval"]) == {"MinimalPairs", "MultipleChoice"} == set(found["agreement"])
    assert set(evaluated("tiny", 1.0)) <= set(found)
    for task, ratio in found["over_lm_eval"].items():
        ours, theirs = (found["tokens_per_s"][f"{task}, {who}"][0] for who in ("toolkit", "lm-eval"))
        assert ratio["median"] == pytest.approx(ours / theirs) and found["batch_sizes"][task] in (2, 3)


@pytest.mark.slow
def test_the_cost_of_each_evaluator_is_measured(capsys, monkeypatch):
    monkeypatch.setitem(evaluation.CASES, "tiny", SMALL)
    assert evaluation.main(["--only", "tiny", "--rounds", "1", "--cost", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tables"]
    names = {entry.name for entry in CATALOG.values() if entry.module == "components.evaluator"}
    assert found["evaluators"].keys() == names & found["evaluators"].keys() and len(found["evaluators"]) >= 7
    for each in found["evaluators"].values():
        assert each["share"] == pytest.approx(each["seconds"] / found["seconds"]) and each["items"] > 1


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
