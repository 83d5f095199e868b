"""Read JSON values one after another from text that arrives in pieces; memory holds one value and one piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

BLANK = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16  # characters; an error this close to the end of a piece may come from a word or escape that was cut


def values(pieces: Iterator[str]) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for each element of the top-level array, or, without one, for each top-level value.

    ``line`` is where the value begins, from 1. Raises JSONError."""
    source = _Source(pieces)
    in_array = source.take("[")
    if in_array and source.take("]"):
        in_array = False
    while source.peek():
        yield source.value()
        if in_array and source.take("]"):
            in_array = False
            break
        if in_array and not source.take(","):
            raise JSONError(source.line, "a comma or ] is missing" if source.peek() else "the array does not end")
    if in_array:
        raise JSONError(source.line, "the array does not end")
    if source.peek():
        raise JSONError(source.line, "more text follows the end of the array")


class JSONError(ValueError):
    """Text that is not JSON: ``line`` (from 1) and a ``reason`` of a few words."""

    def __init__(self, line: int, reason: str):
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


def reason_of(error: ValueError | RecursionError) -> str:
    """Why the json library refused a value, in a few words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return "it has a number of too many digits"


class _Source:
    """The text that is not yet read: ``text`` from index ``at`` on, which is in line ``line``, and ``pieces``."""

    def __init__(self, pieces: Iterator[str]):
        self.pieces, self.text, self.at, self.line, self.decoder = pieces, "", 0, 1, json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blank = BLANK.match(self.text, self.at)
            assert blank is not None  # it matches the empty string
            self._advance(blank.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._refill():
                return ""

    def take(self, character: str) -> bool:
        """Skip the next character that is not blank if it is ``character``; returns whether it was."""
        is_next = self.peek() == character
        self.at += is_next
        return is_next

    def value(self) -> tuple[int, object]:
        """Read the next value; returns (line, value), with the line in which it begins. Raises JSONError."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_WORD
                line = self.line + self.text.count("\n", self.at, error.pos)  # before _refill() moves the text
                if not (cut and self._refill()):
                    raise JSONError(line, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise JSONError(self.line, reason_of(error)) from None
            else:
                line = self.line
                self._advance(end)
                return line, value

    def _advance(self, to: int) -> None:
        """Move to index ``to`` of the text, and count the lines on the way."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _refill(self) -> bool:
        """Read pieces until the unread text has doubled, so that a long value is parsed only a few times; returns False
        at the end of the pieces."""
        parts = [self.text[self.at :]]
        unread = length = len(parts[0])
        while (length < 2 * unread or len(parts) == 1) and (piece := next(self.pieces, "")):
            parts.append(piece)
            length += len(piece)
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1
