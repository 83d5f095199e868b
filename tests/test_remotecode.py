"""The tier code of ``convert``: the source of a model's parts goes out beside its weights."""

import ast
import itertools
import json
import subprocess
import sys

import pytest
from remotefolders import MIXED, built
from runs import small_run

from toolkit import convert
from toolkit.compose import open_run
from toolkit.exchange import outgoing, proof
from toolkit.exchange.flatten import Flattened


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
