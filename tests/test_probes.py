"""Probes: what they see, what a run records of them, and that they change nothing in training."""

import pytest
import torch
from runs import assert_equal, facts, rows, small_run

ALL = ("gin/probe/all.gin",)
EVERY = ("Experiment.probe_every = 5",)


def without_probes(found):
    """Rows without the metrics of probes; a row of these alone is left out."""
    kept = [{name: value for name, value in row.items() if not name.startswith("probe/")} for row in found]
    return [row for row in kept if row.keys() != {"step"}]


def probe_rows(folder):
    """{step: metrics of probes}."""
    return {
        row["step"]: {n: v for n, v in row.items() if n.startswith("probe/")}
        for row in rows(folder)
        if any(name.startswith("probe/") for name in row)
    }


def state(folder, step):
    """Everything that a checkpoint holds of the training, but for the digest of the config."""
    saved = torch.load(folder / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)
    weights = (folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()
    return weights, {name: value for name, value in saved.items() if name != "progress"}


def assert_same_training(plain, probed, step=12):
    (weights, saved), (other_weights, other_saved) = state(plain, step), state(probed, step)
    assert without_probes(rows(probed)) == rows(plain) and weights == other_weights
    assert_equal(saved, other_saved)
    assert (plain / "samples.md").read_text() == (probed / "samples.md").read_text()


def both(tmp_path, *bindings, overlays=(), **options):
    """The same run without and with all probes."""
    assert small_run(tmp_path, "plain", bindings=bindings, overlays=overlays, **options) == 0
    assert small_run(tmp_path, "probed", bindings=(*bindings, *EVERY), overlays=(*overlays, *ALL), **options) == 0
    return tmp_path / "plain", tmp_path / "probed"


WAYS = {
    "plain": (),
    "dropout": ("GPT.dropout = 0.2",),
    "accumulate": ("Experiment.accumulate = 2", "GPT.dropout = 0.2"),
    "bfloat16": ("Experiment.precision = 'bfloat16'",),
    "documents": ("Experiment.mask_documents = True", "GPT.attention = @SDPA"),
    "spikes": ("Experiment.spike_sigmas = 6.0",),
    "untied": ("GPT.tie_embeddings = False", "GPT.recompute = True"),
}


@pytest.mark.parametrize("way", WAYS)
def test_probes_change_nothing_in_training(way, tmp_path):
    plain, probed = both(tmp_path, *WAYS[way])
    assert_same_training(plain, probed)
    assert sorted(probe_rows(probed)) == [0, 5, 10, 11]
    assert facts(probed)["probes"][0] == "Activations" and facts(plain)["probes"] == []
