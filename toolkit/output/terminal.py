"""The console on which commands show text: rich, without its markup.

A string is printed as it is, without markup, emoji codes or highlighting; control characters are replaced by their
codes. Only ``styled`` adds style."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.output import escape

COMFORT = 24  # terminal columns that a name keeps before other columns are dropped


class Terminal(Console):
    """A console for text that came from files. In a notebook it prints plain text, as loggers do, so that lines stay
    in their order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape.block(text), **options)


def styled(*parts: str | tuple[str, str]) -> Text:
    """One line of text. Each part is a string, or a pair of a string and a style that rich knows."""
    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((escape.line(text), style) for text, style in pairs))


@dataclass(frozen=True)
class Column:
    """A column of a grid. If there is no room, columns are dropped in the order of ``gives_way``; one with 0 stays."""

    title: str
    right: bool = False
    gives_way: int = 0
    name: bool = False  # names may be folded or cut, other columns not


def grid(
    columns: Sequence[Column], rows: Iterable[Sequence[str | tuple[str, str]]], width: int, lines: int = 2
) -> tuple[Table, list[str]]:
    """A table without borders, at most ``width`` wide, and the titles of the columns that were dropped to fit. A cell
    is a string, or a pair of a string and a style. Names take at most ``lines`` lines."""
    styled_rows = [[cell if isinstance(cell, tuple) else (cell, "") for cell in row] for row in rows]
    cells = [[(escape.line(text), style) for text, style in row] for row in styled_rows]
    widths = [max(cell_len(text) for text in (c.title, *(row[i][0] for row in cells))) for i, c in enumerate(columns)]
    least = [
        max(COMFORT, cell_len(column.title)) if column.name else w for column, w in zip(columns, widths, strict=True)
    ]
    wanted = [min(w, most) for w, most in zip(widths, least, strict=True)]
    kept = list(range(len(columns)))

    def room() -> int:
        """Terminal columns that are left; negative if there are too few."""
        return width - sum(wanted[i] for i in kept) - 2 * (len(kept) - 1)

    while room() < 0 and any(columns[i].gives_way for i in kept):
        kept.remove(min((i for i in kept if columns[i].gives_way), key=lambda i: columns[i].gives_way))
    names = [i for i in kept if columns[i].name]
    for i in names:
        wanted[i] = max(min(8, widths[i]), min(widths[i], wanted[i] + room() // len(names)))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i in kept:
        column = columns[i]
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True, min_width=wanted[i])
    for row in cells:
        table.add_row(*(_cell(*row[i], wanted[i] if i in names else None, lines) for i in kept))
    return table, [column.title for i, column in enumerate(columns) if i not in kept]


def _cell(text: str, style: str, width: int | None, lines: int) -> Text:
    """A cell of a grid; a name, which has a ``width``, is folded."""
    return Text(text if width is None else "\n".join(fold(text, width, lines)), style)


def fold(name: str, width: int, lines: int = 2) -> list[str]:
    """A name in at most ``lines`` lines, broken after spaces and punctuation. If it doesn't fit, it is one line, cut in
    the middle."""
    folded = [""]
    for piece in re.findall(r"[^\s\-_/.,+=:]*[\s\-_/.,+=:]*", name):
        if cell_len(folded[-1] + piece.rstrip()) <= width:
            folded[-1] += piece
        else:
            folded.append(piece)
    folded = [line.rstrip() for line in folded if line.strip()]
    if len(folded) <= lines and all(cell_len(line) <= width for line in folded):
        return folded
    most = width
    while cell_len(escape.shorten(name, most)) > width:  # some letters take two columns
        most -= 1
    return [escape.shorten(name, most)]
