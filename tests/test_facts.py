"""facts.json is what ``toolkit.store.factsfile`` says: every key of a real run is documented, with its type."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, with_config
from runs import facts, small_run

from toolkit.comparison import schema
from toolkit.store import factsfile, seal
from toolkit.store.disk import write_json
from toolkit.store.factsfile import Facts

ROOT = Path(__file__).parent.parent
AT_THE_END = {"seconds", "ended", "peak_memory_bytes", "weights_sha256", "final"}
WHILE_TRAINING = {"seconds_before"}
KEYS = set(Facts.__annotations__)
KINDS = (Facts, factsfile.Parameters, factsfile.Windows, factsfile.Resumed)


def problems(content: dict) -> list:
    """What pydantic finds wrong with the types of the documented keys, strictly: 1 is no str, "1" no int."""
    strict = TypeAdapter(with_config({"strict": True, "extra": "forbid"})(Facts))
    try:
        strict.validate_python(content)
    except ValueError as error:
        return [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
    return []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was stopped, resumed with a change, and finished; and one that diverged."""
    folder = tmp_path_factory.mktemp("runs")
    assert small_run(folder, "finished", "--stop-at", "4") == 0
    change = ("Experiment.eval_windows = 7",)
    assert small_run(folder, "finished", "--resume", "--allow-change", bindings=change) == 0
    assert small_run(folder, "diverged", bindings=("AdamW.lr = 1e30",)) == 3
    return folder


def test_a_finished_run_has_every_documented_key_and_no_other(runs):
    content = facts(runs / "finished")
    assert content.keys() == KEYS - WHILE_TRAINING
    assert problems(content) == []
    assert content["parameters"].keys() == factsfile.Parameters.__required_keys__
    assert content["windows"].keys() == factsfile.Windows.__required_keys__
    assert [entry.keys() for entry in content["resumed"]] == [factsfile.Resumed.__required_keys__]
    assert all(isinstance(value, str | int | float) for value in content["final"].values())


def test_a_run_that_did_not_finish_has_the_keys_from_before_its_first_step(runs):
    content = facts(runs / "diverged")
    assert content.keys() == KEYS - AT_THE_END
    assert problems(content) == []


def test_seconds_from_before_a_killed_process_are_kept(tmp_path):
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    content = facts(tmp_path / "a")
    killed = {key: value for key, value in content.items() if key not in AT_THE_END} | {"seconds_before": 1000.0}
    write_json(tmp_path / "a" / "facts.json", killed)
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "5") == 0
    assert 1000 < facts(tmp_path / "a")["seconds"] < 1000 + 300


def test_a_wrong_type_and_an_undocumented_key_are_found(runs):
    content = facts(runs / "finished")
    wrong = content | {"steps": "12", "commit": 7, "windows": {"train": 1}, "colour": "red"}
    assert {key for key, _ in problems(wrong)} == {"steps", "commit", "windows.val", "colour"}


def documented(kind: type) -> set[str]:
    """The keys of a TypedDict whose next line in the source is a docstring."""
    tree = ast.parse(Path(factsfile.__file__).read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    pairs = zip(body, body[1:], strict=False)
    return {
        key.target.id
        for key, text in pairs
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_docstring(kind):
    assert documented(kind) == set(kind.__annotations__) - {"from"}  # a keyword: it stands beside the class


def look_ups(tree: ast.AST) -> list[ast.expr]:
    """The keys in ``facts[key]``, ``facts.get(key)`` and ``run.facts...``, as they are written."""

    def is_facts(node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return ast.unparse(node.func) in ("factsfile.read", "_facts")
        return getattr(node, "id", getattr(node, "attr", None)) in ("facts", "previous", "info")

    return [
        *(n.slice for n in ast.walk(tree) if isinstance(n, ast.Subscript) and is_facts(n.value)),
        *(
            n.args[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr in ("get", "pop")
            and is_facts(n.func.value)
        ),
    ]


def undocumented(text: str) -> list[str]:
    keys = look_ups(ast.parse(text))
    return [ast.unparse(key) for key in keys if not (isinstance(key, ast.Constant) and key.value in KEYS)]


def test_every_look_up_is_of_a_documented_key():
    """mypy checks names in brackets, but allows any name in ``.get``."""
    files = [*(ROOT / "toolkit").rglob("*.py"), ROOT / "components" / "logger.py"]
    found = {path: undocumented(path.read_text(encoding="utf-8")) for path in files}
    assert {path: keys for path, keys in found.items() if keys} == {}
    assert sum(len(look_ups(ast.parse(path.read_text(encoding="utf-8")))) for path in files) > 50
    wrong = "run.facts.get('tokenizr'); facts[name]; facts['seed']; factsfile.read(run).get('sed')"
    assert undocumented(wrong) == ["name", "'tokenizr'", "'sed'"]


def test_what_a_comparison_checks_is_documented():
    assert set(schema.Facts.__annotations__) <= KEYS and seal.KEY in KEYS


def test_the_keys_can_be_read_without_torch():
    program = "import sys, toolkit.store.factsfile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
