"""The rooms of the project: who imports whom, and that what the README and the catalogue say of each other is true."""

import ast
import re
from pathlib import Path

import pytest

from toolkit.components import describe, markdown
from toolkit.components import main as components_command
from toolkit.compose import load_shelf
from toolkit.registry import CATALOG

ROOT = Path(__file__).parent.parent
load_shelf()


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", files("toolkit"))
def test_the_frame_reaches_for_the_shelf_in_one_place_only(path):
    foreign = {name for name in imports(path) if name.split(".")[0] in ("components", "experiments")}
    assert foreign == ({"components"} if path.name == "compose.py" else set())


def shelf_breaches(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of a file of the shelf from the shelf or from an experiment, except from the helpers in its own folder:
    the files there that register nothing."""
    registering = re.compile(r"^@(register|architecture)\b", re.MULTILINE)
    helpers = {
        ".".join(each.relative_to(root).with_suffix("").parts)
        for each in path.parent.glob("*.py")
        if path.parent != root / "components" and not registering.search(each.read_text(encoding="utf-8"))
    }
    own = [name for name in imports(path) if name.split(".")[0] in ("components", "experiments")]
    return [name for name in own if name not in helpers and name.rpartition(".")[0] not in helpers]


@pytest.mark.parametrize("path", files("components"))
def test_files_on_the_shelf_do_not_import_each_other(path):
    assert path.name == "__init__.py" or shelf_breaches(path) == []


def test_an_import_between_files_of_the_shelf_is_found(tmp_path):
    folder = tmp_path / "components" / "architecture"
    folder.mkdir(parents=True)
    (folder / "helper.py").write_text("TABLE = {}")
    (folder / "sibling.py").write_text("@architecture\nclass Sibling: ...")
    (folder.parent / "norm.py").write_text("SIZE = 1")
    family, beside = folder / "family.py", folder.parent / "block.py"
    for path, line, found in (
        (family, "from components.architecture.helper import TABLE", []),
        (family, "from components.architecture.sibling import Sibling", ["components.architecture.sibling.Sibling"]),
        (family, "from components.norm import SIZE", ["components.norm.SIZE"]),
        (beside, "from components.norm import SIZE", ["components.norm.SIZE"]),
        (beside, "from components.architecture.helper import TABLE", ["components.architecture.helper.TABLE"]),
    ):
        path.write_text(line)
        assert shelf_breaches(path, tmp_path) == found


@pytest.mark.parametrize("path", files("toolkit"))
def test_nothing_registers_in_a_module_that_runs_as_main(path):
    text = path.read_text(encoding="utf-8")
    assert not ('__name__ == "__main__"' in text and re.search(r"^@register\(", text, re.MULTILINE))


FLOORS = (  # from the ground up: a room, or a file beside the rooms, imports from floors below its own
    "root context seeding measures",
    "protocols output cpu attention_weights architectures",
    "registry linear linear_cross_entropy groups cache objective",
    "parallel store",
    "text config model probed",
    "experiment tokens",
    "loop",
    "evaluation probing",
    "training compose",
    "rundir comparison",
    "ablation conformance exchange start notebook",
    "__init__ command",
    "run generate evaluate components prepare ablate compare convert",
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}


def room_of(module: str) -> str:
    """The second word of a dotted name within the toolkit: a room, or a file beside the rooms."""
    return module.split(".")[1]


def breaches(path: Path, toolkit: Path = ROOT / "toolkit") -> list[str]:
    """Imports of a file of the toolkit that go up, or across to another room of the same floor."""
    rooms = {room_of(name) for name in imports(path) if name.startswith("toolkit.")} & FLOOR.keys()
    own = path.relative_to(toolkit).with_suffix("").parts[0]
    return [room for room in rooms if room != own and FLOOR[room] >= FLOOR[own]]


def test_every_room_has_its_floor():
    inside = (ROOT / "toolkit").iterdir()
    assert {each.stem for each in inside if each.suffix == ".py" or (each / "__init__.py").is_file()} == FLOOR.keys()


@pytest.mark.parametrize("path", files("toolkit"))
def test_imports_go_down_from_floor_to_floor(path):
    assert breaches(path) == []


def test_an_import_that_goes_up_or_across_is_found(tmp_path):
    path = tmp_path / "cpu" / "imagined.py"
    path.parent.mkdir()
    for line, found in {
        "from toolkit.config import guard": ["config"],
        "from toolkit import run": ["run"],
        "import toolkit.output.escape": ["output"],
        "from toolkit.cpu import products": [],
        "from toolkit.context import Context": [],
    }.items():
        path.write_text(f"def f():\n    {line}\n")
        assert breaches(path, tmp_path) == found


SHELF = [pytest.param(entry, id=entry.name) for entry in CATALOG.values() if entry.module.startswith("components.")]


@pytest.mark.parametrize("entry", SHELF)
def test_every_part_is_in_the_default_or_has_an_overlay(entry):
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "gin").rglob("*.gin")]
    assert any(re.search(rf"@{entry.name}\b", text) for text in texts), f"no file under gin/ names @{entry.name}"
    assert entry.cls.__doc__ and describe(entry)["summary"]


@pytest.mark.parametrize("entry", [*SHELF, CATALOG["GPT"], CATALOG["Experiment"]])
def test_every_knob_is_annotated_so_that_the_guard_can_check_it(entry):
    assert set(entry.knobs) <= set(entry.hints)


def test_a_part_is_small():
    for path in (ROOT / "components").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 66, f"{path.name}: {node.name}"


def test_the_default_names_every_knob_that_it_builds():
    """gin/default.gin is the documentation of every knob: nothing that it builds has one that it does not show."""
    from toolkit.compose import compose

    text = (ROOT / "gin" / "default.gin").read_text(encoding="utf-8")
    config, _ = compose()
    for key in config.flat:
        name, knob = key.split(".")
        block = re.search(rf"^{name}:\n((?:(?:  .*)?\n)+)", text, re.MULTILINE)
        shown = re.search(rf"^{name}\.{knob} = ", text, re.MULTILINE)
        assert shown or (block and re.search(rf"^  {knob} = ", block[1], re.MULTILINE)), key


def test_the_readme_shows_the_catalogue_as_it_is():
    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8"), "paste toolkit.components.markdown() there"


def test_the_readme_counts_the_planted_faults():
    from planted import FAULTS, SOUND

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(FAULTS)} planted faults each fail their own line, and {len(SOUND)} odd but correct parts" in text


def test_the_components_command_lists_and_shows(capsys):
    assert components_command(["list", "--kind", "norm"]) == 0
    out = capsys.readouterr().out
    assert "RMSNorm" in out and "eps=1e-06" in out and "FlashAttention" not in out
    assert components_command(["show", "RMSNorm"]) == 0
    out = capsys.readouterr().out
    assert "overlay: gin/norm/rmsnorm.gin" in out and "binding: GPT.norm = @RMSNorm" in out
    with pytest.raises(ValueError, match="part not found: 'Norm'"):
        components_command(["show", "Norm"])
    with pytest.raises(ValueError, match="unknown kind 'norms'; the kinds are attention, "):
        components_command(["list", "--kind", "norms"])
    assert components_command(["show", "Experiment"]) == 0
    assert "binding:" not in capsys.readouterr().out
