"""What a resumed run accepts, what it refuses, and what a save that fails leaves behind."""

import hashlib
import json
import math
from dataclasses import fields

import pytest
from plans import write_plan
from runs import rows, small_run

from toolkit.ablation import plan
from toolkit.comparison import runs
from toolkit.config import changes
from toolkit.config.layers import ConfigError
from toolkit.experiment import Experiment
from toolkit.loop.spikes import WINDOW, Spikes
from toolkit.registry import CATALOG
from toolkit.rundir.folder import RunDir
from toolkit.store import checkpoint
from toolkit.store.disk import read_json, write_json


def test_every_knob_of_the_experiment_is_in_one_class_of_change():
    listed = [knob for knobs in changes.EXPERIMENT.values() for knob in knobs]
    assert sorted(listed) == sorted(field.name for field in fields(Experiment))
    assert changes.shapes("GPT.dim") == changes.shapes("short/RoPE.theta") == "model"
    assert changes.shapes("Bytes.x") == "data" and changes.shapes("AdamW.lr") == "training"
    assert changes.shapes("Console.seconds") == "harmless" and changes.shapes("GoneFromTheShelf.x") == "model"


def test_a_longer_run_goes_on_where_the_finished_one_ended(tmp_path):
    small_run(tmp_path, "a", bindings=("Experiment.steps = 4",))
    more = ("Experiment.steps = 6",)
    assert small_run(tmp_path, "a", "--resume", "--allow-change", bindings=more) == 0
    assert json.loads((tmp_path / "a" / "status.json").read_text())["step"] == 6
    assert [row["step"] for row in rows(tmp_path / "a") if "train/loss_nats" in row] == list(range(6))


def test_a_config_that_nobody_can_compare_is_not_taken_on_trust(tmp_path):
    """facts.json is lost: the state of the checkpoint has the config's digest."""
    small_run(tmp_path, "a", "--stop-at", "4")
    (tmp_path / "a" / "facts.json").unlink()
    with pytest.raises(ValueError, match="another config"):
        small_run(tmp_path, "a", "--resume", bindings=("AdamW.lr = 1e-2",))
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "5") == 0


@pytest.mark.parametrize("older", [False, True])
def test_a_reworded_docstring_does_not_change_a_config(tmp_path, monkeypatch, older):
    """config.gin repeats the docstrings in comments; older versions took the digest of the comments too."""
    if older:
        digest = property(lambda config: hashlib.sha256(config.text.encode()).hexdigest())
        monkeypatch.setattr("toolkit.config.layers.Config.digest", digest)
    small_run(tmp_path, "a", "--stop-at", "4")
    monkeypatch.undo()
    monkeypatch.setattr(CATALOG["LayerNorm"].cls, "__doc__", "Reworded.")
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.text.tokens.TokenFiles.prepare", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_run(tmp_path, "a", "--resume")
    assert not runs.find([str(tmp_path / "a")], None, None)[1][0].edits
    (tmp_path / "a" / "facts.json").unlink()
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "5") == 0
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "6") == 0
    assert not runs.find([str(tmp_path / "a")], None, None)[1][0].edits


def test_a_spike_is_left_out_once_there_is_a_past_to_compare_with():
    past = [(1.0 + 0.01 * (i % 2), 2.0) for i in range(WINDOW)]
    spikes, none = Spikes(6.0), Spikes(None)
    assert not any(spikes.is_spike(*step) for step in [(9.0, 9.0), *past])  # the first has left the window
    assert spikes.is_spike(1.2, 2.0) and spikes.is_spike(1.0, 2.1) and spikes.state["count"] == 2
    assert not spikes.is_spike(1.005 + 5.9 * 0.005, 2.0)
    again = Spikes(6.0, json.loads(json.dumps(spikes.state)))
    assert again.is_spike(1.2, 2.0) and len(again.state["history"]) == WINDOW
    assert not any(none.is_spike(*step) for step in [*past, (math.inf, 1.0)])


def test_a_skipped_step_is_recorded_and_a_resume_repeats_it(tmp_path):
    bindings = ("Experiment.steps = 150", "Experiment.eval_every = 150", "Experiment.checkpoint_every = 140")
    # next to no learning: the loss goes up and down around one level, so that some step is sure to stand out
    bindings += ("Experiment.sample_every = 150", "Experiment.spike_sigmas = 0.5", "AdamW.lr = 1e-5")
    assert small_run(tmp_path, "a", bindings=bindings) == 0
    skipped = [row for row in rows(tmp_path / "a") if "skipped/count" in row]
    assert skipped and [row["skipped/count"] for row in skipped] == list(range(1, len(skipped) + 1))
    assert all(row["step"] >= WINDOW and set(row) >= {"skipped/loss_nats", "skipped/grad_norm"} for row in skipped)
    assert small_run(tmp_path, "b", "--stop-at", "140", bindings=bindings) == 0
    assert small_run(tmp_path, "b", "--resume", bindings=bindings) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


# --- no step left


def test_a_stop_that_lies_behind_the_checkpoint_is_refused(tmp_path):
    small_run(tmp_path, "a", "--stop-at", "8")
    before = (tmp_path / "a" / "status.json").read_bytes()
    with pytest.raises(ValueError, match=r"the checkpoint is at step 8, past --stop-at 4: no step is left"):
        small_run(tmp_path, "a", "--resume", "--stop-at", "4")
    assert (tmp_path / "a" / "status.json").read_bytes() == before
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "8") == 0  # it is there already


@pytest.mark.parametrize("flags, bindings, where", [
    ((), ("Experiment.steps = 8",), "at Experiment.steps = 8"),
    ((), ("Experiment.steps = 6",), "past Experiment.steps = 6"),
    (("--stop-at", "8"), (), "at --stop-at 8"),
])  # fmt: skip
def test_a_branch_without_a_step_to_train_is_refused(flags, bindings, where, tmp_path):
    small_run(tmp_path, "a", "--stop-at", "8")
    branch = ("--from", str(tmp_path / "a" / "checkpoints" / "step-00000008"))
    with pytest.raises(ValueError, match=f"step 8, {where}: .*--weights-only"):
        small_run(tmp_path, "b", *branch, *flags, bindings=bindings)
    assert not (tmp_path / "b").exists()
    assert small_run(tmp_path, "b", *branch, "--weights-only", *flags, bindings=bindings) == 0


# --- the end


def test_a_run_whose_end_was_lost_tells_the_same_summary(tmp_path):
    """Its last step was saved, and facts.json has no ``final`` yet."""
    small_run(tmp_path, "a")
    path = tmp_path / "a" / "facts.json"
    whole = json.loads(path.read_text())
    lost = {key: value for key, value in whole.items() if key not in ("final", "seal", "weights_sha256")}
    path.write_text(json.dumps(lost))
    (tmp_path / "a" / "status.json").write_text(json.dumps({"state": "running", "step": 8}))
    events = set((tmp_path / "a").glob("events*"))
    assert small_run(tmp_path, "a", "--resume") == 0
    assert json.loads(path.read_text())["final"] == whole["final"]
    shown = [scalars(file) for file in set((tmp_path / "a").glob("events*")) - events]
    assert shown and all("train/loss_nats" not in tags for tags in shown)  # a point at step 12 would be a wrong one


def scalars(file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(file)).Reload().Tags()["scalars"]


@pytest.mark.parametrize("broken", ["rundir.curve.draw", "rundir.report.footer"])
def test_what_comes_after_training_changes_nothing(broken, tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(f"toolkit.{broken}", fails)
    assert small_run(tmp_path, "a") == 0
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "done"
    assert "can't be shown: no font" in caplog.text


def refuse(monkeypatch, name, times):
    """The disk refuses so many saves of a checkpoint; returns how often it was asked."""
    asked, save = [], checkpoint.save

    def refusing(folder, *arguments):
        if folder.name == name:
            asked.append(folder)
            if len(asked) in times:
                raise OSError(5, "Input/output error")
        return save(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", refusing)
    monkeypatch.setattr(checkpoint, "PAUSES", (0.01, 0.01))
    return asked


def test_a_best_checkpoint_that_is_refused_once_is_tried_again(tmp_path, monkeypatch):
    small_run(tmp_path, "straight")
    asked = refuse(monkeypatch, "best", times=[3])  # at steps 0, 6 and 12
    assert small_run(tmp_path, "a") == 0
    assert len(asked) == 4
    one, other = (tmp_path / run / "checkpoints" / "best" / "model.safetensors" for run in ("straight", "a"))
    assert one.read_bytes() == other.read_bytes()
    assert "not_saved" not in json.loads((tmp_path / "a" / "status.json").read_text())


def test_a_best_checkpoint_that_can_not_be_kept_is_told(tmp_path, monkeypatch):
    refuse(monkeypatch, "best", times=[3, 4, 5])
    assert small_run(tmp_path, "a") == 0
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert status["state"] == "done" and "checkpoints/best" in status["not_saved"]
    final = json.loads((tmp_path / "a" / "facts.json").read_text())["final"]
    assert final["best"] == checkpoint.best_score(tmp_path / "a" / "checkpoints")  # the score of what is there


def test_a_status_that_finds_no_room_overwrites_the_old_one(tmp_path, monkeypatch):
    small_run(tmp_path, "a", "--stop-at", "4")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.rundir.folder.write_json", full)
    RunDir(tmp_path, "a", resume=True).write_status("failed", reason="no room")
    assert read_json(tmp_path / "a" / "status.json")["state"] == "failed"


def test_facts_that_find_no_room_at_the_end_fail_the_run(tmp_path, monkeypatch):
    def full(path, value):
        if path.name == "facts.json" and "final" in value:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr("toolkit.rundir.folder.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        small_run(tmp_path, "a")
    assert read_json(tmp_path / "a" / "status.json")["state"] == "failed"
    monkeypatch.undo()
    assert small_run(tmp_path, "a", "--resume") == 0
    assert read_json(tmp_path / "a" / "facts.json")["final"]["step"] == 12


def test_drafts_of_a_killed_process_are_swept(tmp_path):
    small_run(tmp_path, "a")
    (tmp_path / "a" / "curve.png.tmp").write_bytes(b"half")
    assert small_run(tmp_path, "a", "--resume") == 0
    assert not list((tmp_path / "a").glob("*.tmp"))


@pytest.mark.parametrize(
    "binding, told",
    [
        (
            "Experiment.seed = 99999999999999999999",
            "an integer must lie between -9223372036854775807 and 9223372036854775807",
        ),
        ("AdamW.betas = (0.9, 99999999999999999999)", "an integer must lie between"),
        ("Experiment.steps = 100000000", "should be less than or equal to 99999999"),
    ],
)
def test_numbers_that_nothing_can_hold_are_refused_with_their_range(binding, told, tmp_path):
    with pytest.raises(ConfigError, match=f"-p .*{told}"):
        small_run(tmp_path, "a", bindings=(binding,))


def test_a_plan_with_a_seed_that_nothing_can_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"plan.gin:\d+: Ablation.seeds: an integer must lie between"):
        plan.read(write_plan(tmp_path, seeds=[0, 10**20]))


def test_text_that_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"-p .*sample_prompt = .*half of a surrogate pair"):
        small_run(tmp_path, "a", bindings=(r"Experiment.sample_prompt = '\ud800'",))
