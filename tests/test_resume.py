"""What a resumed run accepts, what it refuses, and what a save that fails leaves behind."""

import json
import math
from dataclasses import fields

import pytest
from runs import rows, small_run

from toolkit import changes
from toolkit.spikes import WINDOW, Spikes
from toolkit.train import Experiment


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
