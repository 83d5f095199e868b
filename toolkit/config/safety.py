"""Decide what a config may import, and list what it would do without doing it. gin files import modules, so they are
code.

A file that a person names on the command line may import anything, as a script may. A config in a run's folder may not,
because such folders are passed on. It may import from the shelf, from installed packages that offer parts, from its own
``code/``, and what the command line names with ``--import``.

A few knobs name files that can run code (``CODE_KNOBS``). ``scan`` refuses them in every file, ``load`` with
``--no-code`` in a run's config."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from toolkit.config import keys
from toolkit.config.imports import load_copy, offered
from toolkit.config.layers import (
    BASE,
    COMMAND_LINE,
    Binding,
    ConfigError,
    Import,
    Layer,
    check_statements,
    load_import,
    parse_bindings,
    parse_file,
    raise_problems,
    references,
)
from toolkit.registry import CATALOG
from toolkit.root import ROOT
from toolkit.store import seal

log = logging.getLogger("toolkit")
SHELF = ("toolkit", "components", "experiments")
CODE_KNOBS = {  # {PART.KNOB: what it names that can run code}
    "LMEval.include_path": "task files of lm-eval, in which !function runs code",
}


def read_file(path: str | Path) -> Layer:
    """Parse a gin file into a layer, and import what it imports. Raises ConfigError with file and line."""
    layer = parse_file(path)
    load([layer])
    return layer


def read_bindings(bindings: Sequence[str]) -> Layer:
    """Parse all ``-p`` bindings into one layer, and import what they import. Raises ConfigError."""
    layer = parse_bindings(bindings)
    load([layer])
    return layer


def load(layers: Sequence[Layer], named: Collection[str] = (), code: bool = True) -> None:
    """Import what the layers import, after all imports have passed the checks. ``named``: the modules that the command
    line names. With ``code`` False, imports from a run's code/ and a run's bindings of CODE_KNOBS are refused. Raises
    ConfigError, with a line for each of them and for each file in code/ that does not match its seal."""
    check_statements(layers)
    wanted = [(each, layer.run) for layer in layers for each in layer.imports]
    already_run = {entry.module for entry in CATALOG.values()} & sys.modules.keys() | set(named)
    refused = [
        f"{each.where}: {each.module} is neither in {', '.join(SHELF)} nor in {run / 'code'}, and a run's "
        f"config may import nothing else; pass --import {each.module} if you trust it{_shadow_note(each.module)}"
        for each, run in wanted
        if run and not (each.module in already_run or on_shelf(each.module) or copy_of(each.module, run))
    ]
    if not code:
        refused += [
            f"{binding.where}: {binding.key} names {CODE_KNOBS[_knob(binding)]}, but --no-code forbids running code "
            "that a run's config names"
            for binding in _code_bindings(layers)
        ]
    copies = [
        copy_of(each.module, run) if run and each.module not in named and not on_shelf(each.module) else None
        for each, run in wanted
    ]
    for (each, run), copy in zip(wanted, copies, strict=True):
        if copy and not code:
            refused.append(f"{each.where}: imports {copy}, but --no-code forbids running code from a run's folder")
        elif copy and run and (problem := seal.file_problem(run / "config.gin", f"code/{copy.name}")):
            refused.append(f"{each.where}: {problem}; {seal.REMEDY}")
    raise_problems(refused)
    for (each, _), copy in zip(wanted, copies, strict=True):
        if copy is None:
            load_import(each)
            continue
        if each.module not in sys.modules:
            log.warning("running %s, a copy in the run's folder; --no-code forbids this", copy)
        try:
            load_copy(copy)
        except ValueError as error:
            raise ConfigError(f"{each.where}: {error}") from error


def on_shelf(module: str) -> bool:
    """Whether a module is the toolkit's own. A user's own package that is called experiments is not."""
    package = module.split(".")[0]
    return package in SHELF and _package(package) == ROOT / package


def copy_of(module: str, run: Path) -> Path | None:
    """The copy of a module in a run's code/, or None."""
    code = (run / "code").resolve()
    file = (code / f"{module}.py").resolve()
    return file if "." not in module and file.is_file() and file.parent == code else None


def scan(
    overlays: Sequence[str] = (), bindings: Sequence[str] = (), base: str | Path = BASE, imports: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """(effects, refusals) of a command with these files: what it would do, and what is refused and why, a line each.
    The files are parsed; nothing is imported, built or run."""
    named = {Path(name).stem if name.endswith(".py") else name for name in imports}
    effects = [f"--import {name}: would run {name}" for name in imports]
    effects += [f"installed packages: would import {name}" for name in sorted(offered())]
    refused = []
    sources = [partial(parse_file, path) for path in (base, *overlays)]
    for parse in [*sources, *([partial(parse_bindings, bindings)] if bindings else [])]:
        try:
            layer = parse()
        except ConfigError as error:
            refused.append(str(error))
            continue
        effects += [
            f"{each.where}: would import {each.module}{_origin_note(each, layer.run)}" for each in layer.imports
        ]
        effects += [f"{each.where}: binds {each}" for each in layer.bindings]
        refused += [*layer.refused, *_refused_imports(layer, named), *_refused_calls(layer.bindings)]
        refused += _refused_code(layer.bindings) if layer.title != COMMAND_LINE else []
    return effects, refused


def _refused_imports(layer: Layer, named: Collection[str]) -> Iterator[str]:
    """A message for each import of a layer that ``scan`` refuses."""
    for each in layer.imports:
        own = layer.run and copy_of(each.module, layer.run)
        if not (on_shelf(each.module) or own or each.module in named or each.module.split(".")[0] in offered()):
            yield (
                f"{each.where}: would import {each.module}, which is not in {', '.join(SHELF)}; read it, and pass "
                f"--import {each.module} if you trust it{_shadow_note(each.module)}"
            )


def _refused_calls(bindings: Iterable[Binding]) -> Iterator[str]:
    """A message for each reference with parentheses, ``@Name()``."""
    for binding in bindings:
        for reference in references(binding.value):
            if reference.called:
                yield f"{binding.where}: would call {reference.name}: write {reference}, without parentheses"


def _refused_code(bindings: Iterable[Binding]) -> Iterator[str]:
    """A message for each binding in a file of a knob that names files with code. The command line may bind it."""
    for binding in bindings:
        if _names_code(binding):
            yield (
                f"{binding.where}: {binding.key} names {CODE_KNOBS[_knob(binding)]}; read them, and bind it with -p "
                "if you trust them"
            )


def _code_bindings(layers: Sequence[Layer]) -> list[Binding]:
    """The bindings in runs' configs of knobs that name files with code, without those that a later layer overrides."""
    last = {binding.key: (binding, layer) for layer in layers for binding in layer.bindings}
    return [binding for binding, layer in last.values() if layer.run and _names_code(binding)]


def _names_code(binding: Binding) -> bool:
    return _knob(binding) in CODE_KNOBS and binding.value is not None


def _knob(binding: Binding) -> str:
    """PART.KNOB, without the scope and the part's module."""
    return keys.spell(keys.bare(binding.name), binding.parameter)


def _origin_note(each: Import, run: Path | None) -> str:
    """The file or folder that an import would use, in parentheses."""
    copy = copy_of(each.module, run) if run else None
    place = copy or _package(each.module.split(".")[0])
    return f" ({place})" if place else " (not found)"


def _shadow_note(module: str) -> str:
    """A note on where a refused module would come from, if its package is named like one of the toolkit's; or ""."""
    package = module.split(".")[0]
    return f" (here, {package} is {_package(package)})" if package in SHELF else ""


def _package(name: str) -> Path | None:
    """The file of a top-level module, or the folder of a top-level package, that an import would find, or None. Nothing
    is run: ``find_spec`` runs only the parents of a module, and a top-level one has none."""
    current_folder = str(Path.cwd())
    path_extended = "" not in sys.path and current_folder not in sys.path
    if path_extended:
        sys.path.insert(0, current_folder)  # as for an import
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # a module that was loaded by hand has no spec
        spec = None
    finally:
        if path_extended:
            sys.path.remove(current_folder)
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    file = Path(spec.origin).resolve()
    return file.parent if spec.submodule_search_locations is not None else file
