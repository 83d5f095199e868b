"""Ablations that really run: order, idempotence, a stop in the middle, failing arms, rates, launchers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from plans import COMMON, Inline, write_plan
from runs import command, facts, rows

from toolkit import ablate, compare
from toolkit.ablation import display, jobs
from toolkit.ablation.progress import JobProgress, choose, last_rows, read_progress
from toolkit.config.layers import ConfigError
from toolkit.store.disk import write_json

ROOT = Path(__file__).parent.parent


@pytest.fixture
def inline(monkeypatch):
    """Jobs run in this process; the launcher of the last call is ``inline.last``, ``inline.codes`` replaces jobs."""

    class Maker:
        codes, last = {}, None

        def __call__(self, arguments, folder, threads, devices):
            self.last = Inline(self.codes)
            return self.last

    maker = Maker()
    monkeypatch.setattr(ablate, "_launcher", maker)
    return maker


def ablated(plan: Path, runs: Path, *more: str) -> int:
    return ablate.main([str(plan), "--runs", str(runs), *more])


def state(folder: Path) -> tuple[str, int]:
    status = json.loads((folder / "status.json").read_text())
    return status["state"], status["step"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A plan that came to its end by the command itself, two jobs at once; read, never written to."""
    folder = tmp_path_factory.mktemp("finished")
    done = command("toolkit.ablate", str(write_plan(folder)), "--runs", str(folder / "runs"), "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_plan_leaves_its_record_and_a_run_for_each_job(finished):
    folder, out = finished[0] / "runs" / "question", finished[1]
    record = json.loads((folder / "plan.json").read_text())
    assert list(record["arms"]) == ["rope", "none"] and record["baseline"] == "rope"
    assert record["arms"]["none"] == {"overlays": [], "bindings": ["GPT.position = @NoPE"]}
    assert record["common"] == {"overlays": COMMON[:1], "bindings": COMMON[1:]}
    assert record["budget"] == {
        "of": "steps",
        "amount": 12,
        "steps": {"rope": 12, "none": 12},
        "seconds_per_step": None,
    }
    assert [job["run"] for job in record["jobs"]] == ["rope-s0", "none-s0"]
    assert (folder / "plan.gin").read_text() == (finished[0] / "question" / "plan.gin").read_text()
    for run in ("rope-s0", "none-s0"):
        assert state(folder / run) == ("done", 12)
        assert facts(folder / run)["steps"] == 12 and facts(folder / run)["seed"] == 0
        assert facts(folder / run)["threads"] == record["threads"]
    assert facts(folder / "none-s0")["config"]["GPT.position"] == "@NoPE"
    assert "none-s0: done at step 12, val_full/loss_nats " in out
    assert out.rstrip().endswith(f"compare: python -m toolkit.compare {folder}")


def test_two_jobs_ran_at_once(finished):
    lines = finished[1].splitlines()
    started = [index for index, line in enumerate(lines) if line.endswith(": started")]
    assert started == [1, 2] and "2 jobs, 2 at once" in lines[0]


def test_a_second_call_runs_nothing(finished, inline, capsys):
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.jsonl")}
    assert ablated(folder / "question" / "plan.gin", folder / "runs") == 0
    assert inline.last.order == [] and "2 of them already ended" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.jsonl")}


def test_a_changed_plan_is_refused_and_says_what_changed(finished, tmp_path, inline):
    folder = finished[0]
    changed = write_plan(
        tmp_path, effect=0.5, seeds=[1], arms={"rope": [], "none": ["GPT.position = @Learned"]}, steps=24
    )
    with pytest.raises(ConfigError) as caught:
        ablated(changed, folder / "runs")
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "effect: was 0.02, is now 0.5",
        "budget.amount: was 12, is now 24",
        "budget.steps.rope: was 12, is now 24",
        "budget.steps.none: was 12, is now 24",
        'arms.none.bindings: was ["GPT.position = @NoPE"], is now ["GPT.position = @Learned"]',
        "seeds: 0 removed",
    ]


def test_an_overlay_that_changed_under_its_runs_is_refused(tmp_path, inline):
    overlay = tmp_path / "mine.gin"
    overlay.write_text("GPT.position = @NoPE\n")
    plan = write_plan(tmp_path, arms={"rope": [], "mine": [str(overlay)]}, seeds=[0])
    assert ablated(plan, tmp_path / "runs") == 0
    overlay.write_text("GPT.position = @Learned\n")
    with pytest.raises(ConfigError, match="mine-s0: GPT.position: was @NoPE, is now @Learned"):
        ablated(plan, tmp_path / "runs")


def test_jobs_go_seed_by_seed_and_added_ones_alone_are_run(tmp_path, inline):
    plan = write_plan(tmp_path, seeds=[0])
    assert ablated(plan, tmp_path / "runs") == 0
    assert inline.last.order == ["rope-s0", "none-s0"]
    arms = {"rope": [], "none": ["GPT.position = @NoPE"], "learned": ["gin/position/learned.gin"]}
    assert ablated(write_plan(tmp_path, seeds=[0, 1], arms=arms), tmp_path / "runs") == 0
    assert inline.last.order == ["learned-s0", "rope-s1", "none-s1", "learned-s1"]


def test_a_failed_arm_does_not_stop_the_others_and_diverged_ones_are_kept(tmp_path, inline, capsys):
    arms = {"rope": [], "hot": ["AdamW.lr = 1e38", "Experiment.clip = None"], "none": ["GPT.position = @NoPE"]}
    factor = ["GPT.position", "AdamW.lr", "Experiment.clip"]
    plan = write_plan(tmp_path, arms=arms, factor=factor)
    inline.codes = {"rope-s0": 1}
    folder = tmp_path / "runs" / "question"
    assert ablated(plan, tmp_path / "runs") == 1
    assert inline.last.order == ["rope-s0", "hot-s0", "none-s0"]
    assert state(folder / "hot-s0")[0] == "diverged" and state(folder / "none-s0") == ("done", 12)
    assert "rope-s0: failed at step 0" in capsys.readouterr().out
    inline.codes = {}
    assert ablated(plan, tmp_path / "runs") == 0  # the failed one again, the diverged one not
    assert inline.last.order == ["rope-s0"] and state(folder / "rope-s0") == ("done", 12)


def test_the_best_rate_is_chosen_on_selection_seeds_and_judged_on_fresh_ones(tmp_path, inline):
    plan = write_plan(tmp_path, lr_grid=[1e-6, 3e-3], selection_seeds=[9], seeds=[0])
    assert ablated(plan, tmp_path / "runs") == 0
    folder = tmp_path / "runs" / "question"
    assert inline.last.order[4:] == ["rope-s0", "none-s0"] and len(inline.last.order) == 6
    assert json.loads((folder / "plan.json").read_text())["lr"]["chosen"] == {"rope": 0.003, "none": 0.003}
    assert facts(folder / "rope-s9-lr1e-06")["config"]["AdamW.lr"] == 1e-6
    assert facts(folder / "rope-s0")["config"]["AdamW.lr"] == 0.003
    assert ablated(plan, tmp_path / "runs") == 0 and inline.last.order == []


def test_a_long_row_of_probes_hides_no_progress(tmp_path):
    """The last row of a deep model's probes is longer than what is usually read of a file."""
    probes = {f"probe/Activations/rms/blocks.{i}.{'x' * 60}": 1.0 for i in range(300)}
    rows = [{"step": 9, "train/loss_nats": 2.5, "time/step_ms": 7.0}, {"step": 9} | probes]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for state in ("running", "done"):
        (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 10 if state == "done" else 0}))
        progress = read_progress(tmp_path, next(iter(probes)))
        assert (progress.loss, progress.step_ms, progress.metric) == (2.5, 7.0, 1.0)
        assert progress.step == (10 if state == "done" else 9)


def test_a_rate_at_which_runs_diverge_is_not_the_best():
    def done(loss):
        return JobProgress("done", metric=loss)

    assert choose({0.1: [done(1.0), JobProgress("diverged")], 0.01: [done(3.0), done(3.0)]}) == 0.01
    assert choose({0.1: [done(2.0), done(2.2)], 0.01: [done(1.0), done(3.0)]}) == 0.01
    assert choose({0.1: [JobProgress("diverged")], 0.01: [JobProgress("diverged")]}) == 0.01
    assert choose({0.1: [done(2.0)], 0.01: [done(1.0)]}, higher_is_better=True) == 0.1
    assert choose({0.1: [JobProgress("diverged")], 0.01: [done(1.0)]}, higher_is_better=True) == 0.01


def test_a_finished_run_without_steps_gives_no_pace():
    """A status.json that was edited may say "done" at step 0."""
    job = SimpleNamespace(run="a-s0", arm="a")
    queue = SimpleNamespace(
        jobs=[job, SimpleNamespace(run="b-s0", arm="b")],
        plan=SimpleNamespace(arms={"a": SimpleNamespace(steps=10), "b": SimpleNamespace(steps=10)}),
        progress={"a-s0": JobProgress("done", 0, seconds=3.0), "b-s0": JobProgress("running", 5, step_ms=1000.0)},
        launcher=SimpleNamespace(slots=1),
    )
    assert display.summary(queue) == "1 done, 1 running; about 5 s left"


def test_a_preempted_job_is_queued_again(tmp_path, monkeypatch):
    from plans import Ended

    from toolkit import run

    class Preempting(Inline):
        def submit(self, task):
            if task.name == "rope-s0" and task.name not in self.order:
                self.order.append(task.name)
                run.main([*task.arguments, "--stop-at", "8"])
                status = task.folder / "status.json"
                write_json(status, json.loads(status.read_text()) | {"state": "preempted"})
                return Ended(75)
            return super().submit(task)

    launcher = Preempting()
    monkeypatch.setattr(ablate, "_launcher", lambda *given: launcher)
    assert ablated(write_plan(tmp_path), tmp_path / "runs") == 0
    assert launcher.order == ["rope-s0", "none-s0", "rope-s0"]
    assert [entry["step"] for entry in facts(tmp_path / "runs" / "question" / "rope-s0")["resumed"]] == [8]


def test_two_ablates_of_one_plan_do_not_fight(tmp_path, inline):
    plan = write_plan(tmp_path)
    (tmp_path / "runs" / "question").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "runs" / "question" / ".lock"):
        with pytest.raises(ValueError, match="another ablate is using .*question; wait, or choose another --runs"):
            ablated(plan, tmp_path / "runs")


def test_a_dry_run_shows_arms_and_jobs_and_writes_nothing(tmp_path, capsys):
    plan = write_plan(tmp_path, arms={"swiglu": [], "gelu": ["GPT.ffn = @GELU"]}, factor=["GPT.ffn"], match="params")
    assert ablated(plan, tmp_path / "runs", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "baseline swiglu; factor GPT.ffn; metric val_full/loss_nats, effect 0.02, alpha 0.05" in out
    assert "gelu differs in GPT.ffn = @GELU" in out and "2 jobs, about " in out and "gelu-s0" in out
    assert "33,632" in out and "residual" in out
    assert not (tmp_path / "runs").exists()


def test_a_confounded_plan_is_shown_and_stops(tmp_path, capsys):
    plan = write_plan(tmp_path, arms={"rope": [], "alibi": ["gin/position/alibi.gin"]})
    for more in (["--dry-run"], []):
        with pytest.raises(ConfigError, match="beyond the factor: GPT.attention is @SDPA, not @FlashAttention"):
            ablated(plan, tmp_path / "runs", *more)
    assert "alibi-s0" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_a_budget_in_seconds_is_measured_and_recorded(tmp_path, inline, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = write_plan(tmp_path, steps=None, seconds=0.5)
    assert ablated(plan, tmp_path / "runs") == 0
    folder = tmp_path / "runs" / "question"
    budget = json.loads((folder / "plan.json").read_text())["budget"]
    for arm in ("rope", "none"):
        assert budget["steps"][arm] == round(0.5 / budget["seconds_per_step"][arm])
        assert facts(folder / f"{arm}-s0")["steps"] == budget["steps"][arm]
    assert ablated(plan, tmp_path / "runs") == 0 and inline.last.order == []  # as measured then, not anew


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_in_the_middle_loses_nothing(tmp_path, number, code, inline, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process, so that sums have one order
    plan = write_plan(tmp_path, steps=40)
    whole, cut = tmp_path / "whole" / "question", tmp_path / "cut" / "question"
    assert ablated(plan, whole.parent) == 0

    arguments = [sys.executable, "-m", "toolkit.ablate", str(plan), "--runs", str(cut.parent), "--jobs", "1"]
    with subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        second = cut / "none-s0" / "metrics.jsonl"
        while not second.exists() or len(second.read_text().splitlines()) < 10:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == code
    assert state(cut / "rope-s0") == ("done", 40)
    assert state(cut / "none-s0")[0] == "preempted" and 5 < state(cut / "none-s0")[1] < 40
    again = command("toolkit.ablate", str(plan), "--runs", str(cut.parent))
    assert again.returncode == 0 and "none-s0: resumed" in again.stdout
    for run in ("rope-s0", "none-s0"):
        assert rows(cut / run) == rows(whole / run)
        assert facts(cut / run)["weights_sha256"] == facts(whole / run)["weights_sha256"]


@pytest.mark.slow
def test_submitit_runs_jobs_and_requeues_one_that_is_preempted(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from toolkit.ablation import launch

    submitted, preempted = [], []

    class Preempting(launch.Slurm):
        def submit(self, task):
            submitted.append(super().submit(task))
            return submitted[-1]

    monkeypatch.setattr(launch, "Slurm", Preempting)
    plan = write_plan(tmp_path, steps=120)
    rope = tmp_path / "runs" / "question" / "rope-s0"
    look = jobs.JobQueue._poll_jobs

    def looking(queue):
        look(queue)
        if not preempted and len(last_rows(rope / "metrics.jsonl")) >= 10:
            controller = str(submitted[0].job._process.pid)
            preempted.append(int(subprocess.check_output(["pgrep", "-P", controller])))
            os.kill(preempted[0], signal.SIGUSR2)  # what Slurm does before it takes the node

    monkeypatch.setattr(jobs.JobQueue, "_poll_jobs", looking)
    more = ["--launcher", "slurm", "--option", "cluster=local", "--option", "timeout_min=30"]
    assert ablated(plan, tmp_path / "runs", *more) == 0
    assert len(submitted) == 2 and len(preempted) == 1
    resumed = facts(rope)["resumed"]
    assert len(resumed) == 1 and 0 < resumed[0]["step"] < 120
    assert state(rope) == state(rope.with_name("none-s0")) == ("done", 120)


@pytest.mark.slow
def test_ray_runs_jobs(tmp_path):
    pytest.importorskip("ray")
    plan = write_plan(tmp_path)
    done = command("toolkit.ablate", str(plan), "--runs", str(tmp_path / "runs"), "--launcher", "ray", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    for arm in ("rope", "none"):
        assert state(tmp_path / "runs" / "question" / f"{arm}-s0") == ("done", 12)


def test_each_gpu_takes_one_job(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def slots(*flags, devices=1):
        arguments = ablate._arguments(["plan.gin", *flags])
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in ablate._launcher(arguments, tmp_path, 1, devices).free]

    assert slots() == ["0", "1", "2", "3"] and slots("--jobs", "2") == ["0", "1"]
    assert slots(devices=2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slots("--jobs", "3") == ["4", "5", "6"]
    with pytest.raises(ValueError, match="Experiment.devices = 8, but there are 4 GPUs"):
        slots(devices=8)


def test_a_run_that_a_killed_ablate_left_at_work_is_waited_for(tmp_path, inline, monkeypatch):
    folder = tmp_path / "runs" / "question" / "rope-s0"
    folder.mkdir(parents=True)
    lock, looks = filelock.FileLock(folder / ".lock"), []
    lock.acquire()
    held = jobs.JobQueue._is_locked

    def looking(queue, job):
        looks.append(job.run)
        if len(looks) == 6:
            lock.release()
        return held(queue, job)

    monkeypatch.setattr(jobs.JobQueue, "_is_locked", looking)
    assert ablated(write_plan(tmp_path), tmp_path / "runs") == 0
    assert inline.last.order == ["none-s0", "rope-s0"]


@pytest.mark.parametrize("launcher, package", [("slurm", "submitit"), ("ray", "ray")])
def test_a_launcher_without_its_package_says_what_to_install(launcher, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf'--launcher {launcher} needs .*: python -m pip install -e "\.\[{launcher}\]"'
    ):
        ablated(write_plan(tmp_path), tmp_path / "runs", "--launcher", launcher)


def test_slurm_without_slurm_says_so(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="Slurm not found .no srun.; log in to a machine of the cluster"):
        ablated(write_plan(tmp_path), tmp_path / "runs", "--launcher", "slurm")


SHIPPED = sorted((ROOT / "experiments").glob("*/plan.gin"))
LESS = ("Experiment.eval_windows = 10", "SyntheticStories.stories = 200", "SyntheticStories.val_stories = 20")
TRUE = {
    "position": {"parameters"},  # a learned table has 7 % more than no table
    "recall": {"parameters", "FLOPs per token"},  # a convolution has filters, and attention computes scores
    "induction": {"parameters", "FLOPs per token"},  # one layer against two
}


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_no_guard_fires_on_a_plan_that_we_ship_but_for_what_is_so(path, tmp_path, inline):
    """Each plan of experiments/, at its size, trained for real on two seeds for twelve steps on less text."""
    text = path.read_text(encoding="utf-8")
    less = LESS[:1] if "gin/data/" in text else LESS  # the others have no stories
    for old, new in {
        r"seeds = \[0, 1, 2, 3, 4\]": "seeds = [0, 1]",
        r"Ablation\.steps = \d+": "Ablation.steps = 12",
        r"'warmup_steps = \d+'": "'warmup_steps = 2'",
        r"Ablation\.common = \[": f"Ablation.common = [{', '.join(map(repr, less))},",
    }.items():
        text, count = re.subn(old, new, text)
        assert count == 1, old
    plan = tmp_path / path.parent.name / "plan.gin"
    plan.parent.mkdir()
    plan.write_text(text, encoding="utf-8")
    assert ablate.main([str(plan), "--runs", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / plan.parent.name
    assert compare.main([str(folder)]) == 0
    record = json.loads((folder / "compare" / "compare.json").read_text())
    fired = {banner["guard"] for banner in record["banners"]} - {"dirty tree"}  # that is the tree's affair
    assert fired == TRUE.get(path.parent.name, set())
    assert all(arm["n"] == 2 for arm in record["arms"])
