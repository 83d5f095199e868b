"""Copy the source of classes, and of everything in their modules that they use, into files of one folder.

The files import each other relatively, and nothing of the modules that they were copied from. ``transformers`` loads
such files from beside a model's weights."""

from __future__ import annotations

import ast
import builtins
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from toolkit.exchange.flattext import flat, text_of
from toolkit.exchange.sources import Source, bound_by, dotted_name, file_of, is_effect, used_by

WHOLE = frozenset(("globals", "vars", "eval", "exec", "locals"))  # code that calls these may use any name of its module
LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib"))


class Flattened:
    """Files of one folder with the source of classes, by name.

    ``replaced`` maps names of modules to files that take their place. ``packages`` are the top-level names of
    modules to copy even if they are installed."""

    def __init__(self, replaced: dict[str, Path], packages: Iterable[str]):
        self.replaced, self.packages = replaced, set(packages)
        self.sources: dict[str, Source] = {}
        self.foreign: set[str] = set()  # top-level names of packages that the files import
        self.used: set[str] = set()  # replaced modules that a copied file imports
        self.work: list[tuple[str, str | None]] = []

    def add(self, cls: type) -> None:
        """Copy a class. Raises ValueError if its source can't be copied."""
        module, name = cls.__module__, cls.__qualname__
        file = getattr(sys.modules.get(module), "__file__", None)
        if not file or not str(file).endswith(".py"):
            raise ValueError(f"{name} is defined in {module}, which is no Python file; move it into one")
        if "." in name:
            raise ValueError(f"{file}: {name} is defined inside a function or class; move it to the top of the file")
        self.need(module, name)
        while self.work:
            self._take(*self.work.pop())

    def need(self, module: str, name: str | None) -> None:
        """Copy what a name of a module stands for; None: the whole module."""
        self.work.append((module, name))

    def files(self) -> dict[str, str]:
        """{file name: text} of what was added."""
        files = {f"{flat(name)}.py": text_of(source, self) for name, source in self.sources.items()}
        files |= {f"{flat(name)}.py": self.replaced[name].read_text(encoding="utf-8") for name in self.used}
        return files

    @property
    def modules(self) -> list[str]:
        """The names of the modules that were copied or replaced."""
        return sorted({*self.sources, *self.used})

    def is_copied(self, name: str) -> bool:
        """Whether a module is copied, and not imported from a package."""
        if name in self.replaced or name.partition(".")[0] in self.packages:
            return True
        file = file_of(name)
        return file is not None and file.suffix == ".py" and not any(file.is_relative_to(each) for each in LIBRARIES)

    def _take(self, module: str, name: str | None) -> None:
        if module in self.replaced:
            self.used.add(module)
            return
        source = self._source(module)
        if name is None:
            statements = source.tree.body
        elif name not in source.binding:
            if file_of(f"{module}.{name}") is not None:
                self.need(f"{module}.{name}", None)
                return
            raise ValueError(f"{source.path} does not define {name} at its top; it can't be copied")
        else:
            statements = source.binding[name]
        for statement in statements:
            self._include(source, statement, name)
        for statement in source.tree.body:
            if statement not in source.needed and is_effect(statement) and self._touches(source, statement):
                self._include(source, statement, None)

    def _touches(self, source: Source, statement: ast.stmt) -> bool:
        """Whether a statement that binds no name is about something that was copied, or about no name of its module."""
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        own = {name for name in names if name in source.binding and source.imported(name) is None}
        return any(s in source.needed for name in own for s in source.binding[name]) if own else bool(names)

    def _source(self, module: str) -> Source:
        if module not in self.sources:
            path = file_of(module)
            if path is None:
                raise ValueError(f"the source of the module {module} is missing")
            self.sources[module] = Source(module, path)
        return self.sources[module]

    def _include(self, source: Source, statement: ast.stmt, name: str | None) -> None:
        """Copy a statement, and what it uses."""
        imports = isinstance(statement, ast.Import | ast.ImportFrom)
        if imports and name is not None:
            source.needed.add(statement)
            if name not in source.aliases:
                source.aliases.add(name)
                self._follow(source, name)
            return
        if statement in source.needed and not imports:
            return
        source.needed.add(statement)
        if imports:
            for bound in bound_by(statement):
                self._include(source, statement, bound)
            return
        if any(isinstance(node, ast.Name) and node.id == "__file__" for node in ast.walk(statement)):
            raise ValueError(f"{source.path}:{statement.lineno} uses __file__; a copy has no files beside it")
        catalogue = [
            decorator
            for decorator in getattr(statement, "decorator_list", ())
            if source.registers(decorator, self.replaced)
        ]
        for node in used_by(statement, catalogue):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._follow_local(source, node)
            elif isinstance(node, ast.Global):
                for each in node.names:
                    self.need(source.name, each)
            elif isinstance(node, ast.Name) and node.id in source.binding:
                self.need(source.name, node.id)
            elif isinstance(node, ast.Name) and node.id in WHOLE and node.id in vars(builtins):
                self.need(source.name, None)

    def _follow(self, source: Source, name: str) -> None:
        """Copy what an imported name stands for."""
        imported = source.imported(name)
        assert imported is not None, name
        node, alias = imported
        if isinstance(node, ast.ImportFrom):
            module = source.absolute(node)
            if not self.is_copied(module):
                self.foreign.add(module.partition(".")[0])
            elif file_of(f"{module}.{alias.name}") is not None and not self.defines(module, alias.name):
                self._use(source, name, f"{module}.{alias.name}")
            else:
                self.need(module, alias.name)
        elif not self.is_copied(alias.name):
            self.foreign.add(alias.name.partition(".")[0])
        else:
            self._use(source, alias.asname or alias.name, alias.name)

    def defines(self, module: str, name: str) -> bool:
        """Whether a module itself binds a name, which is no module inside it then."""
        return module not in self.replaced and name in self._source(module).binding

    def _use(self, source: Source, dotted: str, module: str) -> None:
        """Copy the attributes of an imported module that are used; all, if the module itself is."""
        whole = {id(node.value) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and dotted_name(node.value) == dotted:
                self.need(module, node.attr)
            elif isinstance(node, ast.Name) and node.id == dotted and id(node) not in whole:
                self.need(module, None)
        if module not in self.replaced:
            self._source(module)

    def _follow_local(self, source: Source, node: ast.Import | ast.ImportFrom) -> None:
        """Copy what an import inside a function needs."""
        for alias in node.names:
            module = alias.name if isinstance(node, ast.Import) else source.absolute(node)
            if not self.is_copied(module):
                continue  # transformers does not ask for packages that are imported in a try statement
            if isinstance(node, ast.ImportFrom) and self.defines(module, alias.name):
                self.need(module, alias.name)
            else:
                self.need(module if isinstance(node, ast.Import) else f"{module}.{alias.name}", None)
