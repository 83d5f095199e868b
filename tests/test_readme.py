"""The README's commands, run as they stand there, from the repository's folder with runs elsewhere."""

import re
import shlex
from pathlib import Path

import pytest
from runs import command

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^python -m (toolkit\.\w+.*)$", TEXT, re.MULTILINE)
NEEDS_A_RUN = ("--resume", "--from", "--base runs/")


@pytest.mark.parametrize("line", [line for line in RECIPES if line.startswith("toolkit.run")])
def test_every_recipe_for_a_run_has_a_config_that_works(line, tmp_path):
    """As a dry run: no recipe is out of date."""
    from toolkit import run

    words = shlex.split(line)[1:]
    if not any(flag in line for flag in NEEDS_A_RUN):
        assert run.main([*words, "--runs", str(tmp_path), "--dry-run", "--json"]) == 0


@pytest.mark.slow
def test_the_recipes_for_stopping_resuming_and_branching(tmp_path):
    for line in [line for line in RECIPES if "--name long" in line or "runs/long" in line]:
        words = [word.replace("runs/long", f"{tmp_path}/long") for word in shlex.split(line)]
        done = command(words[0], *words[1:], "--runs", str(tmp_path))
        assert done.returncode == 0, (line, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} >= {"long", "branch", "tuned", "again"}
    for line in [line for line in RECIPES if "runs/quickstart" in line and "text_files" not in line]:
        words = [word.replace("runs/quickstart", f"{tmp_path}/long") for word in shlex.split(line)]
        done = command(words[0], *words[1:])
        assert done.returncode == 0 and done.stdout, (line, done.stderr)


@pytest.mark.slow
def test_the_recipes_for_swapping_train(tmp_path):
    lines = [line for line in RECIPES if line.startswith("toolkit.run gin/model/tiny.gin") and "long" not in line]
    for line in [line for line in lines if "my/" not in line]:
        done = command(*shlex.split(line), "--runs", str(tmp_path))
        assert done.returncode == 0, (line, done.stderr)


def test_the_errors_that_the_readme_shows_are_the_errors_that_come(capsys):
    shown = re.findall(r"^\$ python -m (toolkit\.run .*)\nerror: (.*)$", TEXT, re.MULTILINE)
    assert len(shown) == 2
    for line, error in shown:
        done = command(*shlex.split(line))
        assert done.returncode == 2 and done.stderr.strip().removeprefix("error: ") == error
