"""gin files are code, since they import modules: what a config may import, and what it would do, told without doing it.

Files that a person names on the command line may import what they like, as a script may. A config that was read from a
run's folder may not: folders are passed on. It imports from the shelf, from installed packages that offer parts, from
its own ``code/``, and what the command line names with ``--import``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from toolkit.config.imports import load_copy, offered
from toolkit.config.layers import (
    BASE,
    Binding,
    ConfigError,
    Import,
    Layer,
    check_statements,
    load_import,
    parse_bindings,
    parse_file,
    references,
)
from toolkit.registry import CATALOG
from toolkit.root import ROOT
from toolkit.store import seal

log = logging.getLogger("toolkit")
SHELF = ("toolkit", "components", "experiments")


def read_file(path: str | Path) -> Layer:
    """A gin file as a layer; what it imports is imported. Raises ConfigError with file and line."""
    layer = parse_file(path)
    load([layer])
    return layer


def read_bindings(bindings: Sequence[str]) -> Layer:
    """All ``-p`` bindings of a command line as one layer; what they import is imported. Raises ConfigError."""
    layer = parse_bindings(bindings)
    load([layer])
    return layer


def load(layers: Sequence[Layer], named: Collection[str] = (), code: bool = True) -> None:
    """Import what the layers import, once all of it is allowed. ``named`` are the modules of the command line; with
    ``code`` False nothing that a run keeps in its code/ is run. Raises ConfigError, a line for each import that is
    refused, and for code that is not what the run has sealed."""
    check_statements(layers)
    wanted = [(each, layer.run) for layer in layers for each in layer.imports]
    known = {entry.module for entry in CATALOG.values()} & sys.modules.keys() | set(named)  # these have run already
    refused = [
        f"{each.where}: {each.module} is neither on the shelf nor in {run / 'code'}, and a run's config imports "
        f"nothing else; pass --import {each.module} if you trust it{_shadowed(each.module)}"
        for each, run in wanted
        if run and not (each.module in known or on_shelf(each.module) or copy_of(each.module, run))
    ]
    copies = [
        copy_of(each.module, run) if run and each.module not in named and not on_shelf(each.module) else None
        for each, run in wanted
    ]
    for (each, run), copy in zip(wanted, copies, strict=True):
        if copy and not code:
            refused.append(f"{each.where}: imports {copy}, and --no-code refuses to run what a run keeps")
        elif copy and (problem := seal.file_problem(run / "config.gin", f"code/{copy.name}")):
            refused.append(f"{each.where}: {problem}; {seal.REMEDY}")
    if refused:
        raise ConfigError("\n".join(refused))
    for (each, _), copy in zip(wanted, copies, strict=True):
        if copy is None:
            load_import(each)
            continue
        if each.module not in sys.modules:
            log.warning("runs %s, which this run keeps; --no-code refuses", copy)
        try:
            load_copy(copy)
        except ValueError as error:
            raise ConfigError(f"{each.where}: {error}") from error


def on_shelf(module: str) -> bool:
    """Whether a module is the toolkit's own: a package of yours that is called experiments is not."""
    package = module.split(".")[0]
    return package in SHELF and _package(package) == ROOT / package


def copy_of(module: str, run: Path) -> Path | None:
    """The copy of a module that a run keeps."""
    code = (run / "code").resolve()
    file = (code / f"{module}.py").resolve()
    return file if "." not in module and file.is_file() and file.parent == code else None


def scan(
    overlays: Sequence[str] = (), bindings: Sequence[str] = (), base: str | Path = BASE, imports: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """What a command with these files would do, a line each, and why it is refused, a line each. Nothing is imported,
    built or run; the files are parsed."""
    named = {Path(name).stem if name.endswith(".py") else name for name in imports}
    told = [f"--import {name}: would run {name}" for name in imports]
    told += [f"installed packages: would import {name}" for name in sorted(offered())]
    refused = []
    sources = [(parse_file, base), *((parse_file, path) for path in overlays)]
    for parse, source in [*sources, *([(parse_bindings, bindings)] if bindings else [])]:
        try:
            layer = parse(source)
        except ConfigError as error:
            refused.append(str(error))
            continue
        told += [f"{each.where}: would import {each.module}{_found(each, layer.run)}" for each in layer.imports]
        told += [f"{each.where}: binds {each}" for each in layer.bindings]
        refused += [*layer.refused, *_refused_imports(layer, named), *_calls(layer.bindings)]
    return told, refused


def _refused_imports(layer: Layer, named: Collection[str]) -> Iterator[str]:
    for each in layer.imports:
        own = layer.run and copy_of(each.module, layer.run)
        if not (on_shelf(each.module) or own or each.module in named or each.module.split(".")[0] in offered()):
            yield (
                f"{each.where}: would import {each.module}, which is not of {', '.join(SHELF)}; read it, and pass "
                f"--import {each.module} if you trust it{_shadowed(each.module)}"
            )


def _calls(bindings: Iterable[Binding]) -> Iterator[str]:
    for binding in bindings:
        for reference in references(binding.value):
            if reference.called:
                yield f"{binding.where}: would call {reference.name}: write {reference}, without parentheses"


def _found(each: Import, run: Path | None) -> str:
    copy = copy_of(each.module, run) if run else None
    place = copy or _package(each.module.split(".")[0])
    return f" ({place})" if place else " (not found)"


def _shadowed(module: str) -> str:
    """Where a module comes from that bears a name of the shelf and is not on it."""
    package = module.split(".")[0]
    return f" ({package} is {_package(package)} here)" if package in SHELF else ""


def _package(name: str) -> Path | None:
    """The file of a top-level module, or the folder of a package, as the path has it. Nothing is run: only the
    parents of a module are, and these have none."""
    here = str(Path.cwd())
    added = "" not in sys.path and here not in sys.path
    if added:
        sys.path.insert(0, here)  # as an import would
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # loaded by hand, without a spec
        spec = None
    finally:
        if added:
            sys.path.remove(here)
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    file = Path(spec.origin).resolve()
    return file.parent if spec.submodule_search_locations is not None else file
