"""Make text from files harmless for the medium that shows it.

A run or a plan may come from anybody, so its names, reasons and settings must be shown as plain text: not as terminal
control sequences, HTML, Markdown or spreadsheet formulas. ``html`` and ``markdown`` fill templates. They escape every
value that is not itself a finished piece of that language, so that escaping can't be forgotten.
``toolkit.output.terminal`` does the same for the console."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable
from html import escape as _html_escape

JOINERS = "\u200c\u200d"  # invisible as well, but several scripts and emoji are spelled with them
LABEL = 40  # characters of a name in a figure
_FORMULA = re.compile(r"'*[=+\-@\uff1d\uff0b\uff0d\uff20]")  # tabs and returns have been replaced by their codes
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|~]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word it has no effect
    r"|&(?=#?\w+;)"
    r"|(?<=\w):(?=//)|(?<=\b[wW]{3})\."  # a bare address would become a link
    r"|^[#+\-=](?=[#+\-=\s]|$)|^\d+(?=[.)](\s|$))"  # headings, rules and lists, at the start of a line alone
)


def block(value: object) -> str:
    """The text with its line breaks and tabs. Every other control character, and every character that reorders or hides
    text, is replaced by its code (``\\x1b``, ``\\u202e``). For text of several lines, such as a model's samples."""
    text = str(value).replace("\r\n", "\n")
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(c if c in "\n\t" else _visible(c) for c in text)


def line(value: object) -> str:
    """The text in one line: as ``block``, but line breaks and tabs are replaced by ``\\n`` and ``\\t`` too."""
    text = str(value)
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    """The character, or its code if it is a control character or invisible."""
    if char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return char
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or _code(char)


def _code(char: str) -> str:
    """The code of a character as Python writes it, such as ``\\x1b``."""
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def shorten(text: str, most: int) -> str:
    """A text of at most ``most`` characters; a longer one is cut in its middle, since names differ at the ends."""
    if len(text) <= most:
        return text
    tail = max(0, most - 1) // 2
    return text[: max(0, most - 1 - tail)] + "…" + (text[-tail:] if tail else "")


class Html(str):
    """A finished piece of HTML."""


def html(template: str, *values: object, **named: object) -> Html:
    """Fill a template of HTML, as ``str.format``. A value that is not ``Html`` is escaped, so that it is text in an
    element or in a quoted attribute."""
    return Html(template.format(*map(_as_html, values), **{name: _as_html(value) for name, value in named.items()}))


def join_html(pieces: Iterable[object], between: str = "") -> Html:
    """Join pieces of HTML; a piece that is not ``Html`` is escaped."""
    return Html(between.join(map(_as_html, pieces)))


def _as_html(value: object) -> str:
    return value if isinstance(value, Html) else _html_escape(line(value), quote=True)


class Markdown(str):
    """A finished piece of Markdown."""


def markdown(template: str, *values: object) -> Markdown:
    """Fill a template of Markdown, as ``str.format``. A value that is not ``Markdown`` is escaped, so that it is one
    line of plain text in a paragraph or in the cell of a table."""
    return Markdown(template.format(*map(_as_markdown, values)))


def _as_markdown(value: object) -> str:
    return value if isinstance(value, Markdown) else _MARKDOWN.sub(_escaped, line(value).strip()).replace("$", "&#36;")


def _escaped(match: re.Match[str]) -> str:
    """What replaces a match of ``_MARKDOWN``."""
    text = match.group()
    if text == "&":
        return "&amp;"
    return text + "\\" if text.isdigit() else "\\" + text


def code_block(lines: Iterable[object]) -> Markdown:
    """Lines as a fenced block of code; the fence is longer than any in the lines, so that no line ends the block."""
    texts = list(map(line, lines))
    longest = max((len(run) for text in texts for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown("\n".join([fence, *texts, fence]))


def cell(value: object) -> object:
    """A value for a cell of a CSV file. A text that a spreadsheet would read as a formula gets an apostrophe in front,
    as spreadsheets expect; numbers stay numbers. ``uncell`` undoes this."""
    if value is None or isinstance(value, int | float):
        return value
    text = line(value)
    return "'" + text if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def uncell(text: str) -> str:
    """The text in a cell, without the apostrophe that ``cell`` added."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def label(value: object, most: int = LABEL) -> str:
    """A text for a figure: one line, cut in the middle if long. A character that the font lacks is replaced by its
    code. The caller switches mathematics off (``text.parse_math``)."""
    return shorten("".join(c if _has_glyph(c) else _code(c) for c in line(value)), most)


def _has_glyph(char: str) -> bool:
    """Whether matplotlib's default font can show a character."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return char.isascii() or get_font(findfont(FontProperties())).get_char_index(ord(char)) != 0


class LogFormatter(logging.Formatter):
    """Formats log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return block(super().format(record))
