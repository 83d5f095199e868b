"""Every command, fed random and distorted files of every kind: an exit code of the contract, no traceback, no loss."""

import random
import re
import shutil
from collections import Counter

import pytest

from faults import fuzzing
from faults.fuzzing import Case, digests, distort, distort_json, files

pytestmark = pytest.mark.slow

GROUPS, OF_A_GROUP = 10, 200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield fuzzing.prepare(tmp_path_factory.mktemp("world"))
    patch.undo()


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_input_ends_in_a_traceback_or_loses_anything(group, world, tmp_path):
    root = tmp_path / "world"
    root.mkdir()
    cases = [_case(seed, world, root) for seed in range(group * OF_A_GROUP, (group + 1) * OF_A_GROUP)]
    before = digests(world)
    untouched = {case.seed: digests(case.folder) for case in cases}
    fuzzing.run_all(cases, tmp_path)
    wrong = [f"{why}\n{case}" for case in cases if (why := _wrong(case, untouched[case.seed]))]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n\n" + "\n\n".join(wrong[:8])
    assert digests(world) == before
    codes = Counter(code for case in cases for code in case.codes)
    assert codes[0] and codes[2], codes  # some inputs are fine, some are refused


def _case(seed, world, root) -> Case:
    draw = random.Random(seed)
    kind = draw.choice((_run, _run, _run, _plan, _plan, _gin, _gin, _binding, _text, _flags))
    return kind(seed, draw, world, root / "x")


def _changed(path, draw):
    content = path.read_bytes()
    forged = path.suffix == ".json" and draw.random() < 0.7
    changed, how = distort_json(content, draw) if forged else distort(content, draw)
    path.write_bytes(changed)
    return how


def _run(seed, draw, world, root):
    """A file of a run."""
    folder = fuzzing.copied(world, seed, "runs") if not root.exists() else root
    folder = _move(folder, root, seed)
    run = folder / "runs" / draw.choice("ab")
    path = draw.choice([file for file in files(run) if file.suffix != ".png"])
    how = _changed(path, draw)
    command = draw.choice([
        ["toolkit.generate", str(run), "--max-tokens", "3"],
        ["toolkit.evaluate", str(run)],
        ["toolkit.evaluate", str(run), "--json"],
        ["toolkit.run", "--runs", str(folder / "runs"), "--name", run.name, "--resume"],
        ["toolkit.run", "--base", str(run / "config.gin"), "--dry-run"],
        ["toolkit.run", "--base", str(run / "config.gin"), "--safe-config"],
        ["toolkit.compare", str(folder / "runs" / "a"), str(folder / "runs" / "b"), "--out", str(folder / "out")],
    ])  # fmt: skip
    return Case(seed, folder, path, how, [command])


def _plan(seed, draw, world, root):
    """A file of a plan's folder, or of one of its runs."""
    folder = _move(fuzzing.copied(world, seed, "plans", "question"), root, seed)
    plan = folder / "plans" / "question"
    top = [plan / name for name in ("plan.json", "plan.gin", "common.gin")]
    inner = [file for file in files(plan) if file.suffix in (".json", ".jsonl", ".gin")]
    path = draw.choice([*top, *top, *inner, folder / "question" / "plan.gin"])
    how = _changed(path, draw)
    command = ["toolkit.compare", str(plan), *draw.choice(([], ["--json"], ["--strict"]))]
    if path.parent == folder / "question":
        command = ["toolkit.ablate", str(path), "--runs", str(folder / "plans"), "--dry-run"]
    return Case(seed, folder, path, how, [command])


def _gin(seed, draw, world, root):
    """An overlay."""
    folder = root.with_name(f"case-{seed}")
    folder.mkdir()
    path = folder / "x.gin"
    overlays = [fuzzing.ROOT / "gin" / name for name in ("quickstart.gin", "model/tiny.gin", "position/yarn.gin")]
    shutil.copy(draw.choice(overlays), path)
    how = _changed(path, draw)
    command = draw.choice([
        ["toolkit.run", "gin/model/tiny.gin", str(path), "--dry-run"],
        ["toolkit.run", "gin/model/tiny.gin", str(path), "--dry-run", "--json"],
        ["toolkit.run", str(path), "--safe-config"],
        ["toolkit.run", "--base", str(path), "--dry-run"],
        ["toolkit.ablate", str(path), "--runs", str(folder), "--dry-run"],
        ["toolkit.evaluate", str(world / "runs" / "a"), str(path)],
    ])  # fmt: skip
    return Case(seed, folder, path, how, [command])


def _binding(seed, draw, world, root):
    """A binding of the command line."""
    folder = root.with_name(f"case-{seed}")
    folder.mkdir()
    text = draw.choice(fuzzing.ODD).decode("utf-8", "surrogateescape").replace("\0", "")
    if draw.random() < 0.5:
        key = draw.choice(
            ("GPT.dim", "GPT.n_head", "Experiment.steps", "Experiment.seed", "AdamW.lr", "GPT.norm", "X.y")
        )
        values = (
            "1",
            "0",
            "-1",
            "7",
            "1e400",
            "10**9",
            "[1]",
            "'x'",
            "@RMSNorm",
            "%m",
            "None",
            "9" * 30,
            "(",
            "{1: 2}",
        )
        text = f"{key} = {draw.choice(values)}"
    where = draw.choice(
        (["toolkit.run", "gin/model/tiny.gin", "--dry-run"], ["toolkit.evaluate", str(world / "runs" / "a")])
    )
    return Case(seed, folder, folder, text[:80], [[*where, "-p", text]])


def _text(seed, draw, world, root):
    """A corpus."""
    folder = _move(fuzzing.copied(world, seed, "text"), root, seed)
    path = draw.choice(files(folder))
    how = _changed(path, draw)
    data = ["-p", "Experiment.data = @TextFiles", "-p", f"TextFiles.paths = [{str(path)!r}]"]
    return Case(
        seed, folder, path, how, [["toolkit.prepare", "gin/model/tiny.gin", *data, "-p", "Experiment.seq_len = 16"]]
    )


def _flags(seed, draw, world, root):
    """Words of the command line."""
    folder = root.with_name(f"case-{seed}")
    folder.mkdir()
    run, odd = (
        str(world / "runs" / "a"),
        draw.choice(("", "-1", "0", "1e9", "nan", "9" * 30, "\udcff", "x" * 5000, "../..", "*")),
    )
    command = draw.choice([
        ["toolkit.generate", run, "--max-tokens", "2", draw.choice(("--seed", "--prompt", "--top-k", "--num")), odd],
        ["toolkit.generate", odd],
        ["toolkit.evaluate", run, draw.choice(("--split", "-p", "--import")), odd],
        ["toolkit.run", "gin/model/tiny.gin", "--dry-run", draw.choice(("--name", "--import", "--base")), odd],
        ["toolkit.run", "--runs", str(folder), "--name", "n", "gin/model/tiny.gin", "--from", odd],
        ["toolkit.components", "show", odd],
        ["toolkit.components", "check", odd],
        ["toolkit.components", "list", "--kind", odd],
        ["toolkit.compare", odd, "--out", str(folder)],
        ["toolkit.compare", run, "--out", str(folder), draw.choice(("--effect", "--baseline", "--plan")), odd],
        ["toolkit.ablate", odd, "--dry-run"],
    ])  # fmt: skip
    return Case(seed, folder, folder, repr(odd[:20]), [command])


def _move(folder, root, seed):
    """The copy at its place beside the other cases."""
    place = root.with_name(f"case-{seed}")
    if folder != place:
        shutil.move(folder, place)
    return place


def _wrong(case: Case, before: dict[str, str]) -> str:
    """What is wrong with how a case ended, or nothing."""
    may_fail = case.commands[0][0] in ("toolkit.compare", "toolkit.ablate", "toolkit.components")
    if any(code not in fuzzing.CODES or (code == 1 and not may_fail) for code in case.codes):
        return "an exit code that no contract names"
    if "Traceback (most recent call last)" in case.said:
        return "a traceback"
    after = digests(case.folder)
    if any(name.endswith(".tmp") or ".tmp-" in name for name in after if name not in before):
        return "a draft is left behind"
    if "--resume" in case.commands[0]:
        return _lost_by_resuming(case.codes[0], before, after)
    lost = [name for name, digest in before.items() if after.get(name) != digest and "/compare/" not in name]
    return f"files that a command should only read have changed: {lost}" if lost else ""


def _lost_by_resuming(code: int, before: dict[str, str], after: dict[str, str]) -> str:
    """A resume that is refused loses no checkpoint, though it may set a damaged one aside, and no row; one that is not
    goes on from, or stays at, the newest step."""
    if code:
        kept = set(after.values())
        lost = [name for name, digest in before.items() if "/checkpoints/" in name and digest not in kept]
        lost += [name for name, digest in before.items() if name.endswith(".jsonl") and after.get(name) != digest]
        return f"a resume that was refused lost {lost}" if lost else ""
    newest = [max(re.findall(r"/step-(\d{8})/", " ".join(names)), default="") for names in (before, after)]
    return f"a resume went back from step {newest[0]} to {newest[1]}" if newest[1] < newest[0] else ""
