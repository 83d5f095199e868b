"""The documents of text files as items."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.evaluation import builtin
from toolkit.evaluation.items import Item, numbered, with_own_names
from toolkit.text import textfiles


def documents(name: str, paths: Sequence[str], separator: str | None, column: str) -> list[Item]:
    """The documents of an evaluator's text files as items with the field ``text``; empty ones are left out. ``name`` is
    that of the evaluator, whose knobs are ``paths``, ``separator`` and ``column``, as in TextFiles. Raises ValueError
    as reading of TextFiles does, for files without text, and as ``with_own_names`` does."""
    files = builtin.located(f"{name}.paths", paths)
    try:
        rows = [
            (path.name.partition(".")[0], f"{path}:{number}", text)
            for path in textfiles.find_files(files)
            for number, document in enumerate(textfiles.documents(path, separator, column), start=1)
            if (text := _without_blank_lines(document))
        ]
    except ValueError as error:  # it names the knobs of TextFiles, which are the same here
        raise ValueError(str(error).replace("TextFiles.", f"{name}.")) from error
    if not rows:
        raise ValueError(f"{name}.paths = {list(paths)}: the files have no text")
    return with_own_names(f"{name}.paths", numbered("text", rows))


def _without_blank_lines(document: str) -> str:
    """A document without the blank lines at its start and end, as in TextFiles. Half of a surrogate pair becomes
    U+FFFD, as in training."""
    document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace").rstrip()
    indented = len(document) - len(document.lstrip())
    return document[document.rfind("\n", 0, indented) + 1 :]
