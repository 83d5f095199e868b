"""The tier code of ``convert``: the source of a model's parts goes out beside its weights."""

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import remotecode
import torch
from runs import small_run

from toolkit import convert
from toolkit.compose import Run, compose, load_shelf, open_run
from toolkit.exchange import outgoing, proof
from toolkit.exchange.flatten import Flattened
from toolkit.registry import CATALOG

ROOT = Path(__file__).parent.parent
load_shelf()
KINDS = ("model", "block", "mixer", "position", "attention", "norm", "ffn", "init")
PARTS = {
    entry.name: entry for entry in CATALOG.values() if entry.kind in KINDS and entry.module.startswith(("comp", "too"))
}
SIZES = [
    "GPT.dim = 24",
    "GPT.n_layer = 3",
    "GPT.n_head = 4",
    "Experiment.seq_len = 24",
    "Experiment.tokenizer = @Bytes",
]
MIXED = [
    "GPT.block = @HyperConnections",
    "GPT.mixer = [@ValueResidual, @GatedLinearRecurrence, @a/SelfAttention]",
    "GPT.position = [@RoPE, @b/RoPE]",
    "b/RoPE.theta = 500.0",
    "a/SelfAttention.qk_norm = @RMSNorm",
    "GPT.ffn = [@SwiGLU, @MixtureOfExperts]",
    "GPT.norm = [@RMSNorm, @LayerNorm]",
    "GPT.tie_embeddings = False",
    "GPT.dropout = 0.1",
]
OWN = '''"""A part of somebody else."""
import functools, math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

import own_helper as helper
from own_helper import LOW, Base, table
from toolkit.registry import register

HIGH: float = 2.0
LIMITS = [LOW]
LIMITS.append(HIGH)  # a statement that binds no name


# A comment above a class.
@register("norm")
class OwnNorm(Base):
    """x times a learned factor, limited."""

    def __init__(self, dim: int, factor: Annotated[float, Gt(0)] = 1.5, names: tuple = ("a", "b")):
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), factor))
        self.register_buffer("step", torch.arange(1, dim + 1).float() / dim, persistent=False)
        self.plain = torch.ones(dim)
        self.names = names
        self.again = self.gain  # one parameter with two names

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        import fractions

        assert isinstance(self.names, tuple) and fractions.Fraction(1, 2) == 0.5
        return helper.limited(x * self.again * self.step * self.plain, LIMITS[0], LIMITS[1]) * table()[0]


@register("norm")
class Unused(nn.Module):
    """Never copied."""

    def __init__(self, dim: int):
        super().__init__()
        import package_that_nobody_has
'''
HELPER = """import functools
from torch import nn

LOW = -3.0

class Base(nn.Module):
    pass

def limited(x, low, high):
    return _clamp(x, low, high)

def _clamp(x, low, high):
    return x.clamp(low, high)

@functools.cache
def table():
    return [1.0]

def left_out():
    return 7
"""


def built(*bindings: str, overlays: tuple[str, ...] = ()) -> Run:
    """A small model with random weights, as an opened run that is in no folder."""
    config, _ = compose(["gin/model/tiny.gin", *overlays], [*SIZES, *bindings])
    experiment = config.build()
    tokenizer = experiment.tokenizer()
    torch.manual_seed(0)
    model = experiment.model(tokenizer.vocab_size, experiment.seq_len).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Run(config, experiment, tokenizer, model, Path("none"), torch.device("cpu"))


def write(run: Run, folder: Path) -> Path:
    """The folder of a model, without tokenizer, card and proof."""
    from toolkit.exchange import remotecode as writer

    folder.mkdir(parents=True)
    writer.write_code(run, folder)
    writer.write_model(run, folder, "float32", {"eos_token_id": 256}, outgoing.SHARD)
    return folder


def measured(folders: list[Path], target: Path, python: str = sys.executable) -> dict[str, dict]:
    """The results of tests/remotecode.py for the folders, by name."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-P", remotecode.__file__, str(target), *map(str, folders)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder).name: results for folder, results in json.loads(target.read_text()).items()}


def check(name: str, results: dict) -> None:
    tolerance = 1e-5 * results["scale"]
    assert results["compiled"] <= tolerance and results["saved again"] == 0.0, (name, results)
    assert results["micro-batches"] <= 1e-4, (name, results)
    for empty in ("cached tokens differ", "padded tokens differ", "tensors differ", "without gradient"):
        assert not results[empty], (name, empty, results[empty])


def test_models_of_many_parts_work_without_the_toolkit(tmp_path, monkeypatch):
    """Hybrids, hyper-connections, experts, several positions, and a part with a helper module, in a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_part.py").write_text(OWN)
    (tmp_path / "own_helper.py").write_text(HELPER)
    compose(imports=["own_part"])
    runs = {"mixed": built(*MIXED), "own": built("GPT.norm = @OwnNorm", "OwnNorm.factor = 0.7")}
    folders = [write(run, tmp_path / name) for name, run in runs.items()]
    for name, results in measured(folders, tmp_path / "results.json").items():
        check(name, results)
        difference, _ = proof.prove(
            runs[name].model, runs[name].tokenizer, tmp_path / name, code=["toolkit.x", "own_part"]
        )
        assert difference.problem is None, (name, difference)
    text = (tmp_path / "own" / "own_part.py").read_text()
    assert "Unused" not in text and "register(" not in text and "Annotated" not in text
    assert "# A comment above a class.\nclass OwnNorm(Base):" in text and "LIMITS.append(HIGH)" in text
    assert "left_out" not in (tmp_path / "own" / "own_helper.py").read_text()


def exported_parts(tmp_path) -> dict[str, Path]:
    """A folder for each model part of the shelf, in a model that has it; and one for many parts together."""
    folders = {}
    for entry in PARTS.values():
        bindings = [] if entry.kind == "model" else [f"GPT.{entry.kind} = @{entry.name}"]
        overlays = [
            path for path in (ROOT / "gin" / entry.kind).glob("*.gin") if f"@{entry.name}\n" in path.read_text()
        ]
        run = built(*bindings, overlays=tuple(map(str, overlays[:1])))
        assert any(name == entry.name for _, name in run.config.parts), entry.name
        folders[entry.name] = write(run, tmp_path / entry.name)
    return folders | {"mixed": write(built(*MIXED), tmp_path / "mixed")}


@pytest.mark.slow
def test_every_part_of_the_shelf_works_where_only_torch_transformers_and_safetensors_are(tmp_path):
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    python = str(env / "bin" / "python")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    packages = [f"torch=={torch.__version__.partition('+')[0]}", "transformers>=5", "safetensors"]
    install = [python, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "20", *packages]
    installed = subprocess.run(install, env=alone, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"no package index is reachable: {installed.stderr.strip().splitlines()[-1][:200]}")
    for name in ("gin", "toolkit"):
        missing = subprocess.run([python, "-P", "-c", f"import {name}"], env=alone, capture_output=True, text=True)
        assert f"No module named '{name}'" in missing.stderr
    folders = exported_parts(tmp_path / "models")
    assert folders.keys() == PARTS.keys() | {"mixed"}
    for name, results in measured(list(folders.values()), tmp_path / "results.json", python).items():
        if name != "ReZero":  # alpha starts at 0, so the weights of a layer have no gradient until it has moved
            check(name, results)


def test_the_command_writes_code_for_a_model_that_no_architecture_is(tmp_path, capsys):
    small_run(tmp_path, "a", bindings=("GPT.ffn = [@SwiGLU, @MixtureOfExperts]",))
    capsys.readouterr()
    assert convert.main([str(tmp_path / "a"), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "as toolkit_gpt, in float32 (tier code)" in output and "conditions that fail" in output
    assert "24 of 24 greedy tokens equal" in output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "They need torch and transformers." in card
    for path in (tmp_path / "out").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] in ("toolkit", "components", "gin") for name in names), path
    with pytest.raises(ValueError, match=r"no architecture .* \(tier native\)"):
        convert.main([str(tmp_path / "a"), "--to", "hf", "--out", str(tmp_path / "b"), "--tier", "native"])
    flags = ["--to", "hf", "--out", str(tmp_path / "b"), "--tier", "code", "--architecture", "llama"]
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path / "a"), *flags])
    assert "--architecture names an architecture of the tier native" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was exported from a run with the source of its parts"):
        convert.main([str(tmp_path / "out"), "--from", "hf", "--name", "b", "--runs", str(tmp_path)])
    half = outgoing.export(open_run(tmp_path / "a", device="cpu"), tmp_path / "half", "bfloat16", tier="code")
    assert half.proofs["float32"].largest < 1e-5 < half.proofs["bfloat16"].largest


def test_a_wrong_copy_is_refused_by_the_proof(tmp_path, monkeypatch):
    """The copied code computes something else: nothing is kept."""
    from toolkit.exchange import remotecode as writer

    monkeypatch.setattr(proof, "measure_fresh", planted)
    run = built("GPT.ffn = [@SwiGLU, @ReLU]")
    assert writer.REMOTE.is_dir()
    with pytest.raises(ValueError, match="does not compute what this model does"):
        outgoing.export(run, tmp_path / "out", tokenizer=False, tier="code")
    assert list(tmp_path.iterdir()) == []


def planted(folder, probes, about, fresh=proof.measure_fresh):
    """``measure_fresh`` of a folder whose ReLU has a mistake."""
    file = folder / "components_ffn.py"
    text = file.read_text()
    assert "self.down(F.relu(self.up(x)))" in text
    file.write_text(text.replace("F.relu(self.up(x))", "F.relu(self.up(x) - 0.01)"))
    return fresh(folder, probes, about)


REFUSED = {
    "all names of a module": ("from math import *\nclass P: ...\n", r"py:1 imports \*"),
    "inside a function": ("def make():\n    class P: ...\n    return P\nP = make()\n", "is defined inside a function"),
    "a file beside it": ("class P:\n    def read(self):\n        return open(__file__).read()\n", "uses __file__"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_copied_is_refused_with_the_place(name, tmp_path, monkeypatch):
    text, reason = REFUSED[name]
    module = f"refused_{list(REFUSED).index(name)}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    cls = __import__(module).P
    with pytest.raises(ValueError, match=reason):
        Flattened({}, ()).add(cls)


COPIES = {
    "relative imports and packages": {
        "pack/__init__.py": "",
        "pack/deep.py": "from . import near\nfrom .near import two as zwei\nclass P:\n    value = near.one() + zwei\n",
        "pack/near.py": "def one():\n    return 1\ntwo = 2\nthree = 3\n",
    },
    "a dotted import": {
        "pack/__init__.py": "",
        "pack/deep.py": "import pack.near\nclass P:\n    value = pack.near.one() + 2\n",
        "pack/near.py": "def one():\n    return 1\n",
    },
    "names through globals": {
        "pack/__init__.py": "",
        "pack/deep.py": "three = 3\nclass P:\n    value = globals()['three']\n",
    },
    "a name that a statement changes": {
        "pack/__init__.py": "",
        "pack/deep.py": "total = 1\nfor i in range(2):\n    total += 1\nclass P:\n    value = total\n",
    },
    "a package that may be missing": {
        "pack/__init__.py": "",
        "pack/deep.py": "try:\n    import no\nexcept ImportError:\n    no = 3\nclass P:\n    value = no\n",
    },
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_what_the_source_does(name, tmp_path, monkeypatch):
    number = list(COPIES).index(name)
    for file, text in COPIES[name].items():
        path = tmp_path / "source" / file.replace("pack", f"pack{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("pack", f"pack{number}"))
    monkeypatch.syspath_prepend(tmp_path / "source")
    module = f"pack{number}.deep"
    cls = sys.modules[module].P if module in sys.modules else __import__(module, fromlist=["P"]).P
    bundle = Flattened({}, ())
    bundle.add(cls)
    folder = tmp_path / f"copy{number}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for file, text in bundle.files().items():
        (folder / file).write_text(text)
    code = f"from copy{number}.pack{number}_deep import P; print(P.value)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(cls.value) == "3", (done.stderr, bundle.files())


def test_labels_and_knobs_survive_json():
    """Scoped parts of one class stay two parts, and tuples stay tuples."""
    from toolkit.exchange import remotecode as writer

    entries = writer._entries(built(*MIXED), "float32")
    assert {"a/SelfAttention", "b/RoPE", "RoPE", "RMSNorm"} <= entries["parts"].keys()
    assert entries["parts"]["GPT"]["position"] == [{"part": "RoPE"}, {"part": "b/RoPE"}]
    encoded = writer._encoded(built().config, "", {"a": (1, [2.5, None])})
    assert encoded == {"items": [["a", {"tuple": [1, [2.5, None]]}]]}
    assert list(itertools.chain(json.loads(json.dumps(encoded)))) == ["items"]
