"""The compare command on run folders that are written here, in the format of real ones, and on two real runs."""

import csv
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from runs import command, small_run

from toolkit import compare
from toolkit.comparison import figures, runs
from toolkit.comparison.spikes import spikes
from toolkit.comparison.statistics import judge

STEPS, METRIC = 100, "val_full/loss_nats"
CONFIG = {
    "Experiment.model": "@GPT",
    "Experiment.steps": STEPS,
    "Experiment.batch_size": 4,
    "Experiment.seq_len": 32,
    "Experiment.accumulate": 1,
    "Experiment.seed": 0,
    "Experiment.eval_windows": 16,
    "GPT.dim": 64,
    "GPT.position": "@RoPE",
    "RoPE.theta": 10000.0,
    "AdamW.lr": 0.003,
    "WarmupCosine.warmup_steps": 10,
}
FACTS = {
    "tokens": STEPS * 128,
    "parameters": {"total": 100_000, "non_embedding": 90_000, "active": 100_000, "padding": 0},
    "flops_per_token": 600_000,
    "precision": "float32",
    "compiled": False,
    "device": "cpu",
    "device_name": "a processor",
    "threads": 1,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "data": "d" * 64,
    "tokenizer": "t" * 64,
    "windows": {"train": 900, "val": 90},
    "from": None,
    "resumed": [],
    "seconds": 12.0,
}
NOISE = [0.012, -0.009, 0.004, -0.006, 0.010]  # of the seeds 0 to 4, shared by all arms
OWN = [0.001, -0.002, 0.0015, -0.0005, 0.0005]  # what an arm adds to it


def write_run(folder, seed=0, value=2.0, state="done", config=None, train=None, metrics=True, **facts):
    """A run's folder as toolkit.run leaves it: the loss falls to ``value``. ``facts`` go over FACTS."""
    folder.mkdir(parents=True)
    flat = {**CONFIG, "Experiment.seed": seed, **(config or {})}
    flat = {key: knob for key, knob in flat.items() if knob is not None}
    steps = flat["Experiment.steps"]
    known = FACTS | {"name": folder.name, "steps": steps, "seed": seed, "config": flat, "tokens": steps * 128}
    known |= {"weights_sha256": hashlib.sha256(str(folder).encode()).hexdigest()} | facts
    rows = []
    for step in range(0, steps + 1 if state == "done" else steps // 2, 5):
        loss = value + 3 * (1 - step / steps) ** 2
        if step % 10 == 0:
            rows.append({"step": step, "val/loss_nats": loss, "val/bits_per_byte": 1.44 * loss})
            if step == steps and metrics:
                rows[-1] |= {METRIC: value, "val_full/bits_per_byte": 1.44 * value}
        trained = loss + 0.02 * np.sin(step) + (train or {}).get(step, 0.0)
        rows.append({"step": step, "train/loss_nats": trained, "lr": 0.003, "time/step_ms": 10.0 + seed})
    status = {"state": state, "step": rows[-1]["step"], "time": 0.0}
    if state == "diverged":
        status["reason"] = "step 51: loss nan, gradient norm nan"
    (folder / "config.gin").write_text("".join(f"{key} = {knob!r}\n" for key, knob in flat.items()))
    (folder / "facts.json").write_text(json.dumps(known))
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_plan(root, shifts, seeds=range(5), arms=None, broken=None, **plan):
    """A plan's folder: arm "rope" at 2.0, the others shifted. ``arms`` are options of all runs of an arm, ``broken`` of
    single runs by name."""
    folder, jobs = root / "position", []
    shifts = {"rope": 0.0, **shifts}
    for k, (arm, shift) in enumerate(shifts.items()):
        for seed in seeds:
            name = f"{arm}-s{seed}"
            value = 2.0 + shift + NOISE[seed % 5] + (np.roll(OWN, k)[seed % 5] if k else 0.0)
            factor = {} if arm == "rope" else {"GPT.position": f"@{arm}", "RoPE.theta": None}
            options = {"value": value} | (arms or {}).get(arm, {}) | (broken or {}).get(name, {})
            write_run(folder / name, seed=seed, **options | {"config": factor | options.get("config", {})})
            jobs.append({"arm": arm, "seed": seed, "lr": None, "run": name, "purpose": "judged"})
    (folder / "plan.gin").write_text("# the plan\n")
    said = {
        "name": "position",
        "question": "Which position encoding?",
        "baseline": "rope",
        "arms": {arm: {"overlays": [], "bindings": []} for arm in shifts},
        "common": {"overlays": [], "bindings": []},
        "factor": ["GPT.position"],
        "seeds": list(seeds),
        "selection_seeds": [],
        "metric": METRIC,
        "alpha": 0.05,
        "effect": 0.02,
        "budget": {"of": "steps", "amount": STEPS, "steps": dict.fromkeys(shifts, STEPS), "seconds_per_step": None},
        "match": None,
        "lr": None,
        "jobs": jobs,
        "sha256": hashlib.sha256(b"# the plan\n").hexdigest(),
    }
    (folder / "plan.json").write_text(json.dumps(said | plan))
    return folder


@pytest.fixture(autouse=True)
def plain(request, monkeypatch):
    """No pictures but in the tests that look at them: they take most of the time."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda comparison: {})


@pytest.fixture
def pictures():
    """Asked for by a test of the pictures."""


def compared(folder, *more, code=0):
    """What compare.json says of a plan's folder; the exit code is checked."""
    assert compare.main([str(folder), *more]) == code
    return json.loads((folder / "compare" / "compare.json").read_text())


def arm(said, name):
    return next(one for one in said["arms"] if one["arm"] == name)


def fired(said):
    return {banner["guard"] for banner in said["banners"]}


def test_a_metric_whose_higher_values_are_better_is_the_mirror_image(tmp_path, capsys):
    shifts = {"NoPE": 0.3, "ALiBi": -0.1, "Other": 0.0}
    loss = compared(write_plan(tmp_path, shifts))
    folder = write_plan(tmp_path / "up", shifts, metric="eval/Own/accuracy", higher_is_better=True)
    for path in folder.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | ({"eval/Own/accuracy": 5 - row[METRIC]} if METRIC in row else {}) for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    up = compared(folder)
    out = capsys.readouterr().out  # the runs do not say the metric's unit
    assert "\neval/Own/accuracy, higher is better" in out and "in eval/Own/accuracy" not in out
    assert not up["lower_is_better"] and loss["lower_is_better"]
    for one, other in zip(loss["arms"], up["arms"], strict=True):
        assert one["verdict"] == other["verdict"]
        if one["difference"] is not None:
            mirrored = [-other["difference"], -other["high"], -other["low"], other["p_holm"], other["p_equivalence"]]
            assert [one[k] for k in ("difference", "low", "high", "p_holm", "p_equivalence")] == pytest.approx(mirrored)
    assert {one["verdict"] for one in up["arms"]} == {"baseline", "worse", "better", "equivalent"}


@pytest.mark.parametrize("metric, counts", [("probe/Own/rms", True), ("train/loss_nats", True), ("eval/A/b", False)])
def test_a_metric_of_training_steps_counts_at_the_last_of_them(metric, counts, tmp_path, capsys):
    """A probe's last value is that of step ``steps - 1``; an evaluation of that step is not the last one."""
    folder = write_plan(tmp_path, {"NoPE": 0.3}, metric=metric, higher_is_better=False)
    for path in folder.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        value = next(row[METRIC] for row in rows if METRIC in row)
        rows = [{k: v for k, v in row.items() if k != metric} for row in rows]
        steps = rows[-1]["step"]
        rows.insert(-1, {"step": steps - 1, metric: value})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nope = arm(compared(folder), "NoPE")
    assert nope["verdict"] == ("worse" if counts else "inconclusive")
    assert (nope["mean"] is not None) == counts


def test_a_metric_that_no_run_has_is_named(tmp_path, capsys):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, metric="val_ful/loss_nats", higher_is_better=False)
    assert any(
        "val_ful/loss_nats is in no row of metrics.jsonl of rope-s0" in note
        and note.endswith("did you mean 'val_full/loss_nats'?")
        for note in compared(folder)["notes"]
    )


def test_a_clean_plan_gets_its_verdicts_and_fires_no_guard(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    folder = write_plan(tmp_path, {"NoPE": 0.3, "ALiBi": -0.1, "Other": 0.0})
    said = compared(folder, "--strict")
    assert said["banners"] == []
    words = {one["arm"]: one["verdict"] for one in said["arms"]}
    assert words == {"rope": "baseline", "NoPE": "worse", "ALiBi": "better", "Other": "equivalent"}
    nope = arm(said, "NoPE")
    assert nope["paired"] and nope["correlation"] > 0.9 and nope["pairs"] == 5
    assert nope["low"] < 0.3 < nope["high"] and nope["p"] <= nope["p_holm"] < 0.05
    assert nope["configuration"] == ["GPT.position @RoPE -> @NoPE"]
    out = capsys.readouterr().out
    assert "no guard fired" in out and out.index("worse") < out.index("p Holm") + 400
    assert all(len(line) <= 100 for line in out.splitlines() if "/compare/" not in line)


GUARDS = {
    "config": {"arms": {"NoPE": {"config": {"AdamW.lr": 0.01}}}},
    "parameters": {"arms": {"NoPE": {"parameters": {"total": 101_500}}}},
    "FLOPs per token": {"arms": {"NoPE": {"flops_per_token": 613_000}}},
    "tokens": {"arms": {"NoPE": {"tokens": 1}}},
    "budget": {"broken": {"NoPE-s1": {"config": {"Experiment.steps": 120}}}},
    "evaluation set": {"arms": {"NoPE": {"windows": {"train": 900, "val": 80}}}},
    "tokenizer": {"arms": {"NoPE": {"tokenizer": "u" * 64}}},
    "batch order": {"arms": {"NoPE": {"data": "e" * 64}}},
    "precision": {"broken": {"NoPE-s1": {"precision": "bfloat16"}}},
    "device": {"broken": {"NoPE-s1": {"device_name": "another"}}},
    "threads": {"broken": {"NoPE-s1": {"threads": 2}}},
    "versions": {"broken": {"NoPE-s1": {"packages": {"torch": "2.14.0", "numpy": "2.4.6"}}}},
    "commit": {"arms": {"NoPE": {"commit": "fedcba98"}}},
    "dirty tree": {"broken": {"NoPE-s1": {"dirty": True}}},
    "no-op": {"broken": {"NoPE-s1": {"weights_sha256": "same"}, "rope-s1": {"weights_sha256": "same"}}},
    "resumed": {"broken": {"NoPE-s1": {"resumed": [{"step": 40, "changed": {"GPT.dim": [64, 32]}}]}}},
    "spiked": {"broken": {"NoPE-s1": {"train": {70: 2.0}}}},
    "plan edited": {"sha256": "of another"},
}
OFFENDS = {
    "config": "AdamW.lr 0.003 -> 0.01",
    "parameters": "101,500",
    "FLOPs per token": "613,000",
    "tokens": "12,800 (rope) against 1 (NoPE)",
    "budget": "NoPE-s1 has 120 instead of 100",
    "evaluation set": "80",
    "tokenizer": "uuuu",
    "batch order": "eeee",
    "precision": "bfloat16, compiled False (NoPE-s1)",
    "device": "another (NoPE-s1)",
    "threads": "2 (NoPE-s1)",
    "versions": "torch 2.14.0 (NoPE-s1)",
    "commit": "fedcba98 (NoPE)",
    "dirty tree": "NoPE-s1",
    "no-op": "NoPE is identical to rope at seed 1: what it changes never took effect",
    "resumed": "NoPE-s1 was resumed at step 40, with changes: GPT.dim 64 -> 32",
    "spiked": "at step 70",
    "plan edited": "plan.gin",
}
TOGETHER = {"batch order": {"evaluation set"}, "budget": {"config", "tokens"}}  # one violation that two guards see


@pytest.mark.parametrize("guard", GUARDS)
def test_each_guard_fires_on_its_violation_alone(tmp_path, guard):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), **GUARDS[guard])
    said = compared(folder, "--strict", code=1)
    assert fired(said) == {guard} | TOGETHER.get(guard, set())
    text = next(banner["text"] for banner in said["banners"] if banner["guard"] == guard)
    assert OFFENDS[guard] in text
    assert compare.main([str(folder)]) == 0  # without --strict it is only said


def test_steps_that_were_left_out_are_told(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    with open(folder / "NoPE-s1" / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "skipped/count": step // 30}) + "\n" for step in (30, 60))
    said = compared(folder, "--strict", code=1)
    assert [banner["text"] for banner in said["banners"]] == ["NoPE-s1: 2 steps were skipped, the last at step 60"]


def test_sizes_just_inside_their_bounds_are_let_pass(tmp_path):
    inside = {"parameters": {"total": 100_900}, "flops_per_token": 611_000}
    assert compared(write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), arms={"NoPE": inside}))["banners"] == []


def test_unequal_and_repeated_seeds(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(4))
    plan = json.loads((folder / "plan.json").read_text())
    plan["jobs"] = [job for job in plan["jobs"] if job["run"] != "NoPE-s3"]
    (folder / "plan.json").write_text(json.dumps(plan))
    said = compared(folder)
    assert fired(said) == {"unequal seeds", "runs without a job"} and "NoPE 0, 1, 2" in said["banners"][1]["text"]
    assert arm(said, "NoPE")["paired"] and arm(said, "NoPE")["pairs"] == 3  # by the seeds that both have
    write_run(folder / "NoPE-again", seed=1, value=2.3, config={"GPT.position": "@NoPE", "RoPE.theta": None})
    plan["jobs"].append({"arm": "NoPE", "seed": 1, "lr": None, "run": "NoPE-again", "purpose": "judged"})
    (folder / "plan.json").write_text(json.dumps(plan))
    said = compared(folder)
    assert fired(said) == {"unequal seeds", "repeated seeds", "runs without a job", "looked before"}
    assert not arm(said, "NoPE")["paired"] and "seed was run twice" in arm(said, "NoPE")["pairing"]


def test_what_the_plan_settles_is_no_difference(tmp_path):
    arms = {"NoPE": {"config": {"GPT.dim": 66, "Experiment.steps": 120}, "parameters": {"total": 100_100}}}
    plan = {
        "match": {
            "of": "params",
            "knob": "*.dim",
            "knobs": {"rope": "GPT.dim", "NoPE": "GPT.dim"},
            "widths": {},
            "residual": {},
        },
        "budget": {"of": "seconds", "amount": 9, "steps": {"rope": 100, "NoPE": 120}, "seconds_per_step": {}},
    }
    assert compared(write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), arms=arms, **plan))["banners"] == []


def test_a_budget_of_flops_looks_at_all_of_them(tmp_path):
    arms = {"NoPE": {"flops_per_token": 1_200_000, "config": {"Experiment.steps": 50}}}
    budget = {"of": "flops", "amount": 1e9, "steps": {"rope": 100, "NoPE": 50}, "seconds_per_step": None}
    assert compared(write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), arms=arms, budget=budget))["banners"] == []


@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_no_spike_is_seen_in_noise(noise):
    rng = np.random.default_rng(0)
    loss = 2 + 3 * np.exp(-np.arange(200) / 40) + noise * rng.standard_normal((200, 200))
    assert sum(len(spikes(one)) for one in loss) <= 2
    loss[:, 120] += 3
    assert all(120 in spikes(one) for one in loss)


def test_diverged_and_unfinished_runs_stay_as_rows(tmp_path, capsys):
    broken = {"NoPE-s1": {"state": "diverged"}, "NoPE-s3": {"state": "diverged"}, "ALiBi-s0": {"state": "running"}}
    folder = write_plan(tmp_path, {"NoPE": 0.3, "ALiBi": -0.1}, broken=broken)
    said = compared(folder)
    nope, alibi = arm(said, "NoPE"), arm(said, "ALiBi")
    assert (nope["n"], nope["runs"], nope["diverged"], nope["pairs"]) == (3, 5, 2, 3)
    assert "With these seeds, a true difference of" in output(folder, "report.md")  # of the pairs, not of all n
    assert nope["diverged_low"] == pytest.approx(0.0527, abs=1e-3)  # Clopper and Pearson's interval of 2 in 5
    assert nope["diverged_high"] == pytest.approx(0.8534, abs=1e-3)
    assert nope["conditional"] and alibi["conditional"] and alibi["unfinished"] == 1
    assert len(said["runs"]) == 15
    outcomes = {run["run"]: run["outcome"] for run in said["runs"]}
    assert outcomes["NoPE-s1"] == "diverged" and outcomes["ALiBi-s0"] == "unfinished"
    for text in (capsys.readouterr().out, *(output(folder, file) for file in ("report.md", "compare.html"))):
        assert "2 of 5 diverged" in re.sub(r"\s+", " ", text)
    for file in ("report.md", "compare.html"):
        assert "NoPE-s1" in output(folder, file) and "loss nan" in output(folder, file)


def test_an_arm_of_which_no_run_finished_is_inconclusive(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3, "ALiBi": -0.1}, seeds=range(3), arms={"NoPE": {"state": "diverged"}})
    said = compared(folder)
    assert arm(said, "NoPE")["verdict"] == "inconclusive" and "3 of 3 diverged" in arm(said, "NoPE")["why"]
    assert arm(said, "ALiBi")["verdict"] == "better"


@pytest.mark.parametrize(
    "shifts, arms, verdict",
    [
        ({}, {}, None),
        ({"NoPE": 0.3}, {"rope": {"state": "diverged"}}, "inconclusive"),
        ({"NoPE": 0.3}, {"NoPE": {"state": "running"}}, "inconclusive"),
        ({"NoPE": 0.3}, {"rope": {"metrics": False}, "NoPE": {"metrics": False}}, "inconclusive"),
    ],
)
def test_what_can_not_be_compared_is_shown_all_the_same(tmp_path, pictures, shifts, arms, verdict):
    said = compared(write_plan(tmp_path, shifts, seeds=range(3), arms=arms))
    assert [one["verdict"] for one in said["arms"][1:]] == ([verdict] if verdict else [])
    assert len(said["runs"]) == 3 * (1 + len(shifts)) and said["banners"] == []


def test_jobs_that_never_began_are_rows_too(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    for file in (folder / "NoPE-s2").iterdir():
        file.unlink()
    said = compared(folder)
    assert said["runs"][-1] | {"state": "not begun", "outcome": "unfinished", "seed": 2} == said["runs"][-1]
    assert arm(said, "NoPE")["n"] == 2 and said["banners"] == []


def test_an_exclusion_is_echoed_everywhere(tmp_path, capsys):
    folder = write_plan(tmp_path, {"NoPE": 0.3})
    said = compared(folder, "--exclude", "NoPE-s4", "--reason", "the machine was cooked")
    assert arm(said, "NoPE")["n"] == 4 and fired(said) == {"unequal seeds"}
    assert said["excluded"] == [{"run": "NoPE-s4", "arm": "NoPE", "reason": "the machine was cooked"}]
    texts = [output(folder, file) for file in ("report.md", "compare.csv", "compare.html")]
    for text in (capsys.readouterr().out, *texts):
        assert "NoPE-s4" in text and "the machine was cooked" in text


@pytest.mark.parametrize(
    "flags", [["--exclude", "NoPE-s1"], ["--reason", "why"], ["--exclude", "NoPE-s1", "--reason", " "]]
)
def test_an_exclusion_needs_a_reason(tmp_path, flags):
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))), *flags])


def test_identical_runs_are_identical_and_no_verdict(tmp_path):
    """A/A: the same config on the same seeds. And an arm of another config that changed nothing."""
    folder = write_plan(tmp_path, {"again": 0.0, "NoPE": 0.3, "void": 0.0}, seeds=range(3))
    for seed in range(3):
        for name in ("again", "void"):
            source, target = folder / f"rope-s{seed}", folder / f"{name}-s{seed}"
            (target / "metrics.jsonl").write_text(
                re.sub(r'"time/step_ms": [\d.]+', '"time/step_ms": 99.0', (source / "metrics.jsonl").read_text())
            )
            if name == "again":
                (target / "facts.json").write_text((source / "facts.json").read_text())
    said = compared(folder, "--strict", code=1)
    assert arm(said, "again")["verdict"] == arm(said, "void")["verdict"] == "identical"
    assert arm(said, "again")["p"] is None and "again, void: identical to rope (no verdict)" in said["headline"]
    texts = [banner["text"] for banner in said["banners"] if banner["guard"] == "no-op"]
    assert texts[0].endswith("its config is the baseline's") and texts[1].endswith("never took effect")
    assert arm(said, "NoPE")["verdict"] == "worse"


def test_one_seed_shows_a_difference_and_no_verdict(tmp_path):
    said = compared(write_plan(tmp_path, {"NoPE": 0.3}, seeds=[0]))
    assert arm(said, "NoPE")["verdict"] == "difference" and arm(said, "NoPE")["low"] is None
    assert any("can't give a verdict" in note for note in said["notes"])


def test_other_code_or_other_seeds_are_not_paired(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, arms={"NoPE": {"commit": "fedcba98"}})
    said = compared(folder)
    assert not arm(said, "NoPE")["paired"] and "Welch" in arm(said, "NoPE")["pairing"]
    assert "Welch" in output(folder, "report.md") and "Welch" in output(folder, "compare.html")


def test_disjoint_seeds_of_one_config_are_compared_by_welch(tmp_path):
    """A/A on other seeds: named by hand, since the configs are the same."""
    for seed in range(10):
        write_run(tmp_path / f"aa-s{seed}", seed=seed, value=2.0 + NOISE[seed % 5] + OWN[seed % 5] * (seed > 4))
    out = tmp_path / "out"
    assert compare.main([f"a={tmp_path}/aa-s[0-4]", f"b={tmp_path}/aa-s[5-9]", "--out", str(out)]) == 0
    said = json.loads((out / "compare.json").read_text())
    b = arm(said, "b")
    assert not b["paired"] and b["correlation"] is None and b["verdict"] in ("equivalent", "inconclusive")
    assert fired(said) == {"unequal seeds"}


def test_without_a_plan_arms_are_runs_that_differ_in_nothing_but_the_seed(tmp_path, monkeypatch):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    monkeypatch.chdir(tmp_path)
    assert compare.main(["position/rope-s*", "position/NoPE-s*", "--strict"]) == 0
    said = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert [(one["arm"], one["n"], one["verdict"]) for one in said["arms"]] == [
        ("rope", 3, "baseline"),
        ("NoPE", 3, "worse"),
    ]
    assert not said["declared"] and any("nothing was declared" in note for note in said["notes"])
    assert compare.main(["position/*-s*", "--baseline", "NoPE", "--effect", "1"]) == 0
    said = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert [(one["arm"], one["verdict"]) for one in said["arms"]] == [("NoPE", "baseline"), ("rope", "equivalent")]
    write_run(folder / "wide-s0", config={"GPT.dim": 80, "AdamW.lr": 0.01})
    compare.main(["position/rope-s0", "position/wide-s0"])
    said = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert "2 keys differ at once" in said["banners"][0]["text"]


def test_tokenizers_that_differ_are_compared_in_bits_per_byte(tmp_path):
    said = compared(
        write_plan(tmp_path, {"BPE": 0.3}, seeds=range(3), arms={"BPE": {"tokenizer": "u" * 64, "data": "e"}})
    )
    assert said["metric"] == "val_full/bits_per_byte" and said["effect"] == pytest.approx(1.44 * 0.02)
    assert "tokenizers differ" in said["notes"][0] and not arm(said, "BPE")["paired"]


def with_rates(tmp_path, optimum, seeds=(100, 101)):
    """A plan with a grid of learning rates; ``optimum`` is each arm's best exponent of ten."""
    grid = [1e-3, 3e-3, 1e-2]
    rate = {"rope": 0.003, "NoPE": 0.01}
    arms = {name: {"config": {"AdamW.lr": lr}} for name, lr in rate.items()}
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), arms=arms, selection_seeds=list(seeds))
    plan = json.loads((folder / "plan.json").read_text())
    plan["lr"] = {"knob": "*.lr", "knobs": {"rope": "AdamW.lr"}, "chosen": {}, "grid": {"rope": grid, "NoPE": grid}}
    for name, best in optimum.items():
        for seed in seeds:
            for lr in grid:
                run = f"{name}-s{seed}-lr{lr:g}"
                factor = {} if name == "rope" else {"GPT.position": "@NoPE", "RoPE.theta": None}
                value = 2.0 + (np.log10(lr) - np.log10(best)) ** 2 + 0.001 * (seed % 5)
                write_run(folder / run, seed=seed, value=value, config={**factor, "AdamW.lr": lr})
                plan["jobs"].append({"arm": name, "seed": seed, "lr": lr, "run": run, "purpose": "selection"})
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def test_a_rate_is_chosen_on_selection_seeds_and_warned_of_at_the_edge(tmp_path, pictures):
    folder = with_rates(tmp_path, {"rope": 3e-3, "NoPE": 2e-2})
    said = compared(folder, "--strict", code=1)
    assert arm(said, "rope")["lr"]["best"] == 0.003 and arm(said, "NoPE")["lr"]["best"] == 0.01
    assert fired(said) == {"LR grid edge"} and "above 0.01" in said["banners"][0]["text"]
    assert arm(said, "NoPE")["n"] == 3 and len(said["selection_runs"]) == 12
    assert arm(said, "NoPE")["lr"]["sensitivity"] > 0
    assert (folder / "compare" / "lr.png").stat().st_size > 10_000


def test_an_arm_judged_at_another_rate_or_on_the_seeds_that_chose_it(tmp_path):
    said = compared(with_rates(tmp_path / "rate", {"rope": 3e-3, "NoPE": 3e-3}))
    assert fired(said) == {"learning rate"} and "NoPE is judged at 0.01" in said["banners"][0]["text"]
    said = compared(with_rates(tmp_path / "seeds", {"rope": 3e-3, "NoPE": 1e-2}, seeds=(0, 101)))
    assert "selection seeds" in fired(said)


def test_a_judged_rate_that_is_no_number_is_no_rate(tmp_path):
    folder = with_rates(tmp_path, {"rope": 3e-3, "NoPE": 1e-2})
    facts = folder / "rope-s0" / "facts.json"
    facts.write_text(facts.read_text().replace('"AdamW.lr": 0.003', '"AdamW.lr": "fast"'))
    assert arm(compared(folder), "rope")["lr"]["judged_at"] == [0.003]


def test_steps_to_the_baselines_loss_are_interpolated_or_censored(tmp_path):
    said = compared(write_plan(tmp_path, {"NoPE": 0.3, "ALiBi": -0.12}))
    rope, nope, alibi = (arm(said, name) for name in ("rope", "NoPE", "ALiBi"))
    assert rope["steps_to_target"] == STEPS and nope["steps_to_target"] is None and nope["within_steps"] == STEPS
    # at step 80 the loss is 0.12 above its end, which is where the baseline ends: 3 * 0.2 ** 2
    assert alibi["steps_to_target"] == pytest.approx(80, abs=0.5)
    assert alibi["flops_to_target"] == pytest.approx(alibi["steps_to_target"] * 128 * 600_000)
    assert alibi["seconds_to_target"] == pytest.approx(alibi["steps_to_target"] * 0.012)


def output(folder, name):
    return (folder / "compare" / name).read_text(encoding="utf-8")


def test_the_outputs_agree_and_the_page_loads_nothing(tmp_path, pictures):
    folder = write_plan(tmp_path, {"NoPE": 0.3, "ALiBi": -0.1}, broken={"NoPE-s1": {"state": "diverged"}})
    said = compared(folder)
    with open(folder / "compare" / "compare.csv", newline="") as file:
        table = list(csv.DictReader(file))
    report, html = output(folder, "report.md"), output(folder, "compare.html")
    assert [row["arm"] for row in table] == ["rope", "NoPE", "ALiBi"]
    for row, one in zip(table, said["arms"], strict=True):
        assert row["verdict"] == one["verdict"] and float(row["mean"]) == one["mean"]
        assert row["difference"] == ("" if one["difference"] is None else repr(one["difference"]))
        line = next(line for line in report.splitlines() if line.startswith("| **") and f"| {one['arm']} |" in line)
        assert one["verdict"] in line and f"{one['mean']:.4f}" in line and f"{one['mean']:.4f}" in html
        if one["difference"] is not None:
            assert f"{one['difference']:+.4f}" in line and f"{one['difference']:+.4f}" in html
            assert f"{one['low']:+.4f}" in line and f"{one['low']:+.4f}" in html
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:|//|[^"'#\s]+\.(png|css|js))|url\((?!#)|@import|<script|<link""", html
    )
    assert html.count("<svg") == 3 and "prefers-color-scheme: dark" in html
    for name in ("forest", "curves", "flops"):
        assert (folder / "compare" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in report
    assert not (folder / "compare" / "lr.png").exists()


def test_json_is_all_that_is_printed_when_asked_for(tmp_path, capsys):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    compare.main([str(folder), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(output(folder, "compare.json"))


def test_hparams_of_every_run_are_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    compared(folder)
    compared(folder)  # a second time replaces the first
    board = folder / "compare" / "tensorboard"
    assert sorted(path.name for path in board.iterdir()) == ["NoPE-s0", "NoPE-s1", "rope-s0", "rope-s1"]
    events = EventAccumulator(str(board / "NoPE-s1"))
    events.Reload()
    assert len(list((board / "NoPE-s1").iterdir())) == 1
    assert events.Scalars(METRIC)[0].value == pytest.approx(2.3, abs=0.05)
    assert events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"


def test_what_the_user_can_mend_is_said(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    with pytest.raises(ValueError, match="no run or plan found"):
        compare.main([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="the arms are rope, NoPE"):
        compare.main([str(folder), "--baseline", "rop"])
    with pytest.raises(ValueError, match="--exclude NoPE-s9: run not found"):
        compare.main([str(folder), "--exclude", "NoPE-s9", "--reason", "x"])
    with pytest.raises(ValueError, match="named twice"):
        compare.main([str(folder / "rope-s0"), str(folder / "rope-s*")])
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="not a valid plan, missing: name, baseline, arms, jobs"):
        compare.main([str(folder)])


def test_a_plan_of_which_nothing_was_run_yet(tmp_path, pictures):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    for run in folder.glob("*-s*"):
        shutil.rmtree(run)
    said = compared(folder)
    assert [run["state"] for run in said["runs"]] == ["not begun"] * 4 and said["banners"] == []
    assert arm(said, "NoPE")["verdict"] == "inconclusive" and "No run was started" in output(folder, "report.md")


def test_another_plan_file_than_the_one_that_was_run_is_told(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    (tmp_path / "plan.gin").write_text("# edited since\n")
    assert fired(compared(folder, "--plan", str(tmp_path / "plan.gin"))) == {"plan edited"}
    assert compared(folder, "--plan", str(folder / "plan.gin"))["banners"] == []
    assert compare.main([str(folder / "rope-s0"), "--plan", str(folder / "plan.json"), "--strict"]) == 0
    with pytest.raises(ValueError, match="has no plan.json"):
        compare.main([str(tmp_path), "--plan", str(tmp_path / "plan.gin")])


def test_two_real_runs_end_to_end(tmp_path):
    for name, overlays in (("rope", ()), ("nope", ("gin/position/nope.gin",))):
        assert small_run(tmp_path, f"{name}-s0", overlays=overlays) == 0
    run = runs.read_run(tmp_path / "rope-s0")
    assert run.outcome(METRIC) == "finished" and run.value(METRIC) > 0 and len(run.curve("val/loss_nats")[0]) == 3
    out = tmp_path / "out"
    done = command("toolkit.compare", f"{tmp_path}/*-s0", "--baseline", "rope", "--out", str(out))
    assert done.returncode == 0, done.stderr
    said = json.loads((out / "compare.json").read_text())
    nope = arm(said, "nope")
    assert nope["verdict"] == "difference" and nope["paired"] and nope["difference"] != 0
    assert nope["configuration"][0] == "GPT.position @RoPE -> @NoPE"
    assert fired(said) <= {"dirty tree"}  # of the checkout that the test runs in


@pytest.mark.parametrize("correlation", [0.8, pytest.param(0.0, marks=pytest.mark.slow)])
def test_planted_truth_goes_through_run_directories_unchanged(tmp_path, correlation):
    """Simulated plans of known effects as folders of runs: the verdicts are those of ``judge`` on the planted values,
    no null arm is called better or worse more often than chance allows, and a large effect is always found."""
    draw, false, sd = np.random.default_rng(5), 0, 0.03
    shifts = {"null-1": 0.0, "null-2": 0.0, "null-3": 0.0, "large": 0.6}
    for number in range(10):
        shared, values = draw.standard_normal(5), {}
        for name, shift in {"rope": 0.0, **shifts}.items():
            own = draw.standard_normal(5)
            values[name] = 2.0 + shift + sd * (correlation**0.5 * shared + (1 - correlation) ** 0.5 * own)
        planted = {f"{name}-s{seed}": {"value": float(v[seed])} for name, v in values.items() for seed in range(5)}
        said = compared(write_plan(tmp_path / str(number), shifts, broken=planted, effect=0.01))
        arms = {name: list(map(float, v)) for name, v in values.items() if name != "rope"}
        base = list(map(float, values["rope"]))
        expected = judge(arms, base, paired=dict.fromkeys(arms, True), effect=0.01, alpha=0.05)
        assert {name: arm(said, name)["verdict"] for name in arms} == {n: e[3].word for n, e in expected.items()}
        assert arm(said, "large")["verdict"] == "worse"
        false += any(arm(said, name)["verdict"] in ("better", "worse") for name in ("null-1", "null-2", "null-3"))
    assert false <= 3  # of 10 at a rate of at most 0.05: more happens once in 1,000
