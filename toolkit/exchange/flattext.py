"""The text of a module's copy: its needed statements, with relative imports and without the catalogue."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from toolkit.exchange.sources import ANNOTATED, Source, dotted_name


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replace the text from ``start`` to ``end``, both (line from 1, column in bytes), by ``text``."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


class Bundle(Protocol):
    """What the text of one copy must know of the others."""

    sources: dict[str, Source]
    replaced: dict[str, Path]

    def is_copied(self, name: str) -> bool: ...

    def defines(self, module: str, name: str) -> bool: ...


def text_of(source: Source, bundle: Bundle) -> str:
    """The needed statements of a module, with their comments."""
    imports: list[str] = []
    pieces: list[str] = []
    separator, previous_end = "\n\n", 0
    for statement in source.tree.body:
        start = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        if statement in source.needed and not _is_docstring(source.tree, statement):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                imports += _import_lines(source, bundle, statement, source.aliases)
            else:
                between = "\n\n\n" if isinstance(statement, ast.ClassDef | ast.FunctionDef) else separator
                pieces += [between, _comments(source, previous_end, start), _edited(source, bundle, statement)]
                separator = "\n\n\n" if isinstance(statement, ast.ClassDef | ast.FunctionDef) else "\n"
        previous_end = statement.end_lineno or previous_end
    title = ast.get_docstring(source.tree, clean=False)
    head = [f'"""{title}"""\n'] if title else []
    return "\n".join([*head, *imports]) + "".join(pieces) + "\n"


def _import_lines(
    source: Source, bundle: Bundle, node: ast.Import | ast.ImportFrom, wanted: set[str] | None
) -> list[str]:
    """The lines that an import statement becomes; ``wanted``: the bound names to keep, None: all."""
    lines = []
    kept: dict[str, list[str]] = {}
    for alias in node.names:
        bound = alias.asname or alias.name.partition(".")[0]
        if wanted is not None and bound not in wanted:
            continue
        renamed = f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.Import):
            if not bundle.is_copied(alias.name):
                lines.append(f"import {alias.name}{renamed}")
            elif "." in alias.name and not alias.asname:
                lines.append(f"from . import {flat(alias.name)}")
            else:
                lines.append(f"from . import {flat(alias.name)} as {bound}")
            continue
        module = source.absolute(node)
        inner = f"{module}.{alias.name}"
        if not bundle.is_copied(module):
            kept.setdefault(module, []).append(alias.name + renamed)
        elif inner in bundle.sources and not bundle.defines(module, alias.name):
            lines.append(f"from . import {flat(inner)} as {bound}")
        else:
            kept.setdefault(f".{flat(module)}", []).append(alias.name + renamed)
    return lines + [f"from {module} import {', '.join(names)}" for module, names in kept.items()]


def _edited(source: Source, bundle: Bundle, statement: ast.stmt) -> str:
    """The text of a statement: without annotations of the catalogue, and with relative imports."""
    edits = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Subscript) and dotted_name(node.value) in ANNOTATED:
            first = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
            edits.append(Edit(_start(node), _end(node), _segment(source, _start(first), _end(first))))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            edits.append(Edit(_start(node), _end(node), _nested_import(source, bundle, node)))
        elif isinstance(node, ast.Attribute) and "." in (dotted := dotted_name(node)) and dotted in bundle.sources:
            edits.append(Edit(_start(node), _end(node), flat(dotted)))
    decorators = getattr(statement, "decorator_list", [])
    kept = [each for each in decorators if not source.registers(each, bundle.replaced)]
    outer = [e for e in edits if not any(o is not e and o.start <= e.start and e.end <= o.end for o in edits)]
    last = statement.end_lineno or statement.lineno
    head = "".join(f"@{_segment(source, _start(each), _end(each))}\n" for each in kept)
    return head + _segment(source, (statement.lineno, 0), (last, len(source.lines[last - 1])), outer)


def _nested_import(source: Source, bundle: Bundle, node: ast.Import | ast.ImportFrom) -> str:
    """An import inside another statement. One of a package goes into a try statement, so that transformers does not
    ask for the package before it is used."""
    lines = _import_lines(source, bundle, node, None)
    indent = " " * node.col_offset
    if all(line.startswith(("from .", "import .")) for line in lines) or not indent:
        return f"\n{indent}".join(lines)
    body = f"\n{indent}    ".join(lines)
    return f"try:\n{indent}    {body}\n{indent}except ImportError:\n{indent}    raise"


def flat(module: str) -> str:
    """The name of a module's copy: a.b -> a_b."""
    return module.replace(".", "_")


def _is_docstring(tree: ast.Module, statement: ast.stmt) -> bool:
    return statement is tree.body[0] and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _comments(source: Source, after: int, before: int) -> str:
    """The comment lines directly above line ``before``."""
    lines = [line.decode() for line in source.lines[after : before - 1]]
    kept: list[str] = []
    for line in reversed(lines):
        if not line.startswith("#"):
            break
        kept.insert(0, line)
    return "".join(f"{line}\n" for line in kept)


def _start(node: ast.stmt | ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.stmt | ast.expr) -> tuple[int, int]:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset


def _segment(source: Source, start: tuple[int, int], end: tuple[int, int], edits: Iterable[Edit] = ()) -> str:
    """The text of a module from ``start`` to ``end``, with edits inside it."""
    pieces, position = [], start
    for edit in sorted(edits, key=lambda edit: edit.start):
        if edit.start < start:
            continue
        pieces += [_raw(source, position, edit.start), edit.text]
        position = edit.end
    return "".join([*pieces, _raw(source, position, end)])


def _raw(source: Source, start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    lines = source.lines[first - 1 : last]
    if len(lines) == 1:
        return lines[0][left:right].decode()
    return b"\n".join([lines[0][left:], *lines[1:-1], lines[-1][:right]]).decode()
