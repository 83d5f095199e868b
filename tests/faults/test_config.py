"""The config guard and what it lets a file do, by the rows of the fault matrix: 17 to 20, 36 and 46."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import mutants
import pytest
from runs import arguments, command

from toolkit import run
from toolkit.config.layers import ConfigError

ROOT = Path(__file__).parent.parent.parent

# what a stranger's gin file can do to the library, which follows every one of these
EVIL = {
    "import": "import evil_module\n",
    "dynamic registration": (
        "from __gin__ import dynamic_registration\nimport __main__\nimport subprocess\n"
        "subprocess.getoutput.cmd = 'touch MARK'\n__main__.victim.x = @subprocess.getoutput()\n"
    ),
    "include": "include 'FOLDER/more.gin'\n",
    "import behind a harmless one": "import components.norm\nfrom evil_module import anything\n",
}
LOAD = "import sys, gin\n@gin.register\ndef victim(x=0): ...\ngin.parse_config_file(sys.argv[1])\n"
LOAD += "gin.get_configurable('victim')()\n"


@pytest.mark.slow
@pytest.mark.fault(17, "a gin file that imports, includes or calls", len(EVIL))
def test_a_malicious_gin_file_is_listed_and_refused_and_runs_nothing(fault, tmp_path):
    payload = list(EVIL.values())[fault.repetition % len(EVIL)]
    mark, overlay = tmp_path / "mark", tmp_path / "overlay.gin"
    (tmp_path / "evil_module.py").write_text(f"open({str(mark)!r}, 'w').close()\nanything = None\n")
    (tmp_path / "more.gin").write_text("import evil_module\n")
    overlay.write_text(payload.replace("MARK", str(mark)).replace("FOLDER", str(tmp_path)))
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", LOAD, str(overlay)], env=env, cwd=ROOT, capture_output=True)
    fault.happened = mark.exists()  # the library itself falls for it
    mark.unlink(missing_ok=True)
    done = command("toolkit.run", str(overlay), "--safe-config", PYTHONPATH=env["PYTHONPATH"])
    assert done.returncode == 2 and "Traceback" not in done.stderr and not mark.exists(), done.stderr
    assert done.stderr.startswith(f"error: {overlay}:") and "gin/default.gin:5: binds" in done.stdout


@pytest.mark.slow
@pytest.mark.fault(18, "every binding of default.gin made wrong in every way", 1)
def test_nearly_every_mutant_of_the_default_is_noticed(fault):
    started, chosen = time.process_time(), mutants.mutants()[fault.repetition % 4 :: 4]
    scores, alive, _ = mutants.judge(chosen)
    killed, total = (sum(getattr(score, of) for score in scores.values()) for of in ("killed", "total"))
    fault.happened = total > 1000 and all(score.total for kind, score in scores.items())
    assert killed / total >= 0.99, "\n".join(f"{mutant.change}: {why}" for mutant, why in alive)
    assert time.process_time() - started < 60


WRONG = (
    "AdamW.lr = '3e-4'",
    "AdamW.lr = -1.0",
    "AdamW.lr = 0.0",
    "AdamW.lr = 1e999",
    "AdamW.lr = nan",
    "AdamW.lr = None",
    "AdamW.betas = 0.9",
    "AdamW.betas = (0.9, 1.5)",
    "AdamW.weight_decay = -0.1",
    "AdamW.no_decay = ['nothing.*']",
    "GPT.n_layer = -1",
    "GPT.n_layer = 0",
    "GPT.n_layer = 2.5",
    "GPT.n_layer = [2]",
    "GPT.n_head = 5",
    "GPT.n_kv_head = 5",
    "GPT.dim = '96'",
    "GPT.dim = 97",
    "GPT.dropout = 1.0",
    "GPT.tie_embeddings = 'yes'",
    "GPT.norm = 'LayerNorm'",
    "GPT.attention = [@FlashAttention, @FlashAttention, @FlashAttention, @FlashAttention, @FlashAttention]",
    "Experiment.batch_size = 7.0",
    "Experiment.accumulate = 3",
    "Experiment.clip = 0",
    "Experiment.seed = -1",
    "Experiment.precision = 'float16'",
    "Experiment.keep_checkpoints = 1",
    "Experiment.sample_temperature = -0.5",
    "warmup_steps = 12",
)


@pytest.mark.fault(19, "a value of the wrong type or out of range", len(WRONG))
def test_a_wrong_value_is_refused_before_anything_is_read_or_written(fault, tmp_path, monkeypatch):
    wrong = WRONG[fault.repetition % len(WRONG)]
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        run.main(arguments(tmp_path / "runs", "a", bindings=(wrong,)))
    assert time.process_time() - started < 5
    key = wrong.partition(" =")[0]
    fault.happened = key.rpartition(".")[2] in str(caught.value)  # it was this value
    assert "-p " in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.fault(19, "the same, by the command itself", 3)
def test_the_command_refuses_a_wrong_value_with_exit_code_2_within_5_seconds(fault, tmp_path):
    wrong = ("AdamW.lr = 'abc'", "GPT.n_head = 5", "GPT.n_layer = -1")[fault.repetition % 3]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = arguments(tmp_path / "runs", "a", bindings=(wrong,))
    done = command("toolkit.run", *line, TOOLKIT_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    fault.happened = wrong.split(" =")[0] in done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5, "seconds of the processor"
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


DEEP = {
    "a file that is not there": "include 'nowhere.gin'\n",
    "itself": "include 'overlay.gin'\n",
    "a list of 1,000 lists": "AdamW.no_decay = " + "[" * 1000 + "]" * 1000 + "\n",
    "a list of 190 lists": "AdamW.no_decay = " + "[" * 190 + "]" * 190 + "\n",
    "a tuple of 100,000 tuples": "AdamW.betas = " + "(" * 100_000 + ")" * 100_000 + "\n",
}


@pytest.mark.fault(20, "a file that includes what is missing or itself, or nests deeply", len(DEEP))
def test_an_include_or_a_deep_nest_is_refused_in_one_line(fault, tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("GPT.n_layer = 2\n" + list(DEEP.values())[fault.repetition % len(DEEP)])
    for more in ((), ("--safe-config",)):
        if more and "190" in list(DEEP)[fault.repetition % len(DEEP)]:
            continue  # it is gin, though no value of a knob
        with pytest.raises(ConfigError) as caught:
            run.main([str(overlay), "--runs", str(tmp_path / "runs"), *more])
        fault.happened = f"{overlay}:2: " in str(caught.value)
        assert fault.happened and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()


NAMES = ("../../x", "..", ".", "", "/tmp/x", "a/b", "a\0b", "a" * 300, "-a", "a\nb", "link", "loop")


@pytest.mark.fault(36, "a run name that leads elsewhere", len(NAMES))
def test_a_run_never_leaves_its_folder(fault, tmp_path):
    name, runs, outside = NAMES[fault.repetition % len(NAMES)], tmp_path / "a" / "runs", tmp_path / "outside"
    runs.mkdir(parents=True)
    outside.mkdir()
    (runs / "link").symlink_to(outside)
    (runs / "loop").symlink_to(runs / "loop")
    before = sorted(tmp_path.rglob("*"))
    for flags in ((), ("--resume",)):
        with pytest.raises(ValueError) as caught:
            run.main(["gin/model/tiny.gin", "--runs", str(runs), f"--name={name}", *flags])
        fault.happened = repr(name) in str(caught.value) or "is a link" in str(caught.value)
        assert fault.happened, caught.value
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault(36, "runs themselves behind a link, which is no fault", 1)
def test_a_folder_of_runs_may_be_a_link(fault, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    fault.happened = (tmp_path / "runs").is_symlink()
    assert run.main(["gin/model/check.gin", "--runs", str(tmp_path / "runs"), "--name", "a", "--dry-run"]) == 0


SOUND = """\
from components.ffn import GELU
from toolkit.registry import register


@register("ffn")
class PluginSound(GELU):
    def __init__(self, dim):
        super().__init__(dim)
"""
PLUGINS = {
    "raises": ("1 / 0\n", "ZeroDivisionError"),
    "ends the process": ("raise SystemExit(0)\n", "SystemExit"),
    "import fails": ("import no_such_module\n", "ModuleNotFoundError"),
    "duplicate name": (SOUND.replace("PluginSound", "RMSNorm"), "the name is taken by the norm in components.norm"),
}


@pytest.mark.slow
@pytest.mark.fault(46, "an installed plug-in that can't be loaded", len(PLUGINS))
def test_a_broken_plug_in_is_named_and_the_others_load(fault, tmp_path):
    source, reason = list(PLUGINS.values())[fault.repetition % len(PLUGINS)]
    for name, text in (("a_broken_plugin", source), ("the_sound_plugin", SOUND)):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[toolkit.components]\n{name} = {name}\n")
        (tmp_path / f"{name}.py").write_text(text)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = command("toolkit.components", "list", "--kind", "ffn", "--json", PYTHONPATH=path)
    fault.happened = reason in done.stderr
    assert done.returncode == 0 and "entry point a_broken_plugin = a_broken_plugin: " in done.stderr, done.stderr
    assert {"PluginSound", "SwiGLU"} <= {part["name"] for part in json.loads(done.stdout)}
    line = ("toolkit.run", "gin/model/check.gin", "-p", "GPT.ffn = @PluginSound", "--dry-run")
    done = command(*line, "--runs", str(tmp_path / "runs"), PYTHONPATH=path)
    assert done.returncode == 0 and "entry point a_broken_plugin" in done.stderr, done.stderr
