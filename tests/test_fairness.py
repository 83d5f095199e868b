"""Violations of a fair comparison, one at a time: the guard of each fires alone, and none on a clean plan."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from test_compare import METRIC, STEPS, arm, compared, fired, plain, write_plan, write_run  # noqa: F401

from toolkit import compare
from toolkit.ablation.plan import read
from toolkit.comparison import runs
from toolkit.config.layers import ConfigError
from toolkit.rundir.facts import initial_values, package_digest
from toolkit.store import disk, journal, seal


@pytest.fixture
def folder(tmp_path):
    """A clean plan of two arms, sealed as toolkit.ablate and toolkit.run leave it."""
    plan = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    for path in plan.glob("*/facts.json"):
        sealed(path.parent)
    disk.write_json(plan / "plan.json", json.loads((plan / "plan.json").read_text()))
    return plan


def sealed(run, **facts):
    """Give a run the seals, and facts, that a real one has."""
    text = (run / "config.gin").read_text()
    known = json.loads((run / "facts.json").read_text()) | {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}
    rows = journal.read(run / "metrics.jsonl")
    known["final"] = {"step": rows[-1]["step"], METRIC: next(r[METRIC] for r in reversed(rows) if METRIC in r)}
    (run / "config.gin").write_text(seal.seal_text(text))
    disk.write_json(run / "facts.json", known | facts)
    status = json.loads((run / "status.json").read_text()) | {"journal": journal.measure(run)}
    disk.write_json(run / "status.json", status)


def change(path, **values):
    """Change a JSON file as a program of ours would."""
    disk.write_json(path, json.loads(path.read_text()) | values)


def each(folder, arm_name="*"):
    return sorted(path.parent for path in folder.glob(f"{arm_name}-s*/facts.json"))


def test_a_clean_plan_fires_nothing(folder):
    said = compared(folder)
    assert said["banners"] == [] and not any("checksum" in note for note in said["notes"])
    assert arm(said, "NoPE")["verdict"] == "worse" and arm(said, "NoPE")["paired"]


def test_a_run_copied_over_the_other_seeds_of_its_arm(folder):
    for seed in (1, 2):
        shutil.rmtree(folder / f"NoPE-s{seed}")
        shutil.copytree(folder / "NoPE-s0", folder / f"NoPE-s{seed}")
    said = compared(folder)
    assert "one run twice" in fired(said)
    assert "NoPE-s0, NoPE-s1, NoPE-s2 have the same weights" in text_of(said, "one run twice")


def text_of(said, guard):
    return next(banner["text"] for banner in said["banners"] if banner["guard"] == guard)


def test_copied_weights_alone(folder):
    change(
        folder / "NoPE-s2" / "facts.json",
        weights_sha256=json.loads((folder / "NoPE-s1" / "facts.json").read_text())["weights_sha256"],
    )
    assert fired(compared(folder)) == {"one run twice"}


def test_rows_edited_by_hand(folder):
    path = folder / "NoPE-s1" / "metrics.jsonl"
    path.write_text(path.read_text().replace("2.2", "1.2"))
    said = compared(folder)
    assert fired(said) == {"damaged", "edited"} and "metrics.jsonl is not what was written" in text_of(said, "damaged")
    assert arm(said, "NoPE")["n"] == 2  # what was edited is not judged


def test_rows_that_contradict_the_facts_of_a_run_without_seals(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    run = folder / "NoPE-s1"
    known = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(known | {"final": {"step": STEPS, METRIC: 1.5}}))
    said = compared(folder)
    assert fired(said) == {"edited"} and "but 1.5 in facts.json" in text_of(said, "edited")


def test_a_config_edited_by_hand(folder):
    path = folder / "NoPE-s1" / "config.gin"
    path.write_text(path.read_text().replace("GPT.dim = 64", "GPT.dim = 65"))
    assert fired(compared(folder)) == {"edited"}
    path.write_text(seal.unseal_text(path.read_text()).text)  # the seal taken away: the facts still tell
    assert fired(compared(folder)) == {"edited"}


@pytest.mark.parametrize("values", [{"effect": 1}, {"alpha": 0.4}, {"factor": ["*"]}])
def test_a_plan_edited_by_hand(values, folder):
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert fired(compared(folder)) == {"plan edited"}


def test_jobs_dropped_from_a_plan(folder):
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    change(path, jobs=[job for job in plan["jobs"] if job["seed"] != 2])
    said = compared(folder)
    assert fired(said) == {"runs without a job"} and "NoPE-s2, rope-s2" in text_of(said, "runs without a job")


def test_what_is_judged_otherwise_than_declared_is_said(folder):
    said = compared(folder, "--effect", "1")
    assert "effect: declared 0.02, judged at 1" in said["notes"]
    said = compared(folder, "--baseline", "NoPE")
    assert "baseline: declared rope, judged against NoPE" in said["notes"]
    assert not any("declared" in note for note in compared(folder, "--effect", "0.02")["notes"])


def test_initial_values_that_differ_are_not_paired(folder):
    alike = {"embed.weight": "384x32 aaaaaaaaaaaa", "head": "3x3 cccccccccccc"}
    for run in each(folder):
        change(
            run / "facts.json", init=alike | {"mixer": "8x8 bbbbbbbbbbbb" if "rope" in run.name else "4x4 dddddddddddd"}
        )
    assert arm(compared(folder), "NoPE")["paired"]
    change(folder / "NoPE-s1" / "facts.json", init=alike | {"embed.weight": "384x32 eeeeeeeeeeee"})
    said = arm(compared(folder), "NoPE")
    assert not said["paired"] and "initial values differ (embed.weight at seed 1)" in said["pairing"]


def test_code_without_a_commit_is_told_by_its_digest(folder):
    for run in each(folder):
        change(run / "facts.json", commit=None, dirty=None, package_sha256="a" * 64)
    said = compared(folder)
    assert fired(said) == set() and "code unknown: no run has a commit" in said["notes"]
    change(folder / "NoPE-s1" / "facts.json", package_sha256="b" * 64)
    assert fired(compared(folder)) == {"code"}


def test_a_part_that_differs_between_seeds(folder):
    for run in each(folder, "NoPE"):
        change(run / "facts.json", code={"mine.py": "a" * 64})
    assert fired(compared(folder)) == set()
    change(folder / "NoPE-s2" / "facts.json", code={"mine.py": "b" * 64})
    assert fired(compared(folder)) == {"code/mine.py"}


def test_products_and_kernels_from_other_code(folder):
    for run in each(folder):
        change(run / "facts.json", products="oneDNN", attention="FlashAttention: flash-attn 2.7")  # older: no "cpu"
    assert fired(compared(folder)) == set()
    change(folder / "NoPE-s2" / "facts.json", products="torch")
    assert fired(compared(folder)) == {"products"}
    change(folder / "NoPE-s2" / "facts.json", products="oneDNN", attention="FlashAttention: torch")
    assert fired(compared(folder)) == {"attention FlashAttention"}
    change(folder / "NoPE-s2" / "facts.json", attention="SDPA")  # another part: that is a difference of the config
    assert fired(compared(folder)) == set()
    change(folder / "NoPE-s2" / "facts.json", cpu="plain")
    assert fired(compared(folder)) == {"TOOLKIT_CPU"}
    change(folder / "NoPE-s2" / "facts.json", cpu="fast")
    assert fired(compared(folder)) == set()
    change(folder / "NoPE-s2" / "facts.json", device="cuda")  # there the switch has no effect
    assert fired(compared(folder)) == {"device"}


def test_a_metric_of_unknown_direction_is_refused(folder, tmp_path):
    told = "is lower better, or higher?"
    change(folder / "plan.json", metric="own/accuracy", higher_is_better=None)
    with pytest.raises(ValueError, match=told):
        compare.main([str(folder)])
    (tmp_path / "x").mkdir()
    lines = [
        "Ablation.question = 'x'",
        "Ablation.effect = 0.1",
        "Ablation.steps = 5",
        "Ablation.metric = 'own/accuracy'",
    ]
    (tmp_path / "x" / "plan.gin").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"plan.gin:4: .*" + told.replace("?", r"\?")):
        read(tmp_path / "x" / "plan.gin")


def test_optimizers_without_tuned_rates(tmp_path):
    options = {
        "NoPE": {"config": {"Experiment.optimizer": "@Lion"}},
        "rope": {"config": {"Experiment.optimizer": "@AdamW"}},
    }
    more = {"factor": ["GPT.position", "Experiment.optimizer"]}
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), arms=options, **more)
    said = compared(folder)
    assert fired(said) == {"rates not tuned"} and "rope AdamW, NoPE Lion" in text_of(said, "rates not tuned")


def test_a_budget_of_time_that_jobs_shared(folder):
    plan = json.loads((folder / "plan.json").read_text())
    change(folder / "plan.json", budget=plan["budget"] | {"of": "seconds"})
    for at, run in enumerate(each(folder)):
        change(run / "facts.json", started=100.0 * at, ended=100.0 * at + 50)
    assert fired(compared(folder)) == set()
    change(each(folder)[1] / "facts.json", started=30.0, ended=80.0)
    assert fired(compared(folder)) == {"jobs at once"}


def test_a_budget_of_time_with_uneven_steps(tmp_path):
    budget = {"of": "seconds", "amount": 9, "steps": {"rope": STEPS, "NoPE": STEPS}, "seconds_per_step": None}
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), budget=budget)
    assert fired(compared(folder)) == set()
    path = folder / "NoPE-s1" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"time/step_ms": 11.0', '"time/step_ms": 31.0'))
    assert fired(compared(folder)) == {"step times"}


def test_one_seed_with_other_parameters(folder):
    change(folder / "NoPE-s0" / "facts.json", parameters={"total": 300_000})
    said = compared(folder)
    assert fired(said) == {"parameters"} and "NoPE-s0 has 300,000 parameters" in text_of(said, "parameters")


def test_a_line_that_can_not_be_read_is_named(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3))
    path = folder / "NoPE-s1" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], "{half\n", *lines[5:]]))
    said = compared(folder)
    assert fired(said) == {"damaged"} and "line 5 can't be read" in text_of(said, "damaged")


def test_a_final_value_that_is_no_number_has_diverged(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), broken={"NoPE-s1": {"value": float("nan")}})
    said = compared(folder)
    assert [run["outcome"] for run in said["runs"] if run["run"] == "NoPE-s1"] == ["diverged"]


@pytest.mark.parametrize("value", [1e308, -1e200])
def test_a_value_that_is_no_measurement_has_diverged(value, tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), broken={"NoPE-s1": {"value": value}})
    assert [run["outcome"] for run in compared(folder)["runs"] if run["run"] == "NoPE-s1"] == ["diverged"]


@pytest.mark.parametrize("shift, word", [(-0.3, "better"), (0.0, "equivalent")])
def test_survivors_alone_get_no_verdict(shift, word, tmp_path):
    lost = {f"NoPE-s{seed}": {"state": "diverged"} for seed in (3, 4)}
    said = compared(write_plan(tmp_path / "a", {"NoPE": shift}, seeds=range(5)))
    assert arm(said, "NoPE")["verdict"] == word
    said = arm(compared(write_plan(tmp_path / "b", {"NoPE": shift}, seeds=range(5), broken=lost)), "NoPE")
    assert said["verdict"] == "inconclusive"
    if word == "better":
        assert "2 of 5 runs of NoPE diverged (exact 95 % interval 5% to 85%)" in said["why"]


def test_a_worse_arm_whose_runs_diverged_stays_worse(tmp_path):
    lost = {f"NoPE-s{seed}": {"state": "diverged"} for seed in (3, 4)}
    assert arm(compared(write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(5), broken=lost)), "NoPE")["verdict"] == "worse"


@pytest.mark.parametrize("name", ["../../good", "/etc", "a/b", "", "..", "x\0"])
def test_a_job_that_is_no_name_is_refused(name, folder):
    plan = json.loads((folder / "plan.json").read_text())
    plan["jobs"][0]["run"] = name
    change(folder / "plan.json", **plan)
    with pytest.raises(ValueError, match="is not a valid run name"):
        compare.main([str(folder)])


ODD = [None, True, -1, 10**400, 1.5, float("nan"), "", "<b>", [], {}, [[]], {"x": {"y": 1}}]


@pytest.mark.parametrize("name", ["facts.json", "status.json", "plan.json"])
def test_values_of_another_type_end_in_no_traceback(name, folder):
    """Each value of each file replaced by each of the above: a banner, or one sentence."""
    path = folder / name if name == "plan.json" else folder / "NoPE-s1" / name
    sound = path.read_text()
    draw = np.random.default_rng(0)
    keys = list(json.loads(sound))
    for key in keys:
        for odd in draw.choice(len(ODD), 3, replace=False):
            change(path, **{key: ODD[odd]})
            try:
                plan, found = runs.find([str(folder)], None, None)
                from toolkit.comparison import assemble, record

                record.record(assemble.compare(plan, found, [], None))
            except ValueError as error:
                assert str(path) in str(error) or "plan.gin" in str(error) or "metric" in str(error), (key, ODD[odd])
            path.write_text(sound)


def test_a_damaged_run_is_a_row_and_a_banner(folder):
    (folder / "NoPE-s1" / "facts.json").write_text("{half")
    said = compared(folder)
    assert fired(said) == {"damaged"} and arm(said, "NoPE")["n"] == 2
    assert [run["outcome"] for run in said["runs"] if run["run"] == "NoPE-s1"] == ["damaged"]


def test_a_damaged_plan_is_one_sentence(folder):
    (folder / "plan.json").write_text("{half")
    with pytest.raises(ValueError, match=r"plan.json is damaged: it can't be read as JSON"):
        compare.main([str(folder)])


def test_digests_tell_models_and_code_apart(tmp_path):
    from conftest import tiny_gpt

    one, other = tiny_gpt(), tiny_gpt()
    assert initial_values(one) == initial_values(other)
    next(other.parameters()).data[0, 0] += 1
    assert sum(a != b for a, b in zip(initial_values(one).values(), initial_values(other).values(), strict=True)) == 1
    assert len(package_digest()) == 64
