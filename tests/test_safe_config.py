"""gin files are code. What a config may import, by where it was read; and what it would do, told without doing it."""

import shutil
import sys
from pathlib import Path

import pytest
from runs import command, small_run

from toolkit import run
from toolkit.compose import compose, open_run
from toolkit.config import safety
from toolkit.config.layers import ConfigError
from toolkit.store.seal import unseal_text


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """``trap(name)`` puts a module on the path that leaves a file behind when it is imported; returns that file."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name: str, folder: Path = tmp_path) -> Path:
        mark = tmp_path / f"{name}.ran"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').close()\n")
        made.append(name)
        return mark

    yield make
    for name in made:
        sys.modules.pop(name, None)


def a_run(tmp_path: Path, text: str = "") -> Path:
    """A folder that looks like a run: its config is the default, behind the lines given."""
    folder = tmp_path / "passed_on"
    folder.mkdir()
    (folder / "config.gin").write_text(text + Path("gin/default.gin").read_text())
    return folder


def test_safe_config_lists_what_a_file_does_and_runs_none_of_it(tmp_path, trap):
    mark = trap("safe_evil")
    overlay = tmp_path / "o.gin"
    overlay.write_text("import safe_evil\nGPT:\n  norm = @RMSNorm\nGPT.ffn = @GELU()\ninclude 'more.gin'\n")
    told, refused = safety.scan([str(overlay)], ["GPT.dim = 64"])
    assert f"{overlay}:1: would import safe_evil ({tmp_path / 'safe_evil.py'})" in told
    assert f"{overlay}:3: binds GPT.norm = @RMSNorm" in told and "-p 'GPT.dim = 64': binds GPT.dim = 64" in told
    assert "gin/default.gin:5: binds Experiment.model = @GPT" in told
    assert refused == [
        f"{overlay}:5: include is not supported: name more.gin on the command line instead",
        f"{overlay}:1: would import safe_evil, which is not in toolkit, components, experiments; read it, and pass "
        "--import safe_evil if you trust it",
        f"{overlay}:4: would call GELU: write @GELU, without parentheses",
    ]
    assert not mark.exists() and "safe_evil" not in sys.modules


def test_safe_config_takes_the_shelf_and_what_the_command_line_names(tmp_path, trap, capsys):
    mark = trap("safe_mine")
    overlay = tmp_path / "o.gin"
    overlay.write_text("import safe_mine\nimport experiments.cosine_attention.kernel\nimport components.norm\n")
    for named in ("safe_mine", str(tmp_path / "safe_mine.py")):
        assert run.main([str(overlay), "--safe-config", "--import", named]) == 0
    assert f"{overlay}:2: would import experiments.cosine_attention.kernel" in capsys.readouterr().out
    assert not mark.exists()


def test_safe_config_goes_on_past_a_file_that_is_no_gin(tmp_path):
    broken, other = tmp_path / "broken.gin", tmp_path / "other.gin"
    broken.write_text("GPT.dim = 2 * 3\n")
    other.write_text("import os.path\n")
    _, refused = safety.scan([str(broken), str(other)], base=tmp_path / "nowhere.gin")
    assert [line.split(": ")[0] for line in refused] == [str(tmp_path / "nowhere.gin"), f"{broken}:1", f"{other}:1"]


FOLDER_OF_TASKS = "task files of lm-eval, in which !function runs code"


@pytest.mark.parametrize("knob", ["LMEval", "own/LMEval", "components.harness.LMEval"])
def test_safe_config_refuses_a_folder_of_task_files_unless_the_command_line_names_it(knob, tmp_path, capsys):
    binding = f"{knob}.include_path = 'tasks'"
    overlay = tmp_path / "o.gin"
    overlay.write_text(f"Experiment.final_evaluators = [@LMEval]\n{binding}\nharmless/LMEval.include_path = None\n")
    _, refused = safety.scan([str(overlay)])
    assert refused == [
        f"{overlay}:2: {knob}.include_path names {FOLDER_OF_TASKS}; read them, and bind it with -p if you trust them"
    ]
    with pytest.raises(ConfigError, match="names task files of lm-eval"):
        run.main([str(overlay), "--safe-config"])
    overlay.write_text(f"TASKS = 'tasks'\n{knob}.include_path = %TASKS\n")
    assert len(safety.scan([str(overlay)])[1]) == 1
    assert run.main(["--safe-config", "-p", binding]) == 0
    assert f"binds {binding}" in capsys.readouterr().out


def test_no_code_refuses_a_folder_of_task_files_in_a_runs_config(tmp_path):
    folder = a_run(tmp_path)
    config = folder / "config.gin"
    text = config.read_text().replace("final_evaluators = []", "final_evaluators = [@LMEval]")
    config.write_text(text + "LMEval.tasks = ['a']\nLMEval.include_path = 'tasks'\n")
    line = len(config.read_text().splitlines())
    with pytest.raises(ConfigError) as caught:
        compose(base=config, code=False)
    assert str(caught.value) == (
        f"{config}:{line}: LMEval.include_path names {FOLDER_OF_TASKS}, but --no-code forbids running code that a "
        "run's config names"
    )
    compose(base=config)
    compose(bindings=["LMEval.include_path = 'mine'"], base=config, code=False)  # a person names the folder
    overlay = tmp_path / "o.gin"
    overlay.write_text("Experiment.final_evaluators = [@LMEval]\nLMEval.tasks = ['a']\nLMEval.include_path = 'tasks'\n")
    compose([str(overlay)], code=False)


@pytest.mark.parametrize("last", ["include 'x.gin'", "from __gin__ import dynamic_registration", "GPT.dim = true"])
def test_nothing_is_imported_where_a_later_file_is_refused(last, tmp_path, trap):
    mark = trap("safe_first")
    first, second = tmp_path / "first.gin", tmp_path / "second.gin"
    first.write_text("import safe_first\n")
    second.write_text(last + "\n")
    with pytest.raises(ConfigError, match="second.gin:1: "):
        compose([str(first), str(second)])
    assert not mark.exists()
    compose([str(first)])
    assert mark.exists()  # named by a person, it is a script like any other


@pytest.mark.parametrize("module", ["safe_stranger", "os.path", "experiments_of_mine.parts"])
def test_a_runs_config_imports_nothing_from_elsewhere(module, tmp_path, trap):
    mark = trap("safe_stranger")
    folder = a_run(tmp_path, f"import components.norm\nimport {module}\n")
    with pytest.raises(ConfigError) as caught:
        compose(base=folder / "config.gin")
    assert str(caught.value) == (
        f"{folder}/config.gin:2: {module} is neither in toolkit, components, experiments nor in {folder}/code, and a "
        f"run's config may import nothing else; pass --import {module} if you trust it"
    )
    assert not mark.exists()


def test_the_file_beside_the_facts_counts_as_a_runs_whatever_its_name(tmp_path, trap):
    mark = trap("safe_overlay")
    (tmp_path / "facts.json").write_text("{}")
    overlay = tmp_path / "bindings.gin"
    overlay.write_text("import safe_overlay\n")
    with pytest.raises(ConfigError, match="pass --import safe_overlay"):
        compose([str(overlay)])
    assert not mark.exists()
    compose([str(overlay)], imports=["safe_overlay"])
    assert mark.exists()


def test_a_run_imports_its_own_copy_and_not_the_paths(tmp_path, trap):
    folder = a_run(tmp_path, "import safe_twice\n")
    trap("safe_twice").unlink(missing_ok=True)  # on the path, in another edition than the run keeps
    (folder / "code").mkdir()
    (folder / "code" / "safe_twice.py").write_text("EDITION = 'kept'\n")
    _, kept = compose(base=folder / "config.gin")
    assert sys.modules["safe_twice"].EDITION == "kept" and kept == [folder / "code" / "safe_twice.py"]
    assert not (tmp_path / "safe_twice.ran").exists()
    other = shutil.copytree(folder, tmp_path / "another")
    compose(base=other / "config.gin")  # the same module: the one that is loaded will do
    (other / "code" / "safe_twice.py").write_text("EDITION = 'another'\n")
    with pytest.raises(ConfigError, match=r"another/config.gin:1: .*another 'safe_twice' is already loaded"):
        compose(base=other / "config.gin")


def test_a_link_out_of_a_runs_code_is_no_code_of_its_own(tmp_path, trap):
    mark = trap("safe_linked", tmp_path / "elsewhere")
    folder = a_run(tmp_path, "import safe_linked\n")
    (folder / "code").mkdir()
    (folder / "code" / "safe_linked.py").symlink_to(tmp_path / "elsewhere" / "safe_linked.py")
    with pytest.raises(ConfigError, match="pass --import safe_linked"):
        compose(base=folder / "config.gin")
    assert not mark.exists()


def test_a_package_that_borrows_a_name_of_the_shelf_is_not_on_it(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("1 / 0\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    folder = a_run(tmp_path, "import experiments.cosine_attention.kernel\n")
    with pytest.raises(ConfigError) as caught:
        compose(base=folder / "config.gin")
    assert str(caught.value).endswith(f"if you trust it (here, experiments is {tmp_path / 'experiments'})")


PART = """\
from components.ffn import GELU
from toolkit.registry import register


@register("ffn")
class SafeOwn(GELU):
    def __init__(self, dim):
        super().__init__(dim)
"""


@pytest.mark.slow
def test_a_run_keeps_a_module_of_ones_own_and_is_used_without_the_original(tmp_path):
    work, runs = tmp_path / "work", tmp_path / "runs"
    work.mkdir()
    (work / "safe_own.py").write_text(PART)
    overlay = tmp_path / "o.gin"
    overlay.write_text("import safe_own\nGPT.ffn = @SafeOwn\n")
    env = {"PYTHONPATH": f"{work}:{Path.cwd()}"}
    flags = ("-p", "Experiment.steps = 4", "-p", "warmup_steps = 2", "--runs", str(runs))
    done = command("toolkit.run", "gin/model/check.gin", str(overlay), *flags, "--name", "a", "--stop-at", "2", **env)
    assert done.returncode == 0, done.stderr
    assert (runs / "a" / "code" / "safe_own.py").read_text() == PART
    shutil.rmtree(work)
    for module, *words in (
        ("toolkit.run", "--runs", str(runs), "--name", "a", "--resume"),
        ("toolkit.generate", str(runs / "a"), "--max-tokens", "3"),
        ("toolkit.evaluate", str(runs / "a")),
        ("toolkit.run", "--base", str(runs / "a" / "config.gin"), "--runs", str(runs), "--name", "b"),
    ):
        done = command(module, *words)
        assert done.returncode == 0, done.stderr
    assert (runs / "b" / "code" / "safe_own.py").read_text() == PART


def test_generate_and_evaluate_name_the_flag_and_take_it(tmp_path, trap):
    from toolkit import evaluate, generate

    mark = trap("safe_extra")
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    config = tmp_path / "a" / "config.gin"
    config.write_text("import safe_extra\n" + unseal_text(config.read_text()).text)  # a stranger leaves no broken seal
    (tmp_path / "a" / "facts.json").unlink()  # it is a run still
    with pytest.raises(ConfigError, match="pass --import safe_extra if you trust it"):
        open_run(tmp_path / "a")
    for main, *words in ((generate.main, "--max-tokens", "2"), (evaluate.main,)):
        with pytest.raises(ConfigError, match="pass --import safe_extra if you trust it"):
            main([str(tmp_path / "a"), *words])
        assert not mark.exists()
    assert generate.main([str(tmp_path / "a"), "--max-tokens", "2", "--import", "safe_extra"]) == 0
    assert mark.exists()
    assert evaluate.main([str(tmp_path / "a"), "--import", "safe_extra"]) == 0
