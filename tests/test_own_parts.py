"""A part of one's own, in a file of one's own: trains, resumes, generates and is repeated, with no edit to ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SMALL, facts, rows

ROOT = Path(__file__).parent.parent

KERNEL = '''\
import torch
from torch import nn

from toolkit.registry import register


@register("attention")
class MeanAttention(nn.Module):
    """Every earlier token weighs the same."""

    def __init__(self, n_head, head_dim, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, q, k, v, mask=None):
        count = torch.arange(1, v.shape[1] + 1, device=v.device)[:, None, None]
        return self.scale * v.cumsum(1) / count
'''
OVERLAY = "GPT.attention = @MeanAttention\nMeanAttention.scale = 2.0\n"


def python(folder: Path, *words: str, path: str = "") -> str:
    """Run python in a folder that is not ours; its output, once it has succeeded."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def live(folder: Path, overlay: str, *imports: str, path: str = "") -> None:
    """The whole life of a run with the part: train, stop, resume, generate, repeat from the saved config."""
    (folder / "overlay.gin").write_text(overlay)
    flags = [flag for binding in SMALL for flag in ("-p", binding)]
    train = ["-m", "toolkit.run", "gin/model/tiny.gin", "overlay.gin", *imports, *flags]
    python(folder, *train, "--name", "a", "--stop-at", "5", path=path)
    python(folder, *train, "--name", "a", "--resume", path=path)
    assert facts(folder / "runs" / "a")["config"]["MeanAttention.scale"] == 2.0
    assert facts(folder / "runs" / "a")["attention"] == "MeanAttention"
    out = python(folder, "-m", "toolkit.generate", "runs/a", "--prompt", "Once", "--max-tokens", "5", path=path)
    assert out.startswith("Once")
    python(folder, "-m", "toolkit.run", "--base", "runs/a/config.gin", "--name", "b", path=path)
    assert rows(folder / "runs" / "b") == rows(folder / "runs" / "a")


def test_through_an_import_in_the_overlay(tmp_path):
    (tmp_path / "mean.py").write_text(KERNEL)
    live(tmp_path, "import mean\n" + OVERLAY)


def test_through_import_of_a_file_which_the_run_keeps(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mean.py").write_text(KERNEL)
    work = tmp_path / "work"
    work.mkdir()
    live(work, OVERLAY, "--import", str(elsewhere / "mean.py"))
    assert (work / "runs" / "a" / "code" / "mean.py").read_text() == KERNEL
    (elsewhere / "mean.py").unlink()  # the run's own copy is enough
    python(work, "-m", "toolkit.generate", "runs/a", "--max-tokens", "3")
    python(work, "-m", "toolkit.run", "--base", "runs/b/config.gin", "--name", "c")
    assert rows(work / "runs" / "c") == rows(work / "runs" / "a")


@pytest.mark.slow
def test_through_the_entry_point_of_an_installed_package(tmp_path):
    package, site, work = tmp_path / "package", tmp_path / "site", tmp_path / "work"
    for folder in (package, work):
        folder.mkdir()
    (package / "mean_attention.py").write_text(KERNEL)
    (package / "setup.cfg").write_text(
        "[metadata]\nname = mean-attention\nversion = 1\n[options]\npy_modules = mean_attention\n"
        "[options.entry_points]\ntoolkit.components =\n    mean = mean_attention\n"
    )
    (package / "pyproject.toml").write_text("[build-system]\nrequires = ['setuptools']\n")
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    python(tmp_path, *pip, str(package))
    live(work, OVERLAY, path=str(site))
    assert "import mean_attention" in (work / "runs" / "a" / "config.gin").read_text()


def test_an_entry_point_that_fails_takes_nobody_elses_parts_away(tmp_path):
    site = tmp_path / "broken-1.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (site / "entry_points.txt").write_text("[toolkit.components]\nbroken = no_such_module\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    line = [sys.executable, "-m", "toolkit.run", "--dry-run"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    said = "entry point broken = no_such_module: ModuleNotFoundError: No module named 'no_such_module'"
    assert said in done.stderr and "its parts are left out" in done.stderr


BROKEN = {
    "class A:\n    def __init__(self, n_head): ...\n": "the toolkit builds attention parts as A(n_head, head_dim)",
    "class A:\n    def __init__(self, *args): ...\n": "a part must define its own __init__ without *args or **kwargs",
    "class A:\n    pass\n": "the toolkit builds attention parts as A(n_head, head_dim)",
    "class A:\n    def __init__(self, n_head, head_dim): ...\n": "kind attention must have a method forward()",
    "class SDPA:\n    def __init__(self, n_head, head_dim): ...\n    def forward(self): ...\n": "the name is taken by",
    "class A:\n    def __init__(self, n_head, head_dim, norm=1): ...\n    forward = print\n": "must have no default",
    "1 / 0\nclass A: ...\n": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_part_that_can_not_be_registered_is_refused_with_the_reason(source, tmp_path):
    from toolkit.compose import compose
    from toolkit.config.layers import ConfigError

    head, body = source.split("class", 1)
    file = tmp_path / f"broken_part_{list(BROKEN).index(source)}.py"
    file.write_text(f'from toolkit.registry import register\n{head}@register("attention")\nclass{body}')
    with pytest.raises(ConfigError) as caught:
        compose(imports=[str(file)])
    assert BROKEN[source] in str(caught.value) and str(file) in str(caught.value)


def test_the_worked_example_is_causal_and_is_softmax_over_cosines():
    """Against torch's own cosine and attention: the cosine of the angle in place of the scaled product."""
    import torch
    import torch.nn.functional as F

    from experiments.cosine_attention.kernel import CosineAttention

    q, k, v = (torch.randn(2, 13, 3, 8, dtype=torch.float64) for _ in range(3))
    kernel = CosineAttention(3, 8).double()
    torch.nn.init.uniform_(kernel.scale, 1, 20)
    ours = kernel(q, k, v)
    for t in range(13):
        cosines = F.cosine_similarity(q[:, t : t + 1], k[:, : t + 1], dim=-1)  # (B, S, H)
        weights = (kernel.scale * cosines).softmax(1)
        assert torch.allclose(ours[:, t], (weights[..., None] * v[:, : t + 1]).sum(1), rtol=1e-10)


def test_a_part_that_looks_at_values_while_it_is_built_still_trains(tmp_path):
    """Building on the meta device is how we find errors early; a part that can't be built there is built in full."""
    from runs import small_run

    file = tmp_path / "looks_at_values.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom toolkit.registry import register\n\n\n"
        '@register("ffn")\nclass LooksAtValues(nn.Module):\n'
        "    def __init__(self, dim):\n        super().__init__()\n"
        "        self.rates = torch.linspace(0, 1, 3).tolist()\n        self.up = nn.Linear(dim, dim)\n\n"
        "    def forward(self, x, context):\n        return self.up(x) * (2.0 if x.mean().item() > 0 else 1.0)\n"
    )
    flags = ("--import", str(file), "--stop-at", "2")
    assert small_run(tmp_path, "a", *flags, bindings=("GPT.ffn = @LooksAtValues",)) == 0
    assert facts(tmp_path / "a")["parameters"]["total"] > 0


FAILING = """\
from torch import nn

from toolkit.registry import register


@register("ffn")
class Failing(nn.Module):
    def __init__(self, dim):
        super().__init__()
        %s

    def forward(self, x, context):
        return x.no_such_method()
"""


@pytest.mark.parametrize("line", ["raise TypeError('nothing works')", "pass"], ids=["constructor", "forward"])
def test_a_part_that_raises_is_named_with_its_file_and_line(line, tmp_path):
    from runs import command

    file = tmp_path / "failing.py"
    file.write_text(FAILING % line)
    flags = ("--import", str(file), "-p", "GPT.ffn = @Failing", "--runs", str(tmp_path / "runs"))
    done = command("toolkit.run", "gin/model/tiny.gin", *flags, TOOLKIT_CACHE=str(tmp_path / "cache"))
    number = FAILING.splitlines().index("        %s") + 1 if line != "pass" else len(FAILING.splitlines())
    assert done.returncode == 2 and f"error: Failing ({file}:{number}): " in done.stderr, done.stderr


def test_parts_that_load_are_listed_beside_a_file_that_does_not(tmp_path):
    from runs import command

    (tmp_path / "sound_part.py").write_text(KERNEL)
    (tmp_path / "broken_part.py").write_text("1 / 0\n")
    imports = [flag for name in ("broken_part", "sound_part") for flag in ("--import", str(tmp_path / f"{name}.py"))]
    done = command("toolkit.components", "list", "--kind", "attention", *imports)
    assert done.returncode == 0 and "MeanAttention" in done.stdout and "FlashAttention" in done.stdout
    assert f"{tmp_path}/broken_part.py:1" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("way", ["import in a file", "--import a module", "--import a file"])
@pytest.mark.parametrize("raised", ["Panic('no such thing')", "SystemExit(0)"])
def test_whatever_an_import_raises_is_told_with_its_line(way, raised, tmp_path):
    """Modules compiled from Rust raise an exception that is no Exception."""
    name = f"broken_{'panic' if 'Panic' in raised else 'exit'}"
    (tmp_path / f"{name}.py").write_text(f"class Panic(BaseException):\n    pass\n\n\nraise {raised}\n")
    (tmp_path / "x.gin").write_text(f"import {name}\n" if way == "import in a file" else "")
    imports = {
        "import in a file": [],
        "--import a module": ["--import", name],
        "--import a file": ["--import", f"{name}.py"],
    }
    words = [sys.executable, "-m", "toolkit.run", "gin/model/tiny.gin", "x.gin", *imports[way], "--dry-run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert raised.split("(")[0] in done.stderr and f"{name}.py:5" in done.stderr, done.stderr


def test_register_can_be_imported_from_the_top_and_costs_nothing_until_then():
    code = "import sys, toolkit; before = 'gin' in sys.modules; from toolkit import register; "
    code += "import toolkit.registry as r; print(before, register is r.register, 'gin' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout == b"False True True\n", done.stderr
    import toolkit

    with pytest.raises(AttributeError, match="no attribute 'registre'"):
        toolkit.registre  # noqa: B018


def test_what_a_part_lacks_is_named_with_the_remedy():
    from toolkit.compose import compose, try_build
    from toolkit.experiment import Experiment, build
    from toolkit.groups import parameter_groups

    class NoLength(torch.nn.Module):
        def __init__(self, vocab_size, max_len):
            super().__init__()
            self.table = torch.nn.Embedding(vocab_size, 4)

    class NoCache(torch.nn.Module):
        def __init__(self, *arguments):
            super().__init__()

    class NoGroups(torch.optim.SGD):
        def __init__(self, model):
            super().__init__(model.parameters(), lr=0.1)

    config, _ = compose(["gin/model/tiny.gin"])
    experiment, parts = try_build(config)
    for changes, told in (
        ({"model": NoLength}, "NoLength has no attribute max_len.*set self.max_len = max_len"),
        ({"optimizer": NoGroups}, "NoGroups has groups of parameters without a name.*parameter_groups"),
    ):
        with pytest.raises(ValueError, match=told):
            build(Experiment(**vars(experiment) | changes), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"NoCache has no method init_cache.*cache = False"):
        experiment.model(257, 8, mixer=NoCache)
    parts.model.blocks[0].ffn.down.merged = {"a": 3}
    with pytest.raises(ValueError, match="merged = {'a': 3}, whose rows must add up to the 64 rows"):
        parameter_groups(parts.model, lr=0.1, weight_decay=0.0, matrices_lr=0.1)
