"""Resumed into a changed world: what is taken, what is refused, and what is said of it."""

import pytest
from runs import facts, small_run

SHAPED = {
    "model": ("GPT.dim = 64", "GPT.norm = @RMSNorm", "GPT.position = [@RoPE, @NoPE]", "LayerNorm.eps = 1e-3"),
    "data": ("Experiment.seed = 1", "Experiment.batch_size = 8", "SyntheticStories.corpus_seed = 5"),
    "training": ("AdamW.lr = 1e-2", "Experiment.steps = 13", "Experiment.clip = None", "Experiment.eval_windows = 7"),
}
CASES = [(shaped, binding) for shaped, bindings in SHAPED.items() for binding in bindings]
HARMLESS = {
    "Experiment.log_every": (1, 2),
    "Experiment.checkpoint_every": (4, 3),
    "Console.seconds": (10.0, 3.0),
}


@pytest.mark.fault(21, "resumed with another model, data or training", 1)
@pytest.mark.parametrize("shaped, binding", CASES, ids=[binding for _, binding in CASES])
def test_a_change_is_refused_under_its_heading_and_nothing_is_touched(shaped, binding, fault, tmp_path):
    small_run(tmp_path, "a", "--stop-at", "4")
    files = ("metrics.jsonl", "config.gin", "facts.json", "samples.md")
    before = [(tmp_path / "a" / name).read_bytes() for name in files if (tmp_path / "a" / name).exists()]
    key = binding.split(" =")[0]
    with pytest.raises(ValueError, match=rf"(?s)--allow-change.*  {shaped} +{key}: was .*, is now .*") as refused:
        small_run(tmp_path, "a", "--resume", bindings=(binding, "Experiment.log_every = 2"))
    fault.happened = "  harmless  Experiment.log_every: was 1, is now 2" in str(refused.value)
    assert before == [(tmp_path / "a" / name).read_bytes() for name in files if (tmp_path / "a" / name).exists()]


@pytest.mark.fault(21, "resumed with a change that was allowed", 1)
def test_an_allowed_change_is_in_the_facts(fault, tmp_path):
    small_run(tmp_path, "a", "--stop-at", "4")
    change = ("AdamW.lr = 1e-2",)
    assert small_run(tmp_path, "a", "--resume", "--allow-change", "--stop-at", "5", bindings=change) == 0
    assert facts(tmp_path / "a")["resumed"] == [{"step": 4, "changed": {"AdamW.lr": [0.003, 0.01]}}]
    fault.happened = facts(tmp_path / "a")["config"]["AdamW.lr"] == 0.01


@pytest.mark.fault(22, "resumed with a harmless change", 1)
@pytest.mark.parametrize("key", HARMLESS)
def test_a_harmless_change_is_taken_and_recorded(key, fault, tmp_path):
    small_run(tmp_path, "a", "--stop-at", "4")
    was, now = HARMLESS[key]
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "5", bindings=(f"{key} = {now}",)) == 0
    assert facts(tmp_path / "a")["resumed"] == [{"step": 4, "changed": {key: [was, now]}}]
    fault.happened = facts(tmp_path / "a")["config"][key] == now
