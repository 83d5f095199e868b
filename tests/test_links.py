"""A folder from a stranger may hold links. Nothing is written or deleted through one, and code is announced."""

import contextlib
import os
import shutil

import pytest
from plans import Inline, write_plan
from runs import command, small_run

from toolkit import ablate, compare, run
from toolkit.comparison import figures
from toolkit.compose import open_run
from toolkit.store import disk


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at 4; read, never written to."""
    runs = tmp_path_factory.mktemp("stopped")
    assert small_run(runs, "a", "--stop-at", "4") == 0
    return runs / "a"


@pytest.fixture
def given(stopped, tmp_path):
    """A copy of it, and a file and a folder outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    shutil.copytree(stopped, tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a", outside


def untouched(outside):
    return {path.name: path.read_text() for path in outside.iterdir()} == {"precious": "as it was"}


FILES = ("metrics.jsonl", "samples.md", "status.json", "facts.json", "bindings.gin", "config.gin", "curve.png", ".lock")
DRAFTS = ("status.json.tmp", "config.gin.tmp", "metrics.csv", "tokenizer/x", "code/x.py", "checkpoints/x")
FOLDERS = ("checkpoints", "tokenizer", "code", "checkpoints/step-00000004", "checkpoints/step-00000002", "wandb")


@pytest.mark.parametrize("name", FILES + DRAFTS)
def test_a_resume_writes_through_no_link_to_a_file(name, given):
    folder, outside = given
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside / "precious")
    with pytest.raises(ValueError):
        small_run(folder.parent, "a", "--resume")
    assert untouched(outside)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("target", ["outside", "absent"])
def test_a_resume_writes_through_no_link_to_a_folder(name, target, given):
    folder, outside = given
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to(outside if target == "outside" else outside / "absent")
    with pytest.raises(ValueError):
        small_run(folder.parent, "a", "--resume")
    assert untouched(outside)


def test_a_link_names_what_to_do(given):
    folder, outside = given
    (folder / "samples.md").unlink(missing_ok=True)
    (folder / "samples.md").symlink_to(outside / "precious")
    with pytest.raises(
        ValueError, match=r"samples.md is a link to .*precious, and nothing is written .*: delete the link"
    ):
        small_run(folder.parent, "a", "--resume")


def test_a_pipe_in_a_run_is_refused(given):
    folder, _ = given
    os.mkfifo(folder / "code")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        small_run(folder.parent, "a", "--resume")


def test_a_run_may_itself_be_a_link_and_hold_links_that_stay_inside(given, tmp_path):
    folder, _ = given
    (folder / "latest").symlink_to("checkpoints/best")
    elsewhere = tmp_path / "runs" / "kept"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert small_run(folder.parent, "a", "--resume") == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A plan's folder with its jobs done, compared once; read, never written to."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "_launcher", lambda *_: Inline())
        patch.setattr(figures, "draw", lambda comparison: {})
        assert ablate.main([str(write_plan(root)), "--runs", str(root / "runs")]) == 0
    return root


PLAN_FILES = ("plan.json", "plan.gin", "common.gin", "plan.json.tmp", "plan.gin.tmp", "common.gin.tmp", ".lock")
TABLES = tuple(f"compare/{name}" for name in ("compare.html", "report.md", "compare.csv", "compare.json"))
PLAN_FOLDERS = ("compare", "compare/tensorboard")


@pytest.mark.parametrize("name", PLAN_FILES + TABLES + PLAN_FOLDERS + ("compare/report.md.tmp", "rope-s0"))
@pytest.mark.parametrize("module", [compare, ablate], ids=["compare", "ablate"])
def test_nothing_is_written_through_a_link_in_a_folder_of_a_plan(name, module, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "_launcher", lambda *_: Inline())
    monkeypatch.setattr(figures, "draw", lambda comparison: {})
    folder, outside = tmp_path / "runs" / "question", tmp_path / "outside"
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    link = folder / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if "." not in link.name and name != ".lock" else outside / "precious")
    words = (
        [str(folder)]
        if module is compare
        else [str(tmp_path / "question" / "plan.gin"), "--runs", str(tmp_path / "runs")]
    )
    with contextlib.suppress(ValueError):
        module.main(words)
    assert untouched(outside)


def test_a_draft_that_is_a_link_is_replaced(tmp_path):
    (tmp_path / "precious").write_text("as it was")
    for name in ("x.json.tmp", "x.json"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    disk.write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "precious").read_text() == "as it was"
    assert (tmp_path / "x.json").read_text() == "new" and not (tmp_path / "x.json").is_symlink()


def test_code_of_a_run_is_announced_and_can_be_refused(tmp_path):
    part = tmp_path / "linked_norm.py"
    part.write_text(
        "from torch import nn\nfrom toolkit.registry import register\n\n"
        '@register("norm")\nclass LinkedNorm(nn.LayerNorm):\n    """A norm."""\n\n'
        "    def __init__(self, dim: int):\n        super().__init__(dim)\n"
    )
    flags = ("--import", str(part), "--stop-at", "4")
    assert small_run(tmp_path / "runs", "a", *flags, bindings=("GPT.norm = @LinkedNorm",)) == 0
    copy = tmp_path / "runs" / "a" / "code" / "linked_norm.py"
    told = f"running {copy}, a copy in the run's folder; --no-code forbids this"
    done = command("toolkit.generate", str(tmp_path / "runs" / "a"), "--max-tokens", "2")
    assert done.returncode == 0 and told in done.stderr
    for module, *words in (
        ("toolkit.generate", str(tmp_path / "runs" / "a")),
        ("toolkit.evaluate", str(tmp_path / "runs" / "a")),
        ("toolkit.run", "--runs", str(tmp_path / "runs"), "--name", "a", "--resume"),
    ):
        done = command(module, *words, "--no-code")
        assert done.returncode == 2 and "--no-code forbids running" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="--no-code"):
        open_run(tmp_path / "runs" / "a", code=False)
    assert run.main(["--dry-run", "--base", str(tmp_path / "runs" / "a" / "config.gin"), "--runs", str(tmp_path)]) == 0
