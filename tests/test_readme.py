"""The commands of the README and the other pages, run or parsed as they stand there, and what the pages point to."""

import importlib
import importlib.metadata
import re
import runpy
import shlex
import sys
import warnings
from argparse import ArgumentParser
from configparser import ConfigParser
from pathlib import Path

import pytest
from runs import command

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^python -m (toolkit\.\w+.*)$", TEXT, re.MULTILINE)
NEEDS_A_RUN = ("--resume", "--from", "--base runs/")

OTHERS = ("benchmarks/README.md", "components/README.md", "tests/README.md", "tests/faults/README.md")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), *OTHERS]
STARTS = r"(?:\$ )?((?:python3?|pip|pytest|torchrun|tensorboard) .*)"
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FOLDERS = "gin|experiments|toolkit|components|benchmarks|tests|docs"
NAMED = re.compile(
    rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w\.(?:gin|py|md|json|png)\b|\.ci/\w+|constraints\.txt|setup\.cfg"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """Code within sentences; a span that goes on in the next line is one."""
    return [" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text))]


def commands(text: str) -> list[str]:
    """Every command line of a page, whether it has a line or a span of its own."""
    lines = [line.strip() for block in FENCED.findall(text) for line in block.splitlines()]
    found = [re.fullmatch(STARTS, line) for line in [*lines, *spans(text)]]
    return [match[1] for match in found if match]


def hold(line: str, tmp_path: Path, pytest_parser, monkeypatch) -> None:
    """Fails unless the command would start: its module is there and takes the words; a run has a config that works."""
    words = shlex.split(line)
    if words[0] == "tensorboard":
        assert [each.name for each in importlib.metadata.entry_points(group="console_scripts", name="tensorboard")]
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        started = get_args_parser().parse_args(words[1:])
        assert started.module and started.training_script == "toolkit.run"
    else:
        assert words[:2] == ["python", "-m"], f"nothing here holds {line!r}"
        hold_module(line, words[2], words[3:], tmp_path, pytest_parser, monkeypatch)


def hold_module(line, module, words, tmp_path, pytest_parser, monkeypatch):
    if module == "pip":
        config = ConfigParser()
        config.read(ROOT / "setup.cfg")
        wanted = re.fullmatch(r'install (?:-c constraints\.txt )?-e "\.\[(\w+)\]"', line.partition("pip ")[2])
        assert wanted and wanted[1] in config["options.extras_require"]
    elif module == "pytest":
        for path in vars(pytest_parser.parse(words))["file_or_dir"]:
            assert (ROOT / path).exists(), path
    elif module == "toolkit.run" and "--safe-config" in words:
        assert importlib.import_module(module).main(words) == 0
    elif module == "toolkit.run" and not any(flag in line for flag in NEEDS_A_RUN):
        assert importlib.import_module(module).main([*words, "--runs", str(tmp_path), "--dry-run", "--json"]) == 0
    else:
        assert re.fullmatch(r"(toolkit|benchmarks|tests)(\.\w+)*", module), f"nothing here holds {line!r}"
        code = importlib.import_module("benchmarks.__main__" if module == "benchmarks" else module)
        if hasattr(code, "_arguments"):
            code._arguments(words)
        else:
            parse_in(module, words, monkeypatch)


def parse_in(module, words, monkeypatch):
    """Runs a module that parses in its main(), and ends it as soon as it has."""

    class Parsed(Exception):
        pass

    parse_args = ArgumentParser.parse_args

    def stop(*given):
        parse_args(*given)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed), warnings.catch_warnings(action="ignore"):  # that it may have been imported already
        runpy.run_module(module, run_name="__main__")


WRONG = re.findall(r"^\$ (python .*)\nerror: ", TEXT, re.MULTILINE)
LINES = list(dict.fromkeys(line for page in PAGES for line in commands(read(page)) if line not in WRONG))


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_pages_would_start(line, tmp_path, pytestconfig, monkeypatch):
    """Runs as dry runs, all others parsed by the command's own parser: no recipe is out of date."""
    hold(line, tmp_path, pytestconfig._parser, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python -m toolkit.run gin/model/tiny.gin gin/norm/rmsnrom.gin",
        "python -m toolkit.run gin/model/tiny.gin -p 'GPT.n_layers = 4'",
        "python -m toolkit.run --name long --resmue",
        "python -m toolkit.compare runs/norm --strickt",
        "python -m toolkit.components check",
        "python -m toolkit.nothing",
        "python -m benchmarks --only trian",
        "python -m benchmarks.train --lop",
        "python -m tests.mutants --shares 0.05",
        "python -m pytest tests/fault",
        "python -m pytest --paritty",
        'python -m pip install -e ".[slrm]"',
        "python -m http.server",
        "python benchmarks/train.py",
        "torchrun --nproc-per-mode 2 -m toolkit.run",
    ],
)
def test_a_command_that_would_not_start_is_noticed(line, tmp_path, pytestconfig, monkeypatch, capsys):
    from _pytest.config.exceptions import UsageError

    with pytest.raises((AssertionError, SystemExit, ValueError, OSError, ImportError, UsageError)):
        hold(line, tmp_path, pytestconfig._parser, monkeypatch)


def test_commands_are_found_in_blocks_and_in_sentences():
    text = "See `python -m a\nb`:\n\n```\n$ python -m c\n  tensorboard --logdir runs\n```\n\nand `toolkit.run`.\n"
    assert commands(text) == ["python -m c", "tensorboard --logdir runs", "python -m a b"]
    assert all(commands(read(page)) for page in PAGES if page not in ("docs/README.md", "docs/tree.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_sentence_is_one_that_a_command_takes(page):
    sources = [path for folder in ("toolkit", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    taken = {
        "--help",
        *re.findall(r'"(--[a-z_-]+)"', "".join(read(path) for path in sources if path != Path(__file__))),
    }
    assert {flag for span in spans(read(page)) for flag in re.findall(r"^(--[a-z_-]+)", span)} - taken == set()


def anchors(text: str) -> set[str]:
    """What a heading is called in a link, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead(page: str, text: str) -> list[str]:
    """What a page points to and is not there: links, and files that it names from the repository's folder."""
    lost = [name for name in NAMED.findall(text) if not (ROOT / name).is_file()]
    for link in LINK.findall(FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        target = ROOT / Path(page).parent / path if path else ROOT / page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", PAGES)
def test_whatever_a_page_links_to_or_names_is_there(page):
    assert dead(page, read(page)) == []


def test_a_dead_link_is_noticed():
    text = (
        "[a](nothing.md) [b](../README.md) [c](../README.md#nowhere) `gin/nothing.gin` [d](#there) `toolkit/run.py`\n"
    )
    assert dead("docs/README.md", text) == ["gin/nothing.gin", "nothing.md", "../README.md#nowhere", "#there"]


def test_the_index_lists_every_page():
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall(read("docs/README.md"))}
    assert {(ROOT / page).resolve() for page in PAGES} - {ROOT / "docs" / "README.md"} <= linked


def test_the_page_on_tests_names_only_files_that_exist():
    for name in re.findall(r"`([\w/]+\.py)`", read("tests/README.md")):
        assert (ROOT / "tests" / name).is_file() or (ROOT / name).is_file(), name


def test_what_the_pages_quote_of_files_is_what_the_files_say():
    """The plan of the ablation, the worked example and its overlay."""
    plan = read("experiments/norm/plan.gin").strip()
    assert plan in read("docs/ablations.md")
    shown = re.search(r"^Ablation\.question.*?^Ablation\.steps.*?$", TEXT, re.MULTILINE | re.DOTALL)[0].splitlines()
    common = re.search(r"^Ablation\.common = \[\n.*?^\]$", plan, re.MULTILINE | re.DOTALL)[0].splitlines()
    assert shown == [line for line in plan.splitlines()[1:] if line not in common]
    body = read("experiments/cosine_attention/kernel.py").partition("    def __init__")[2].strip()
    overlay = read("experiments/cosine_attention/overlay.gin").strip()
    assert body in TEXT and body in read("components/README.md") and overlay in read("components/README.md")


def test_every_room_is_in_the_tree():
    tree = TEXT.partition("## The tree\n")[2].partition("```\n")[2].partition("```\n")[0]
    rooms = [path.name for path in (ROOT / "toolkit").iterdir() if (path / "__init__.py").is_file()]
    assert [room for room in rooms if f"\n  {room}/ " not in tree] == []


@pytest.mark.slow
def test_the_recipes_for_stopping_resuming_and_branching(tmp_path):
    for line in [line for line in RECIPES if "--name long" in line or "runs/long" in line]:
        words = [word.replace("runs/long", f"{tmp_path}/long") for word in shlex.split(line)]
        done = command(words[0], *words[1:], "--runs", str(tmp_path))
        assert done.returncode == 0, (line, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} >= {"long", "branch", "tuned", "again"}
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "The hen runs.", "sentence_bad": "The hen run."}\n')
    left_out = ("text_files", "--lm-eval")  # needs files of the reader; needs the extra eval and downloads its tasks
    for line in [line for line in RECIPES if "runs/quickstart" in line and not any(word in line for word in left_out)]:
        words = [word.replace("runs/quickstart", f"{tmp_path}/long") for word in shlex.split(line)]
        words = [word.replace("my/pairs/*.jsonl", f"{tmp_path}/pairs.jsonl") for word in words]
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
