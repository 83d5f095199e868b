"""A bit flipped, an end cut off, a block of zeros, in every file of a run, of a cache and of a plan's folder: the
command that reads the file names it, or gives the results that it gives without the damage."""

import difflib
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults import fuzzing
from faults.fuzzing import Case, digests, files, harm

pytestmark = pytest.mark.slow

TRIALS, GROUPS = 400, 8
CLOCK = re.compile(r"\d+(\.\d+)?k? ?(tokens/s|s\b)|\d+:\d\d:\d\d")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folders, and what each command says and leaves without damage."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    root = fuzzing.prepare(tmp_path_factory.mktemp("world"))
    sound = {}
    for name in ("a", "b", "plan"):
        case = _case(f"sound-{name}", root, name)
        fuzzing.run_all([case], tmp_path_factory.mktemp("logs"))
        assert set(case.codes) == {0}, case
        sound[name] = _results(case)
    yield root, sound
    patch.undo()


@pytest.mark.parametrize("group", range(GROUPS))
def test_damage_is_named_or_without_effect(group, world, tmp_path):
    root, sound = world
    cases, of = [], {}
    for seed in range(group * TRIALS // GROUPS, (group + 1) * TRIALS // GROUPS):
        draw = random.Random(seed)
        name = ("a", "b", "plan")[seed % 3]
        case = _case(seed, root, name, tmp_path)
        place = case.folder / ("plans" if name == "plan" else f"runs/{name}")
        candidates = files(place)
        case.changed = candidates[(seed * 7 + group) % len(candidates)]
        content, case.how = harm(case.changed.read_bytes(), draw)
        case.changed.write_bytes(content)
        of[seed] = name
        cases.append(case)
    fuzzing.run_all(cases, tmp_path)
    silent = [
        f"{case}\n{changed}"
        for case in cases
        if not _named(case) and (changed := _difference(_results(case), sound[of[case.seed]]))
    ]
    broken = [
        str(case) for case in cases if "Traceback" in case.said or any(c not in fuzzing.CODES for c in case.codes)
    ]
    assert not broken, f"{len(broken)} of {len(cases)}:\n\n" + "\n\n".join(broken[:6])
    assert not silent, f"{len(silent)} of {len(cases)}:\n\n" + "\n\n".join(silent[:6])
    assert Counter(map(_named, cases))[True] > len(cases) // 3  # most damage is not of the harmless kind


def test_a_damaged_token_cache_is_built_again(world, tmp_path):
    run, cache = world[0] / "runs" / "a", tmp_path / "cache"
    sound_case = _evaluated("sound", run, cache)
    fuzzing.run_all([sound_case], tmp_path)  # this fills the cache
    score = _last_object(sound_case)
    cases, sound = [], {}
    for seed in range(40):
        copy = shutil.copytree(cache, tmp_path / f"cache-{seed}")
        candidates = [path for path in files(copy) if path.suffix != ".lock"]
        path = candidates[seed % len(candidates)]
        sound[seed] = path.read_bytes()
        content, how = harm(sound[seed], random.Random(seed))
        path.write_bytes(content)
        case = _evaluated(seed, run, copy)
        case.changed, case.how = path, how
        cases.append(case)
    fuzzing.run_all(cases, tmp_path)
    for case in cases:
        assert case.codes == [0] and "Traceback" not in case.said, case
        assert _last_object(case) == score, case
        named = case.changed.parent.name in case.said
        assert case.changed.read_bytes() == sound[case.seed] or not named, case


def _evaluated(seed, run: Path, cache: Path) -> Case:
    """``evaluate --json`` with a cache of its own: the process that it is forked from has an environment already."""
    return Case(seed, cache, cache, "", [["faults.test_damage", str(cache), "toolkit.evaluate", str(run), "--json"]])


def _last_object(case: Case) -> dict:
    """What ``evaluate --json`` printed."""
    return json.loads(next(line for line in reversed(case.said.splitlines()) if line.startswith("{")))


def main(words: list[str]) -> int:
    """A command with another cache."""
    import importlib
    import os

    os.environ["TOOLKIT_CACHE"] = words[0]
    return importlib.import_module(words[1]).main(words[2:])


def _case(seed, root: Path, name: str, scratch: Path | None = None) -> Case:
    folder = (scratch or root.parent) / f"folder-{seed}"
    if name == "plan":
        shutil.copytree(root / "plans", folder / "plans")
        commands = [["toolkit.compare", str(folder / "plans" / "question")]]
        return Case(seed, folder, folder, "", commands)
    shutil.copytree(root / "runs", folder / "runs")
    run, other = folder / "runs" / name, folder / "runs" / ("b" if name == "a" else "a")
    commands = [
        ["toolkit.generate", str(run), "--max-tokens", "8"],
        ["toolkit.evaluate", str(run), "--json"],
        ["toolkit.compare", str(run), str(other), "--out", str(folder / "out")],
        ["toolkit.run", "--runs", str(folder / "runs"), "--name", name, "--resume"],
    ]
    return Case(seed, folder, folder, "", commands)


def _named(case: Case) -> bool:
    """Whether the output names the file, or the checkpoint that it belongs to."""
    name = case.changed.name
    if case.changed.parent.parent.name == "checkpoints":
        return f"{case.changed.parent.name}" in case.said and ("skipping" in case.said or "can't be used" in case.said)
    output = case.said.replace("\n", "")
    return name in output and any(
        word in output for word in ("damaged", "not what was", "can't be", "bytes", "has no checksum", "edited")
    )


def _difference(results: dict[str, str], sound: dict[str, str]) -> str:
    """What is another result than without the damage; empty where nothing is."""
    lines = difflib.unified_diff(sound["said"].splitlines(), results["said"].splitlines(), "sound", "damaged", n=0)
    files = [name for name in results if results[name] != sound.get(name) and name != "said"]
    return "\n".join([*lines, *files])


def _results(case: Case) -> dict[str, str]:
    """What the commands gave, without the clock: text, scores, verdicts, weights of files that were not damaged."""
    results = {"said": CLOCK.sub("", case.said.replace(str(case.folder), ""))}
    kept = ("model.safetensors", "state.pt", "samples.md", "compare.csv")
    for name, digest in digests(case.folder).items():
        if Path(name).name in kept and case.folder / name != case.changed:
            results[name] = digest
    return results
