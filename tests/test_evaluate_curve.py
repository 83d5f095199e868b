"""``python -m toolkit.evaluate RUN --checkpoints``: several checkpoints of one run, measured as each of them alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import small_run
from safetensors.torch import load_file, save_file

from toolkit import evaluate
from toolkit.evaluation.reader import Reader
from toolkit.store import checkpoint, sealed

BINDINGS = (
    "Experiment.evaluators = [@Induction, @Completion]",
    "Induction.length = 8",
    "Completion.prompts = ['The']",
    "Completion.pattern = 'a'",
    "Completion.max_tokens = 3",
    "Experiment.keep_checkpoints = 3",
    "Experiment.eval_windows = 1",
)
FAST = ["-p", "SyntheticStories.val_stories = 2", "-p", "Induction.sequences = 4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    assert small_run(folder, "a", bindings=BINDINGS) == 0
    return folder / "a"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, which a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "a"))


def measured(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json", *FAST]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_checkpoint_is_measured_as_alone(trained, tmp_path, capsys):
    found = measured(capsys, trained, "--checkpoints", "all", "--items", tmp_path)
    assert [row["step"] for row in found["checkpoints"]] == [4, 8, 12] and found["run"] == str(trained)
    alone = [measured(capsys, trained / "checkpoints" / f"step-{step:08d}") for step in (4, 8, 12)]
    assert [{"split": "val", "windows": found["windows"]} | row for row in found["checkpoints"]] == alone
    assert len({row["eval/Induction/nats_second_half"] for row in alone}) == 3
    assert len(list(tmp_path.glob("Induction/step-*.jsonl"))) == 3
    some = measured(capsys, trained, "--checkpoints", "12,4,4")
    assert [row["step"] for row in some["checkpoints"]] == [4, 12]


def test_the_best_checkpoint_counts_at_its_step(run):
    best = checkpoint.read_manifest(run / "checkpoints" / "best")["step"]
    assert checkpoint.kept(run)[best].name == f"step-{best:08d}"
    shutil.rmtree(run / "checkpoints" / f"step-{best:08d}")
    assert checkpoint.kept(run)[best].name == "best" and list(checkpoint.kept(run)) == [4, 8, 12]
    assert list(checkpoint.kept(run, [best])) == [best]


def test_missing_and_damaged_checkpoints_are_named_before_anything_is_measured(run, capsys, monkeypatch):
    monkeypatch.setattr("toolkit.compose.open_run", lambda *arguments: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"step 5: not found; step 9: not found; .* of steps 4,8,12"):
        evaluate.main([str(run), "--checkpoints", "4,5,9"])
    with open(run / "checkpoints" / "step-00000008" / "model.safetensors", "r+b") as file:
        file.write(b"12345678")
    with pytest.raises(ValueError, match=r"step 8: .*model.safetensors.*; it has sound checkpoints of steps 4,12"):
        evaluate.main([str(run), "--checkpoints", "all"])
    with pytest.raises(ValueError, match="best is not a run.*--checkpoints needs one"):
        evaluate.main([str(run / "checkpoints" / "best"), "--checkpoints", "all"])
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--checkpoints", "4,,8"])
    assert "'4,,8': write all, or steps such as 1000,2000" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        evaluate.main([str(run), "--checkpoints", "all"])


def test_a_damaged_checkpoint_that_is_not_chosen_does_no_harm(run, capsys):
    (run / "checkpoints" / "step-00000008" / "manifest.json").write_text("{")
    found = measured(capsys, run, "--checkpoints", "4,12")
    assert [row["step"] for row in found["checkpoints"]] == [4, 12]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(columns, trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    capsys.readouterr()
    assert evaluate.main([str(trained), "--checkpoints", "all", *FAST]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= columns
    assert len(re.findall(r"^ *step ", out, re.M)) == (2 if columns == 80 else 1)
    for name in ("loss_nats", "bits_per_byte", "nats_second_half", "nats_first_half", "match", "distinct_2"):
        assert len(re.findall(rf"\b{name}\b", out)) == 1


def test_a_metric_that_a_checkpoint_lacks_is_shown_as_such(run, capsys, monkeypatch):
    """A model whose logits are not finite generates nothing."""
    folder = run / "checkpoints" / "step-00000008"
    weights = {
        name: torch.full_like(value, torch.nan) for name, value in load_file(folder / "model.safetensors").items()
    }
    kept = {name: value for name, value in checkpoint.read_manifest(folder).items() if name not in ("files", "sha256")}

    def fill(temporary: Path) -> dict:
        save_file(weights, temporary / "model.safetensors")
        shutil.copy(folder / "state.pt", temporary / "state.pt")
        return kept

    sealed.write(folder, fill, checkpoint.STYLE)
    monkeypatch.setenv("COLUMNS", "120")
    assert evaluate.main([str(run), "--checkpoints", "8,12", *FAST]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["8"] == ["nan"] * 4 + ["-", "-"] and "nan" not in lines["12"]


def test_items_into_a_file_are_refused_before_anything_is_measured(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(Reader, "token_nats", lambda *_: pytest.fail("measured"))
    for folder in ("file", "file/inside"):
        with pytest.raises(ValueError, match=r"--items .*file is a file; name a folder"):
            evaluate.main([str(trained), "--items", str(tmp_path / folder)])
    assert (tmp_path / "file").read_text() == "kept"
