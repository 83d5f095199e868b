"""How much of a wrong config is noticed: every binding of gin/default.gin made wrong in every way that we know.

    python -m tests.mutants [--share 0.05]

A mutant is the whole file with one thing changed. It counts as killed when composing it, as every command does before
it reads data, raises what the command turns into exit code 2, and the message names the file, the line of the binding
that was changed, and for a slip of the fingers the word that was meant. Mutants that say another thing that is right
are counted apart, by the rule that makes them so."""

from __future__ import annotations

import argparse
import re
import tempfile
import time
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.compose import compose, load_shelf, try_build
from toolkit.output.errors import clean
from toolkit.protocols import KINDS
from toolkit.registry import CATALOG

DEFAULT = Path(__file__).parent.parent / "gin" / "default.gin"
EXISTS = "the slip is itself a name that exists there"
BINDING = re.compile(r"^(?P<scope>(?:\w+/)*)(?P<name>\w+)\.(?P<knob>\w+) = (?P<value>.*)$")
VALUES = ("None", "True", "3", "2.5", "'text'", "[]", "(1,)", "{'a': 1}", "@LayerNorm", "[[3]]")
AT_MOST_ONE = ("dropout", "fraction", "final_fraction", "label_smoothing")  # shares: 1.5 is none

# what only the constructors notice, once they have each other's shapes
BUILT = {
    "GPT.dim": ("770", "756", "12"),
    "GPT.n_head": ("5", "7", "13", "768"),
    "GPT.n_kv_head": ("5", "24"),
    "GPT.block": ("[" + ", ".join(["@PreNorm"] * 13) + "]",),
    "GPT.norm": ("[" + ", ".join(["@LayerNorm"] * 13) + "]",),
    "GPT.position": ("[" + ", ".join(["@RoPE"] * 13) + "]",),
    "Experiment.accumulate": ("3", "16"),
    "Experiment.steps": ("1000", "2000"),
    "warmup_steps": ("100_000", "200_000"),
    "SelfAttention.qk_norm_after_rotation": ("True",),
    "AdamW.betas": ("(0.9, 1.0)", "(0.9,)"),
    "AdamW.no_decay": ("['nothing.*']",),
    "Tiktoken.encoding": ("'no_such_encoding'",),
}


@dataclass(frozen=True)
class Mutant:
    """One wrong file. ``told`` is what the message has to hold beside file and line; ``line`` is None where the
    binding is not there any more; ``equivalent`` is the rule by which it is not wrong."""

    kind: str
    text: str
    line: int | None
    told: str
    change: str
    equivalent: str = ""
    built: bool = False


def slips(word: str) -> Iterator[tuple[str, str]]:
    """(what happened, the word with it): each letter dropped, doubled, and changed with its neighbour."""
    places = range(len(word))
    spelled = [("dropped", word[:i] + word[i + 1 :]) for i in places]
    spelled += [("doubled", word[: i + 1] + word[i:]) for i in places]
    spelled += [("swapped", word[:i] + word[i + 1] + word[i] + word[i + 2 :]) for i in places[:-1]]
    for how, wrong in dict((wrong, (how, wrong)) for how, wrong in spelled).values():
        if wrong != word and wrong.isidentifier():
            yield how, wrong


def flat(text: str) -> list[str]:
    """The file's bindings, one a line, without blocks or comments."""
    block, lines = "", []
    for line in (line.split("#")[0].rstrip() for line in text.splitlines()):
        if line.endswith(":"):
            block = line[:-1] + "."
        elif line.startswith(" "):
            lines.append(block + line.strip())
        elif line:
            lines.append(line)
    return lines


def scoped(lines: list[str]) -> list[str]:
    """The same config with every part but the experiment in a scope of its own: @RoPE becomes @the_rope/RoPE, and
    RoPE.theta the_rope/RoPE.theta."""
    bound = {m["name"] for m in map(BINDING.match, lines) if m} - {"Experiment"}

    def put(match):
        return f"{match[1]}the_{match[2].lower()}/{match[2]}" if match[2] in bound else match[0]

    return [re.sub(r"(@|^)(\w+)(?=\.\w+ =|\b)", put, line) for line in lines]


def mutants() -> list[Mutant]:
    """All of them."""
    load_shelf()
    text = DEFAULT.read_text(encoding="utf-8")
    lines = flat(text)
    parsed = {m["name"] + "." + m["knob"]: m["value"] for m in map(BINDING.match, lines) if m}
    built = {"Experiment", "GPT", *re.findall(r"@(\w+)", text)}
    every = [
        *typos(text.splitlines()),
        *typos(lines, "name"),
        *typos(scoped(lines), "scope"),
        *wrong_values(lines),
        *wrong_kinds(lines),
        *duplicates(text.splitlines()),
        *removed(lines),
        *unused(lines, built),
        *constructed(lines),
    ]
    assert parsed and compose(base=DEFAULT)[0].text
    return every


def typos(lines: list[str], only: str = "") -> Iterator[Mutant]:
    """Every word of a key and every reference, scope and macro of a value, with each slip."""
    macros = {line.split(" =")[0] for line in lines if re.match(r"\w+ =", line)}
    scopes = {scope for line in lines for scope in re.findall(r"(\w+)/", line)}
    part = ""
    for number, line in enumerate(lines):
        code = line.split("#")[0]
        part = code[:-1] if re.match(r"\w+:\s*$", code) else part
        for role, match in words(code):
            if not role.startswith(only):
                continue
            word = match[0]
            owner = match.string[match.start() - len(part) :] and (BINDING.match(code) or {"name": part})["name"]
            known = {"parameter": lambda o=owner: CATALOG[o].knobs, "macro": lambda: macros, "scope": lambda: scopes}
            names = known.get(role.split()[0], lambda: CATALOG)()
            for how, wrong in slips(word):
                changed = line[: match.start()] + wrong + line[match.end() :]
                rule = EXISTS if wrong in names else ""
                yield replaced(f"{role}, {how}", lines, number, changed, f"{word!r}", rule)


def words(code: str) -> Iterator[tuple[str, re.Match]]:
    """(role, place) of each word of a line that stands for something."""
    key, _, _ = code.partition("=")
    patterns = [
        ("scope of a binding", r"^(\w+)(?=/)"),
        ("name", r"(?<![\w.])[A-Z]\w*(?=\.|:)"),
        ("parameter", r"(?<=\.)\w+(?= =)|(?<=^  )\w+(?= =)"),
        ("macro, defined", r"^[a-z]\w*(?= =)"),
    ]
    for role, pattern in patterns:
        for match in re.compile(pattern).finditer(code, 0, len(key) + 1):
            yield role, match
    for role, pattern in (
        ("scope of a reference", r"(?<=@)\w+(?=/)"),
        ("reference", r"(?<=@)[A-Z]\w*|(?<=/)[A-Z]\w*"),
        ("macro, used", r"(?<=%)\w+"),
    ):
        for match in re.compile(pattern).finditer(code, len(key)):
            yield role, match


def replaced(kind, lines, number, changed, told="", rule="", built=False) -> Mutant:
    text = "\n".join([*lines[:number], changed, *lines[number + 1 :], ""])
    return Mutant(kind, text, number + 1, told, f"{lines[number].strip()}  ->  {changed.strip()}", rule, built)


def bindings(lines: list[str]) -> Iterator[tuple[int, re.Match]]:
    for number, line in enumerate(lines):
        if match := BINDING.match(line):
            yield number, match


def wrong_values(lines: list[str]) -> Iterator[Mutant]:
    """Values of types that the annotation does not name, and numbers that make no sense for any knob in the file."""
    for number, match in bindings(lines):
        hint = CATALOG[match["name"]].hints[match["knob"]]
        allowed, key = plain_types(hint), lines[number][: match.start("value")]
        for value in VALUES:
            if value != match["value"] and not may_be(value, allowed):
                yield replaced("type", lines, number, key + value, match["knob"])
        numbers = allowed & {int, float}
        wrong = ["-1", "-7"] if numbers else []
        wrong += ["-1.0", "1e999", "-1e999"] if float in numbers else []
        wrong += ["0"] if numbers and "Gt(gt=0)" in str(hint) else []
        wrong += ["1.5", "2"] if match["knob"] in AT_MOST_ONE else []
        wrong += ["'fp8'", "''"] if typing.Literal in allowed else []
        for value in wrong:
            yield replaced("range", lines, number, key + value, match["knob"])


def plain_types(hint) -> set[type]:
    """The types that an annotation names, one level deep, by its own reading of it."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return plain_types(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(plain_types, typing.get_args(hint)))
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)} | {typing.Literal}
    return {origin or hint}


def may_be(value: str, allowed: set[type]) -> bool:
    if value == "@LayerNorm":
        return type in allowed
    given = eval(value)
    if isinstance(given, str) and typing.Literal in allowed:
        return False
    return type(given) in allowed or (type(given) is int and float in allowed)


def wrong_kinds(lines: list[str]) -> Iterator[Mutant]:
    """In each slot a part of every other kind, alone or in the list."""
    some = {kind: next(e.name for e in CATALOG.values() if e.kind == kind) for kind in KINDS if kind != "experiment"}
    for number, match in bindings(lines):
        knob = match["knob"].removesuffix("s")
        for kind, name in some.items():
            if knob in KINDS and kind != knob:
                wrong = re.sub(r"@\w+|(?<=\[)(?=\])", f"@{name}", match["value"], count=1)
                yield replaced("kind", lines, number, lines[number][: match.start("value")] + wrong, f"kind {knob}")


def duplicates(lines: list[str]) -> Iterator[Mutant]:
    """Every binding a second time, on the next line."""
    for number, line in enumerate(lines):
        if re.match(r"\s*[\w.]+ = ", line):
            text = "\n".join([*lines[: number + 1], *lines[number:], ""])
            yield Mutant("duplicate", text, number + 2, "bound twice", f"{line.split('#')[0].strip()}, twice")


def removed(lines: list[str]) -> Iterator[Mutant]:
    """Every binding taken away; where the knob has a default the config means what it meant."""
    for number, line in enumerate(lines):
        match = BINDING.match(line)
        knob = CATALOG[match["name"]].knobs[match["knob"]] if match else None
        rule = "the knob has a default" if match and knob.default is not knob.empty else ""
        key = line.split(" =")[0]
        text = "\n".join([*lines[:number], *lines[number + 1 :], ""])
        yield Mutant("removed", text, None, key, f"{key}, removed", rule)


def unused(lines: list[str], built: set[str]) -> Iterator[Mutant]:
    """A knob of each part that nothing builds, bound at the end to its default."""
    for entry in CATALOG.values():
        for name, knob in entry.knobs.items():
            if entry.name not in built and entry.module.startswith("components") and plain(knob.default):
                line = f"{entry.name}.{name} = {knob.default!r}"
                text = "\n".join([*lines, line, ""])
                yield Mutant("unused", text, len(lines) + 1, "changes nothing", line)
    yield Mutant("unused", "\n".join([*lines, "WIDTH = 3", ""]), len(lines) + 1, "never used", "WIDTH = 3")


def plain(value) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def constructed(lines: list[str]) -> Iterator[Mutant]:
    """Values of the right type and range that do not go with the others."""
    for number, line in enumerate(lines):
        key, _, value = line.partition(" = ")
        for wrong in BUILT.get(key, ()):
            yield replaced("built", lines, number, f"{key} = {wrong}", key.rpartition(".")[2], built=True)


def survives(mutant: Mutant, file: Path) -> str:
    """Why a mutant is not killed; empty when it is."""
    file.write_text(mutant.text, encoding="utf-8")
    try:
        config, _ = compose(base=file)
        if mutant.built:
            try_build(config)
    except ValueError as error:
        message = clean(error)
        place = f"{file}:{mutant.line}" if mutant.line else str(file)
        if not re.search(re.escape(place) + r"\b", message):
            return f"{place} is not in: {message}"
        return "" if mutant.told in message else f"{mutant.told} is not in: {message}"
    return "nothing was said"


@dataclass
class Score:
    killed: int = 0
    total: int = 0
    equivalent: int = 0


def judge(chosen: list[Mutant]) -> tuple[dict[str, Score], list[tuple[Mutant, str]], dict[str, int]]:
    """Scores by class, what survived and why, and how many were left out by each rule."""
    scores, alive, rules = {}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "default.gin"
        for mutant in chosen:
            score = scores.setdefault(mutant.kind, Score())
            if mutant.equivalent:
                score.equivalent += 1
                rules[mutant.equivalent] = rules.get(mutant.equivalent, 0) + 1
                continue
            score.total += 1
            why = survives(mutant, file)
            score.killed += not why
            alive += [(mutant, why)] if why else []
    return scores, alive, rules


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, evenly chosen")
    share = parser.parse_args().share
    started, every = time.perf_counter(), mutants()
    chosen = every[:: max(1, round(1 / share))]
    scores, alive, rules = judge(chosen)
    for mutant, why in alive:
        print(f"survived  {mutant.kind}: {mutant.change}\n          {why}")
    print(f"{'mutants of gin/default.gin':34} {'killed':>6} / {'total':>5}  equivalent")
    for kind, score in scores.items():
        print(f"{kind:34} {score.killed:6} / {score.total:5}  {score.equivalent or ''}")
    killed, total = (sum(getattr(score, of) for score in scores.values()) for of in ("killed", "total"))
    print(f"{'all':34} {killed:6} / {total:5}  {killed / total:.2%}, {time.perf_counter() - started:.0f} s")
    for rule, count in rules.items():
        print(f"{count} equivalent: {rule}")


if __name__ == "__main__":
    main()
