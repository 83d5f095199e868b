"""Plans that are judged several times: which look an arm is at, what its p pays for, and which runs ablate starts."""

import json

import numpy as np
import pytest
from plans import Inline, write_plan
from scipy import stats
from test_compare import METRIC, arm, fired
from test_compare import write_plan as write_runs

from toolkit import ablate, compare
from toolkit.ablation.plan import read
from toolkit.comparison import figures, lookfile
from toolkit.comparison.sequential import Looks
from toolkit.comparison.statistics import measure
from toolkit.config.layers import ConfigError

SHIFTS = {"NoPE": 0.3, "ALiBi": 0.001}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda comparison: {})


def compared(folder, *more):  # the exit code is 0
    assert compare.main([str(folder), *more]) == 0
    return json.loads((folder / "compare" / "compare.json").read_text())


def values(said, name, seeds):
    of = {run["seed"]: run["value"] for run in said["runs"] if run["arm"] == name}
    return [of[seed] for seed in seeds]


def nominal(said, name, seeds, effect=0.02):
    return measure(values(said, name, seeds), values(said, "rope", seeds), True, 0.05, effect)


def extend(folder, seeds, **more):
    """Runs of more seeds, as if they had been added to the plan."""
    extended = write_runs(folder.parent / "longer", SHIFTS, seeds=range(seeds), **more)
    for run in extended.glob("*-s*"):
        if not (folder / run.name).exists():
            run.rename(folder / run.name)
    (extended / "plan.json").rename(folder / "plan.json")


def rows(folder):
    return [json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()]


# ---- plans with looks


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"looks": [3, 2, 4]}, "plan.gin:8: Ablation.looks = [3, 2, 4]: the numbers of seeds must increase"),
        ({"looks": [2, 3]}, "plan.gin:8: Ablation.looks = [2, 3]: the last look must be at all 4 seeds"),
        ({"looks": [1, 4]}, "plan.gin:8: Ablation.looks: at 0: 1 should be greater than or equal to 2"),
        ({"looks": [2, 4], "spending": "obrien"}, "plan.gin:9: Ablation.spending: 'obrien' should be 'obrien-fleming'"),
        ({"spending": "pocock"}, "plan.gin:8: Ablation.spending needs Ablation.looks"),
    ],
)
def test_looks_that_can_not_be_right_are_refused_with_their_place(changed, message, tmp_path):
    path = write_plan(tmp_path, seeds=[0, 1, 2, 3], **changed)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert message in str(caught.value).replace(str(path), "plan.gin")


def test_each_arm_is_judged_at_the_last_look_that_its_runs_have_reached(tmp_path):
    """ALiBi has its runs up to the third look; of the last one, the fifth seed is still running."""
    broken = {"ALiBi-s4": {"state": "running"}}
    folder = write_runs(tmp_path, SHIFTS, looks=[2, 3, 4, 5], spending="pocock", broken=broken)
    said = compared(folder)
    nope, alibi = arm(said, "NoPE"), arm(said, "ALiBi")
    assert (nope["look"], nope["look_n"], alibi["look"], alibi["look_n"]) == ("look 4 of 4", 5, "look 3 of 4", 4)
    counts = (2, 3, 4)
    ps = [float(nominal(said, "ALiBi", range(n)).p) for n in counts]
    looks = Looks(counts, (0.4, 0.6, 0.8), "pocock")
    assert alibi["p"] == pytest.approx(float(looks.p(ps))) and alibi["sequential"]
    here = nominal(said, "ALiBi", range(4))
    half = stats.t.isf(looks.levels(0.05)[-1] / 2, 3) * float(here.sd) / 2
    assert (alibi["low"], alibi["high"]) == pytest.approx((float(here.mean) - half, float(here.mean) + half))
    assert said["looks"]["seeds"] == [2, 3, 4, 5] and said["version"] == 2 and fired(said) == set()


def test_nothing_is_judged_before_the_first_look(tmp_path):
    broken = {"rope-s1": {"state": "running"}}
    said = compared(write_runs(tmp_path, SHIFTS, looks=[2, 5], broken=broken))
    assert arm(said, "NoPE")["verdict"] == "inconclusive" and arm(said, "NoPE")["difference"] is None
    assert "The first look is at 2 seeds" in arm(said, "NoPE")["why"]


def test_an_undecided_arm_says_what_is_left_to_spend(tmp_path):
    broken = {f"ALiBi-s{seed}": {"state": "running"} for seed in (3, 4)}
    folder = write_runs(tmp_path, SHIFTS, looks=[2, 3, 5], effect=0.0001, broken=broken)
    why = arm(compared(folder), "ALiBi")["why"]
    level = Looks.planned([2, 3, 5]).levels(0.05)[-1]
    assert f"Left to spend: at the next look, at 5 seeds, a plain p below {level:.2g} decides" in why
    assert "sequential p" in why and "repeated 95 % interval" in why


def test_an_arm_that_ablate_stopped_stays_at_its_look(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, looks=[3, 5])
    header = {"baseline": "rope", "metric": METRIC, "alpha": 0.05, "effect": 0.02}
    stop = {"seeds": [0, 1, 2], "n": 3, "share": 0.6, "verdict": "worse", "look": "look 1 of 2", "p": 0.001}
    assert lookfile.write(folder, "ablate", header, {"NoPE": stop}) == ""
    said = compared(folder)
    assert (arm(said, "NoPE")["look"], arm(said, "ALiBi")["look"]) == ("look 1 of 2", "look 2 of 2")


@pytest.mark.parametrize("wrong", [{"looks": [5, 3]}, {"looks": [1, 5]}, {"looks": [3, 5], "spending": "all"}])
def test_a_plan_json_with_looks_that_can_not_be_is_named(wrong, tmp_path):
    with pytest.raises(ValueError, match="plan.json: .*restore the file from a copy"):
        compare.main([str(write_runs(tmp_path, SHIFTS, **wrong))])


# ---- plans without looks


def test_seeds_that_are_added_after_a_look_pay_for_it(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, seeds=range(3), effect=0.0001)
    first = compared(folder)
    assert not arm(first, "ALiBi")["sequential"] and fired(first) == set()
    assert arm(first, "ALiBi")["p"] == pytest.approx(float(nominal(first, "ALiBi", range(3)).p))
    extend(folder, 5, effect=0.0001)
    second = compared(folder)
    assert (
        fired(second) == {"looked before"} and "judged before at 3 seeds, and now at 5" in second["banners"][0]["text"]
    )
    looks = Looks((3, 5), (1.0, 5 / 3))
    ps = [float(nominal(second, "ALiBi", range(n)).p) for n in (3, 5)]
    assert arm(second, "ALiBi")["p"] == pytest.approx(float(looks.p(ps))) != ps[1]
    assert "Alpha is spent: if seeds are added" in arm(second, "ALiBi")["why"]


def test_to_compare_the_same_seeds_again_changes_nothing(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, seeds=range(3))
    compared(folder)
    extend(folder, 5)
    before = compared(folder)
    text = (folder / "looks.jsonl").read_bytes()
    assert compared(folder) == before and (folder / "looks.jsonl").read_bytes() == text and len(rows(folder)) == 2
    compared(folder, "--exclude", "NoPE-s4", "--reason", "a test")
    assert compared(folder) == before


def test_a_judgement_of_fewer_seeds_than_before_is_no_look(tmp_path):
    folder = write_runs(tmp_path, SHIFTS)
    before = compared(folder)
    said = compared(folder, "--exclude", "NoPE-s4", "--reason", "a test")
    assert arm(said, "NoPE")["n"] == 4 and not arm(said, "NoPE")["sequential"]
    assert compared(folder) == before


def test_a_look_before_all_planned_seeds_have_ended_spends_a_part(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, broken={f"ALiBi-s{seed}": {"state": "running"} for seed in (3, 4)})
    said = compared(folder)
    assert arm(said, "ALiBi")["look"] == "of 5 planned" and not arm(said, "NoPE")["sequential"]
    expected = Looks((3,), (0.6,)).p([float(nominal(said, "ALiBi", range(3)).p)])
    assert arm(said, "ALiBi")["p"] == pytest.approx(float(expected))
    assert any("ALiBi: judged before all planned seeds have ended" in note for note in said["notes"])


def test_diverged_runs_are_not_to_come(tmp_path):
    said = compared(write_runs(tmp_path, SHIFTS, broken={"ALiBi-s4": {"state": "diverged"}}))
    assert not arm(said, "ALiBi")["sequential"]


def test_a_damaged_line_is_told_and_the_others_count(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, seeds=range(3))
    compared(folder)
    text = (folder / "looks.jsonl").read_text()
    (folder / "looks.jsonl").write_text(text + text.replace('"n": 3', '"n": 2') + '{"version": 1\n')
    extend(folder, 5)
    said = compared(folder)
    assert fired(said) == {"looks not known", "looked before"} and "line 2, 3 is damaged" in said["banners"][0]["text"]
    assert (folder / "looks.jsonl").read_text().startswith(text) and len(lookfile.read(folder).rows) == 2


def test_a_folder_that_can_not_be_written_is_compared_all_the_same(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, seeds=range(3))
    (folder / "looks.jsonl").mkdir()
    said = compared(folder)
    assert arm(said, "NoPE")["verdict"] == "worse"
    assert any("looks.jsonl can't be written" in note for note in said["notes"])


def test_runs_without_a_plan_have_no_looks(tmp_path):
    folder = write_runs(tmp_path, SHIFTS, seeds=range(3))
    out = tmp_path / "out"
    assert compare.main([f"rope={folder}/rope-s*", f"NoPE={folder}/NoPE-s*", "--out", str(out)]) == 0
    said = json.loads((out / "compare.json").read_text())
    assert not (folder / "looks.jsonl").exists() and not arm(said, "NoPE")["sequential"]
    assert any("earlier looks at these runs are not known" in note for note in said["notes"])


# ---- ablate

HOT = {
    "arms": {"rope": [], "none": ["GPT.position = @NoPE"], "hot": ["AdamW.lr = 1e-5"]},
    "factor": ["GPT.position", "AdamW.lr"],
    "seeds": [1, 0, 2, 3],  # the first look is at the first two, in this order
    "looks": [2, 3, 4],
    "effect": 1e-6,  # nothing is equivalent
}


@pytest.fixture
def inline(monkeypatch):
    """Jobs run in this process. ``orders`` has the names of the jobs of each call."""

    class Maker:
        codes, launchers = {}, []

        def __call__(self, arguments, folder, threads, devices):
            self.launchers.append(Inline(self.codes))
            return self.launchers[-1]

    maker = Maker()
    maker.launchers = []
    monkeypatch.setattr(ablate, "_launcher", maker)
    return maker


def ablated(plan, runs):
    return ablate.main([str(plan), "--runs", str(runs)])


def decided(folder):
    return {name: row["arms"][name]["verdict"] for row in rows(folder) for name in row["arms"]}


def test_ablate_goes_on_with_the_undecided_arms_alone(tmp_path, inline, capsys):
    plan, folder = write_plan(tmp_path, **HOT), tmp_path / "runs" / "question"
    assert ablated(plan, tmp_path / "runs") == 0
    first = ["rope-s1", "none-s1", "hot-s1", "rope-s0", "none-s0", "hot-s0"]
    order = inline.launchers[-1].order
    assert order[:6] == first and order[6:9] == ["rope-s2", "none-s2", "hot-s2"]
    assert order[9:] == ["rope-s3", "none-s3"]  # hot is worse at the second look
    assert decided(folder) == {"none": "inconclusive", "hot": "worse"}
    out = capsys.readouterr().out
    assert "judged: none inconclusive (look 2 of 3), hot worse (look 2 of 3)" in out
    before = (folder / "looks.jsonl").read_bytes()
    assert ablated(plan, tmp_path / "runs") == 0
    assert inline.launchers[-1].order == [] and (folder / "looks.jsonl").read_bytes() == before
    said = compared(folder)
    assert (arm(said, "hot")["n"], arm(said, "none")["n"], arm(said, "rope")["n"]) == (3, 4, 4)
    assert not arm(said, "hot")["conditional"] and "unequal seeds" not in fired(said)
    assert (folder / "looks.jsonl").read_bytes() == before


class Killed(Exception):
    """Stands for a machine that goes down at this moment."""


def test_a_plan_that_was_killed_after_a_look_goes_on_as_if_it_had_not_been(tmp_path, inline):
    plan, folder = write_plan(tmp_path, **HOT), tmp_path / "runs" / "question"
    for at in ("rope-s1", "hot-s0", "rope-s3"):  # in the middle of a look, at its last job, and after the second look

        class Dies(dict):
            def __contains__(self, name, at=at):
                if name == at:
                    raise Killed
                return False

        inline.codes = Dies(nobody=0)
        with pytest.raises(Killed):
            ablated(plan, tmp_path / "runs")
    assert decided(folder) == {"none": "inconclusive", "hot": "worse"}  # written before the job that died
    inline.codes = {}
    assert ablated(plan, tmp_path / "runs") == 0
    assert inline.launchers[-1].order == ["rope-s3", "none-s3"]


def test_an_arm_whose_job_failed_waits_and_the_others_go_on(tmp_path, inline):
    plan, folder = write_plan(tmp_path, **HOT), tmp_path / "runs" / "question"
    inline.codes = {"none-s0": 1}
    assert ablated(plan, tmp_path / "runs") == 1
    order = inline.launchers[-1].order
    assert order.count("none-s0") == 1 and "none-s2" not in order and order[6:] == ["rope-s2", "hot-s2"]
    assert decided(folder) == {"hot": "worse"}
    inline.codes = {}
    assert ablated(plan, tmp_path / "runs") == 0
    assert inline.launchers[-1].order == ["none-s0", "none-s2", "rope-s3", "none-s3"]
    assert decided(folder) == {"hot": "worse", "none": "inconclusive"}


def test_looks_may_be_added_at_the_end_and_spend_only_the_reserve(tmp_path, inline, capsys):
    plan, folder = write_plan(tmp_path, **HOT | {"looks": [2, 4]}), tmp_path / "runs" / "question"
    assert ablated(plan, tmp_path / "runs") == 0
    for changed in ({"looks": [3, 4]}, {"looks": []}, {"seeds": [0, 1, 2, 3], "looks": [2, 4]}):
        with pytest.raises(ConfigError, match="looks: was|seeds: in a plan with looks"):
            ablated(write_plan(tmp_path, **HOT | changed), tmp_path / "runs")
    longer = HOT | {"seeds": [1, 0, 2, 3, 4], "looks": [2, 4, 5]}
    assert ablated(write_plan(tmp_path, **longer), tmp_path / "runs") == 0
    assert json.loads((folder / "plan.json").read_text())["planned_seeds"] == 4
    said = compared(folder)
    assert said["looks"]["levels"][-1] < 0.02 and "looked before" in fired(said)
    assert arm(said, "none")["look"] == "look 3 of 3"


def test_a_dry_run_shows_looks_levels_and_jobs(tmp_path, capsys):
    assert ablate.main([str(write_plan(tmp_path, **HOT)), "--runs", str(tmp_path / "runs"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    levels = ", ".join(f"{level:.2g}" for level in Looks.planned([2, 3, 4]).levels(0.05))
    assert (
        "at most 12 jobs" in out
        and f"looks at 2, 3, 4 seeds (obrien-fleming); a plain p decides if it is below {levels}" in out
    )
    assert "jobs up to each look if no arm stops: 6, 9, 12" in out


# ---- planted truth through run directories


def planted_plan(root, rng, arms, seeds, **plan):
    """Runs of a baseline and null arms, correlated by seed, and the planted values {arm: values}."""
    common, names = rng.standard_normal(seeds), [f"null-{k}" for k in range(arms)]
    drawn = {name: 2 + 0.03 * (0.6**0.5 * common + 0.4**0.5 * rng.standard_normal(seeds)) for name in ("rope", *names)}
    broken = {f"{name}-s{seed}": {"value": float(v[seed])} for name, v in drawn.items() for seed in range(seeds)}
    return write_runs(root, dict.fromkeys(names, 0.0), seeds=range(seeds), broken=broken, effect=1e-6, **plan), drawn


def show_seeds(folder, n, content, planned):
    """Leave only the first n seeds: the others still run, or are not in the plan yet."""
    late = [job for job in content["jobs"] if job["seed"] >= n]
    if planned:
        for job in content["jobs"]:
            state = "running" if job in late else "done"
            status = json.loads((folder / job["run"] / "status.json").read_text())
            (folder / job["run"] / "status.json").write_text(json.dumps(status | {"state": state}))
    else:
        jobs = [job for job in content["jobs"] if job not in late]
        (folder / "plan.json").write_text(json.dumps(content | {"jobs": jobs}))


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("repetitions", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_planted_truth_goes_through_run_directories_look_by_look(planned, repetitions, tmp_path):
    """Three null arms; seeds are added one at a time until an arm wins. Each p is that of ``History`` on the planted
    values, and the error rate is that of chance at most."""
    rng, false, plain = np.random.default_rng(8), 0, 0
    counts = (3, 4, 5, 6)
    for number in range(repetitions):
        more = {"looks": list(counts), "spending": "pocock"} if planned else {}
        folder, drawn = planted_plan(tmp_path / str(number), rng, 3, counts[-1], **more)
        content, won, won_plain = json.loads((folder / "plan.json").read_text()), False, False
        for k, n in enumerate(counts):
            show_seeds(folder, n, content, planned)
            said = compared(folder)
            total = counts[-1] if planned else counts[0]
            looks = Looks(counts[: k + 1], tuple(c / total for c in counts[: k + 1]), "pocock")
            for name in ("null-0", "null-1", "null-2"):
                ps = [float(measure(drawn[name][:c], drawn["rope"][:c], True).p) for c in counts[: k + 1]]
                assert arm(said, name)["p"] == pytest.approx(float(looks.p(ps)))
                won_plain |= 3 * ps[-1] < 0.05  # Holm's first step
            won |= any(arm(said, name)["verdict"] in ("better", "worse") for name in ("null-0", "null-1", "null-2"))
        false, plain = false + won, plain + won_plain
    print(f"planned {planned}: {false} of {repetitions}; with the plain p {plain}")
    assert false <= repetitions * (0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5)
