"""gin files as data: read into layers without executing a binding, resolved into one complete config, handed to gin.

The base file is the first layer, each further file one more, all ``-p`` bindings together the last. All of them are
parsed before the first import is made. ``guard.resolve`` checks them and returns a Config; its text is both what gin
parses and what the run saves, so a run can't differ from its ``config.gin``."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gin
from gin import config_parser

from toolkit.config.imports import load_module
from toolkit.registry import CATALOG
from toolkit.root import ROOT
from toolkit.store import seal

log = logging.getLogger("toolkit")
BASE = "gin/default.gin"


class ConfigError(ValueError):
    """The config is wrong; the message has a line for each thing that is, with its place and the remedy."""


@dataclass(frozen=True)
class Reference:
    """``@scope/Name``: a class, to be built in that scope. ``called`` is True for ``@Name()``, which is refused."""

    scope: str
    name: str
    called: bool = False

    def __str__(self):
        return "@" + (f"{self.scope}/" if self.scope else "") + self.name


@dataclass(frozen=True)
class Macro:
    """``%NAME``: the value that ``NAME = ...`` gives."""

    name: str

    def __str__(self):
        return "%" + self.name


@dataclass(frozen=True)
class Binding:
    """``scope/name.parameter = value`` at ``where``; a macro's definition has no parameter."""

    scope: str
    name: str
    parameter: str
    value: object
    where: str
    header: str = ""  # in a block: where the part is named

    @property
    def key(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return scope + self.name + (f".{self.parameter}" if self.parameter else "")

    def __str__(self):
        return f"{self.key} = {show(self.value)}"


@dataclass(frozen=True)
class Import:
    """``import module`` at ``where``."""

    module: str
    where: str


@dataclass(frozen=True)
class Layer:
    """What one file, or the command line, lays over the layers before it."""

    title: str
    bindings: list[Binding] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # a line for each statement that gin has and we do not
    run: Path | None = None  # the run whose file it is


@dataclass(frozen=True)
class Config:
    """A resolved config: every part that is built, by (scope, name), with every knob, defaults included."""

    parts: dict[tuple[str, str], dict[str, object]]
    written: list[Binding]  # laid over the base, and not displaced
    imports: list[str]
    places: dict[str, str]  # where each knob is bound that a file or the command line binds

    @property
    def text(self) -> str:
        """The whole config as gin: what gin is given, and what ``config.gin`` holds."""
        lines = [f"import {module}" for module in self.imports]
        for (scope, name), knobs in self.parts.items():
            entry = CATALOG[name]
            lines += ["", f"# {entry.kind}: {entry.summary}"]
            prefix = f"{scope}/" if scope else ""
            lines += [f"{prefix}{name}.{knob} = {show(value)}" for knob, value in knobs.items()]
        return "\n".join(lines).lstrip("\n") + "\n"

    @property
    def flat(self) -> dict[str, object]:
        """{"GPT.dim": 768, "GPT.norm": "@LayerNorm", ...}, JSON values only."""
        flat = {}
        for (scope, name), knobs in self.parts.items():
            prefix = f"{scope}/{name}" if scope else name
            flat |= {f"{prefix}.{knob}": plain(value) for knob, value in knobs.items()}
        return flat

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def knobs_of(self, name: str, words: Iterable[str]) -> list[str]:
        """The flat keys of those knobs of a part whose names are among the words."""
        return [
            f"{scope}/{part}.{knob}".lstrip("/")
            for (scope, part), knobs in self.parts.items()
            for knob in knobs
            if part == name and knob in words
        ]

    def holding(self, name: str) -> list[str]:
        """The flat keys of the knobs that hold a part."""
        return [
            f"{scope}/{part}.{knob}".lstrip("/")
            for (scope, part), knobs in self.parts.items()
            for knob, value in knobs.items()
            if any(reference.name.rpartition(".")[2] == name for reference in references(value))
        ]

    def build(self):
        """Give gin this config, in place of any other, and return the Experiment that it makes."""
        gin.clear_config()
        gin.parse_config(self.text)
        return gin.get_configurable("Experiment")()


def show(value: object) -> str:
    """A value in gin's own spelling."""
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
    """A value as JSON: references and macros become their spelling, tuples lists."""
    return json.loads(json.dumps(value, default=str))


def references(value: object) -> Iterator[Reference]:
    """Every reference in a value, lists, tuples and dicts searched."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        for item in [*value, *value.values()]:
            yield from references(item)


def check_statements(layers: Sequence[Layer]) -> None:
    """Raise ConfigError, a line for each statement that is refused."""
    refused = [problem for layer in layers for problem in layer.refused]
    if refused:
        raise ConfigError("\n".join(refused))


def load_import(statement: Import) -> None:
    """Make one import; the folder that one is in is on the path. Raises ConfigError with its place."""
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:  # an installed command does not search the folder it is in
        sys.path.insert(0, here)
    try:
        load_module(statement.module)
    except ValueError as error:
        raise ConfigError(f"{statement.where}: {error}") from error


def parse_file(path: str | Path) -> Layer:
    """A gin file as a layer; nothing is imported or built. Raises ConfigError with file and line."""
    file = find(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    of_a_run = file.name == "config.gin" or (file.parent / "facts.json").is_file()
    _check_seal(file, path, text)
    return _parse(text, str(path), lambda line: f"{path}:{line}", file.parent if of_a_run else None)


def _check_seal(file: Path, path: str | Path, text: str) -> None:
    """Raise ConfigError for a file that is not what a run wrote. A run's config without a seal costs a warning."""
    sealed = seal.unseal_text(text)
    problem = sealed.problem
    if problem is None and file.name != "config.gin":
        problem = seal.file_problem(file.parent / "config.gin", file.name)
    if problem:
        raise ConfigError(f"{path} is damaged: {problem}; {seal.REMEDY}")
    if file.name == "config.gin" and not sealed.is_sealed and (file.parent / "facts.json").is_file():
        log.warning("%s has no seal (an older version wrote it, or it was edited): damage can't be noticed", path)


def parse_bindings(bindings: Sequence[str]) -> Layer:
    """All ``-p`` bindings of a command line as one layer; nothing is imported or built."""
    layer = Layer("-p")
    for text in bindings:
        quote = '"' if "'" in text else "'"
        one = _parse(text, "-p", lambda line, place=f"-p {quote}{text}{quote}": place)
        layer.bindings.extend(one.bindings)
        layer.imports.extend(one.imports)
        layer.refused.extend(one.refused)
    return layer


def find(path: str | Path) -> Path:
    """A gin file as named, or, where no such file is here, the one that the toolkit brings."""
    installed = Path(sysconfig.get_path("data")) / "share" / "gpt-ablation-toolkit"
    for root in (Path(), ROOT, installed):
        if (root / path).is_file():
            return root / path
    near = sorted(str(p) for p in Path().glob("gin/**/*.gin") if p.name == Path(path).name)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{path}: there is no such file{hint}")


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, name, evaluate):
        scope, _, name = name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, name):
        return Macro(name)


def _parse(text, title, where, run=None) -> Layer:
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
        reason = re.sub(r"malformed node or string.*", "a bare word is no value", reason)
        hint = "strings need quotes; True, False and None are capitalised; there is no arithmetic"
        raise ConfigError(f"{where(line)}: this is not gin: {reason} ({hint})") from error
    for statement in statements:
        place = where(statement.location.line_num)
        if isinstance(statement, config_parser.IncludeStatement):
            layer.refused.append(
                f"{place}: include is not used here: name {statement.filename} on the command line instead"
            )
        elif isinstance(statement, config_parser.ImportStatement) and statement.module.startswith("__gin__"):
            layer.refused.append(f"{place}: dynamic registration is not used here: import the module, name its parts")
        elif isinstance(statement, config_parser.ImportStatement):
            layer.imports.append(Import(statement.module, place))
        elif isinstance(statement, config_parser.BlockDeclaration):
            header = place
        elif isinstance(statement, config_parser.BindingStatement):
            in_block = statement.location.char_num is not None  # the parser keeps a column for those alone
            key = (statement.scope, statement.selector, statement.arg_name)
            layer.bindings.append(Binding(*key, statement.value, place, header if in_block else ""))
    return layer
