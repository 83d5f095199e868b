"""Read gin files as data: parse them into layers without executing a binding, and hand the resolved config to gin.

The base file is the first layer, each further file is one more, and all ``-p`` bindings together are the last. All are
parsed before anything is imported. ``guard.resolve`` checks them and returns a Config. Its text is both what gin parses
and what the run saves, so a run can't differ from its ``config.gin``."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gin.config
import gin.config_parser as config_parser

from toolkit.config import keys
from toolkit.config.imports import load_module
from toolkit.registry import CATALOG
from toolkit.root import ROOT
from toolkit.store import seal

log = logging.getLogger("toolkit")
BASE = "gin/default.gin"
COMMAND_LINE = "-p"  # the title of the layer of all -p bindings


class ConfigError(ValueError):
    """The config is wrong. The message has a line for each problem, with its place and a remedy."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise ConfigError with one line for each problem, if there are any."""
    if lines := list(dict.fromkeys(problems)):
        raise ConfigError("\n".join(lines))


@dataclass(frozen=True)
class Reference:
    """``@scope/Name``: a class that will be built in that scope. ``called``: ``@Name()``, which is refused."""

    scope: str
    name: str
    called: bool = False

    def __str__(self) -> str:
        return "@" + keys.scoped(self.name, self.scope)


@dataclass(frozen=True)
class Macro:
    """``%NAME``: stands for the value in ``NAME = ...``."""

    name: str

    def __str__(self) -> str:
        return "%" + self.name


@dataclass(frozen=True)
class Binding:
    """``scope/name.parameter = value`` at ``where``; a macro's definition has no parameter."""

    scope: str
    name: str
    parameter: str
    value: object
    where: str
    header: str = ""  # for a binding in a block: the place of the block's first line

    @property
    def key(self) -> str:
        """``scope/name.parameter``, as in the file."""
        if not self.parameter:
            return keys.scoped(self.name, self.scope)
        return keys.spell(self.name, self.parameter, self.scope)

    def __str__(self) -> str:
        return f"{self.key} = {show(self.value)}"


@dataclass(frozen=True)
class Import:
    """``import module`` at ``where``."""

    module: str
    where: str


@dataclass(frozen=True)
class Layer:
    """The statements of one file, or of the command line. A layer overrides the layers before it."""

    title: str
    bindings: list[Binding] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # a message for each statement that is refused
    run: Path | None = None  # the folder of the run that the file belongs to


@dataclass(frozen=True)
class Config:
    """A resolved config. ``parts``: {(scope, name): {knob: value}} of every part that is built, defaults included."""

    parts: dict[tuple[str, str], dict[str, object]]
    written: list[Binding]  # those that override the base and are not overridden themselves
    imports: list[str]
    places: dict[str, str]  # {flat key: place of the binding} of the knobs that have one

    @property
    def text(self) -> str:
        """The whole config in gin's language: gin parses this text, and ``config.gin`` holds it."""
        lines = [f"import {module}" for module in self.imports]
        for (scope, name), knobs in self.parts.items():
            entry = CATALOG[name]
            lines += ["", f"# {entry.kind}: {entry.summary}"]
            lines += [f"{keys.spell(name, knob, scope)} = {show(value)}" for knob, value in knobs.items()]
        return "\n".join(lines).lstrip("\n") + "\n"

    @property
    def flat(self) -> dict[str, object]:
        """{"GPT.dim": 768, "GPT.norm": "@LayerNorm", ...}, JSON values only."""
        return {
            keys.spell(name, knob, scope): plain(value)
            for (scope, name), knobs in self.parts.items()
            for knob, value in knobs.items()
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the statements, hex. Comments don't count: they repeat docstrings, which may be reworded."""
        return hashlib.sha256(statements(self.text).encode()).hexdigest()

    def knobs_of(self, name: str, words: Iterable[str]) -> list[str]:
        """The flat keys of the knobs of part ``name`` whose names are in ``words``."""
        return [
            keys.spell(part, knob, scope)
            for (scope, part), knobs in self.parts.items()
            for knob in knobs
            if part == name and knob in words
        ]

    def holding(self, name: str) -> list[str]:
        """The flat keys of the knobs whose values refer to part ``name``."""
        return [
            keys.spell(part, knob, scope)
            for (scope, part), knobs in self.parts.items()
            for knob, value in knobs.items()
            if any(keys.bare(reference.name) == name for reference in references(value))
        ]

    def names(self, slot: str) -> list[str]:
        """The parts in a list of Experiment, by name: ``scope-Part``, or ``Part`` without a scope."""
        value = self.parts["", "Experiment"][slot]
        return [keys.scoped(keys.bare(r.name), r.scope).replace("/", "-") for r in references(value)]

    def build(self) -> Any:  # an Experiment, whose module lies above this one
        """Replace gin's config by this one, and return the Experiment that gin builds from it."""
        gin.config.clear_config()
        gin.config.parse_config(self.text)
        return gin.config.get_configurable("Experiment")()


def statements(text: str) -> str:
    """The text of a ``config.gin`` without its comments and blank lines."""
    return "".join(line for line in text.splitlines(keepends=True) if line.strip() and not line.startswith("#"))


def show(value: object) -> str:
    """A value as gin writes it."""
    if isinstance(value, Reference | Macro):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    return repr(value)


def plain(value: object) -> object:
    """A value as JSON values: references and macros become strings, tuples become lists."""
    return json.loads(json.dumps(value, default=str))


def references(value: object) -> Iterator[Reference]:
    """Every reference in a value; lists, tuples and dicts are searched."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        for item in [*value, *value.values()]:
            yield from references(item)


def check_statements(layers: Sequence[Layer]) -> None:
    """Raise ConfigError with a line for each refused statement, if there are any."""
    raise_problems(problem for layer in layers for problem in layer.refused)


def load_import(statement: Import) -> None:
    """Import one module; the current folder is searched too. Raises ConfigError with the statement's place."""
    current_folder = str(Path.cwd())
    if "" not in sys.path and current_folder not in sys.path:  # an installed command does not search the current folder
        sys.path.insert(0, current_folder)
    try:
        load_module(statement.module)
    except ValueError as error:
        raise ConfigError(f"{statement.where}: {error}") from error


def parse_file(path: str | Path) -> Layer:
    """Parse a gin file into a layer; nothing is imported or built. Raises ConfigError with file and line."""
    file = find(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    belongs_to_run = file.name == "config.gin" or (file.parent / "facts.json").is_file()
    _check_seal(file, path, text)
    return _parse(text, str(path), lambda line: f"{path}:{line}", file.parent if belongs_to_run else None)


def _check_seal(file: Path, path: str | Path, text: str) -> None:
    """Raise ConfigError if a run's file is not what the run wrote. Warns about a run's config without a seal."""
    sealed = seal.unseal_text(text)
    problem = sealed.problem
    if problem is None and file.name != "config.gin":
        problem = seal.file_problem(file.parent / "config.gin", file.name)
    if problem:
        raise ConfigError(f"{path} is damaged: {problem}; {seal.REMEDY}")
    if file.name == "config.gin" and not sealed.is_sealed and (file.parent / "facts.json").is_file():
        log.warning(
            "%s has no checksum (an older version wrote it, or it was edited), so damage can't be detected", path
        )


def parse_bindings(bindings: Sequence[str]) -> Layer:
    """Parse all ``-p`` bindings of a command line into one layer; nothing is imported or built."""
    layer = Layer(COMMAND_LINE)
    for text in bindings:
        quote = '"' if "'" in text else "'"
        place = f"-p {quote}{text}{quote}"
        parsed = _parse(text, COMMAND_LINE, functools.partial(_same_place, place))
        layer.bindings.extend(parsed.bindings)
        layer.imports.extend(parsed.imports)
        layer.refused.extend(parsed.refused)
    return layer


def _same_place(place: str, line: int) -> str:
    """The place of every line of a binding on the command line."""
    return place


def find(path: str | Path) -> Path:
    """The path of a gin file: as named, or, if no such file exists, that of the toolkit's own file of that name. Raises
    ConfigError if neither exists."""
    installed = Path(sysconfig.get_path("data")) / "share" / "gpt-ablation-toolkit"
    for root in (Path(), ROOT, installed):
        if (root / path).is_file():
            return root / path
    similar = sorted(str(p) for p in Path().glob("gin/**/*.gin") if p.name == Path(path).name)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    raise ConfigError(f"{path}: file not found{hint}")


class _Delegate(config_parser.ParserDelegate):
    """Makes gin's parser return references and macros as data."""

    def configurable_reference(self, name: str, evaluate: bool) -> Reference:
        return Reference(*keys.split_scope(name), evaluate)

    def macro(self, name: str) -> Macro:
        return Macro(name)


def _parse(text: str, title: str, where: Callable[[int], str], run: Path | None = None) -> Layer:
    """Parse a gin text into a layer. ``where``: a line number's place, for messages. Raises ConfigError."""
    layer, header, parser = Layer(title, run=run), "", None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        statements = list(parser)
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else 1)
        if isinstance(error, tokenize.TokenError):
            line = error.args[1][0]
        reason = str(getattr(error, "msg", None) or (error.args or [error])[0]).strip().splitlines()[0].rstrip(".")
        reason = re.sub(r"maximum recursion depth.*", "a value is nested too deeply", reason)
        reason = re.sub(r"malformed node or string.*", "a bare word is not a value", reason)
        hint = "strings need quotes; True, False and None are capitalised; gin has no arithmetic"
        raise ConfigError(f"{where(line)}: not valid gin: {reason} ({hint})") from error
    for statement in statements:
        place = where(statement.location.line_num)
        if isinstance(statement, config_parser.IncludeStatement):
            layer.refused.append(
                f"{place}: include is not supported: name {statement.filename} on the command line instead"
            )
        elif isinstance(statement, config_parser.ImportStatement) and statement.module.startswith("__gin__"):
            layer.refused.append(
                f"{place}: dynamic registration is not supported: import the module and name its parts"
            )
        elif isinstance(statement, config_parser.ImportStatement):
            layer.imports.append(Import(statement.module, place))
        elif isinstance(statement, config_parser.BlockDeclaration):
            header = place
        elif isinstance(statement, config_parser.BindingStatement):
            in_block = statement.location.char_num is not None  # gin keeps a column only in blocks
            key = (statement.scope, statement.selector, statement.arg_name)
            layer.bindings.append(Binding(*key, statement.value, place, header if in_block else ""))
    return layer
