"""The source of a module, as ``flatten`` reads it: statements, the names that they bind, and what they use."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Container, Iterator
from pathlib import Path

ANNOTATED = ("Annotated", "typing.Annotated")


class Source:
    """A module's statements, and which of them are needed."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.encode().split(b"\n")
        self.tree = ast.parse(self.text)
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.binding: dict[str, list[ast.stmt]] = {}  # the statements that bind each name
        self.needed: set[ast.stmt] = set()
        self.aliases: set[str] = set()  # needed names that import statements bind
        for statement in self.tree.body:
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                raise ValueError(f"{path}:{statement.lineno} imports *, which can't be copied; name what it imports")
            for bound in bound_by(statement):
                self.binding.setdefault(bound, []).append(statement)

    def imported(self, name: str) -> tuple[ast.Import | ast.ImportFrom, ast.alias] | None:
        """The import statement outside functions that binds a name, and the part of the statement that does."""
        for statement in self.binding.get(name, ()):
            for node in ast.walk(statement):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    for alias in node.names:
                        if (alias.asname or alias.name.partition(".")[0]) == name:
                            return node, alias
        return None

    def registers(self, decorator: ast.expr, catalogues: Container[str]) -> bool:
        """Whether a decorator adds a class to a catalogue, a module with the function ``register``."""
        function = decorator.func if isinstance(decorator, ast.Call) else decorator
        if not isinstance(function, ast.Name):
            return False
        node, alias = self.imported(function.id) or (None, None)
        if alias is None or not isinstance(node, ast.ImportFrom):
            return False
        return self.absolute(node) in catalogues and alias.name == "register"

    def absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module that a ``from ... import`` names."""
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        base = parts[: len(parts) - node.level + 1]
        return ".".join([*base, *([node.module] if node.module else [])])


def file_of(module: str) -> Path | None:
    """The source file of a module that is loaded or can be imported; None if there is none."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is None:
        parent = sys.modules.get(module.rpartition(".")[0])
        paths = (Path(folder, f"{module.rpartition('.')[2]}.py") for folder in getattr(parent, "__path__", ()))
        return next((path.resolve() for path in paths if path.is_file()), None)
    return Path(file).resolve() if file else None


def bound_by(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name
        return
    for node in _outside_functions(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    for child in ast.iter_child_nodes(node):
        yield from _outside_functions(child)


def used_by(node: ast.AST, without: Collection[ast.AST] = ()) -> Iterator[ast.AST]:
    """The nodes of a statement, without what ``Annotated`` adds to a type, and without the nodes ``without``."""
    if node in without:
        return
    if isinstance(node, ast.Subscript) and dotted_name(node.value) in ANNOTATED:
        yield from used_by(node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from used_by(child, without)


def is_effect(statement: ast.stmt) -> bool:
    """Whether a statement at the top of a module binds no name, but does something."""
    plain = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom
    if isinstance(statement, plain) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
        return False
    if isinstance(statement, ast.If) and dotted_name(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return False
    if isinstance(statement, ast.If) and any(
        isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(statement.test)
    ):
        return False
    return not any(True for _ in bound_by(statement))


def dotted_name(node: ast.AST) -> str:
    """a.b.c as text; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value)):
        return f"{base}.{node.attr}"
    return ""
