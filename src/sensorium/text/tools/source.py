"""Text that is read while it comes, and JSON in it.

Readers are generators: they yield where they need more text, so that they read like a parser of a
whole text, and see the same whatever the pieces are. Nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A reader: it yields where it needs more text, and returns its result."""

MAX_DEPTH = 512
"""Nesting of JSON values in calls."""

BLANKS = " \t\n\r"
_NOT_BLANK = re.compile(r"[^ \t\n\r]")
_STRING_END = re.compile(r'["\\]')
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SCALAR_CHARS = frozenset("-+.0123456789abcdefghijklmnopqrstuvwxyzE")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


STRICT_JSON = json.JSONDecoder(parse_int=float, parse_constant=_no_number)
"""Reads the JSON of calls, strictly; numbers, which may have any number of digits, are not
looked at."""


class Source:
    """Text, the position up to which it was read, and whether its end is known.

    Positions count from the beginning of all text, also of what was forgotten.
    """

    def __init__(self) -> None:
        self.pos = 0
        self.ended = False
        self._buffer = ""
        self._base = 0

    def append(self, text: str) -> None:
        """Add text that has come."""
        self._buffer += text

    def forget(self, end: int) -> None:
        """Drop the text before ``end``."""
        if end - self._base > len(self._buffer) // 2:
            self._buffer = self._buffer[end - self._base :]
            self._base = end

    @property
    def end(self) -> int:
        """Return the position after all text that has come."""
        return self._base + len(self._buffer)

    @property
    def num_kept(self) -> int:
        """Return the number of characters that are not forgotten."""
        return len(self._buffer)

    def text(self, start: int, end: int | None = None) -> str:
        """Return the text from ``start`` to ``end``, or to the position."""
        end = self.pos if end is None else end
        return self._buffer[start - self._base : end - self._base]

    def search(self, pattern: re.Pattern[str]) -> tuple[int, int] | None:
        """Return where ``pattern`` is next, in the text that has come."""
        found = pattern.search(self._buffer, self.pos - self._base)
        return None if found is None else (found.start() + self._base, found.end() + self._base)

    def peek(self) -> Reading[str]:
        """Return the next character; empty at the end."""
        while self.pos == self.end:
            if self.ended:
                return ""
            yield
        return self._buffer[self.pos - self._base]

    def blanks(self) -> Reading[None]:
        """Skip white space."""
        yield from self.skip_to(_NOT_BLANK)

    def skip_to(self, pattern: re.Pattern[str]) -> Reading[bool]:
        """Go to the next character that fits ``pattern``; False at the end."""
        while True:
            found = self.search(pattern)
            if found is not None:
                self.pos = found[0]
                return True
            self.pos = self.end
            if self.ended:
                return False
            yield

    def takes(self, text: str) -> Reading[bool]:
        """Go past ``text`` if it is next; return whether it is."""
        start = self.pos
        for char in text:
            if (yield from self.peek()) != char:
                self.pos = start
                return False
            self.pos += 1
        return True

    def takes_any(self, texts: Sequence[str]) -> Reading[str | None]:
        """Go past the first of ``texts`` that is next, and return it; None where none is."""
        for text in texts:
            if (yield from self.takes(text)):
                return text
        return None

    def takes_while(self, chars: frozenset[str], most: int) -> Reading[str]:
        """Go past at most ``most`` of ``chars``, and return them."""
        start = self.pos
        while self.pos - start < most and (yield from self.peek()) in chars:
            self.pos += 1
        return self.text(start)

    def up_to(self, text: str, most: int) -> Reading[str | None]:
        """Go past ``text``, and return what stands before it; None where it does not follow.

        At most ``most`` characters may stand before it; no text behind those is looked at.
        """
        start = self.pos
        last = start + most + len(text)
        while (found := self._buffer.find(text, start - self._base, last - self._base)) < 0:
            if self.ended or self.end >= last:
                return None
            yield
        self.pos = self._base + found + len(text)
        return self.text(start, self._base + found)


def read_string(source: Source) -> Reading[str | None]:
    """Read a JSON string, and return its text with the quotes; None where none is complete."""
    start = source.pos
    if (yield from source.peek()) != '"':
        return None
    source.pos += 1
    while (yield from source.skip_to(_STRING_END)):
        char = yield from source.peek()
        source.pos += 1
        if char == '"':
            return source.text(start)
        if not (yield from source.peek()):
            return None
        source.pos += 1
    return None


def read_key(source: Source) -> Reading[str | None]:
    """Read the key of an object, and its colon; return the key, None where none is."""
    raw = yield from read_string(source)
    yield from source.blanks()
    if raw is None or not (yield from source.takes(":")):
        return None
    try:
        return str(STRICT_JSON.decode(raw))
    except ValueError:
        return None


def read_value(source: Source, open_ends: list[str] | None = None) -> Reading[bool]:
    """Read one JSON value; return False where there is none, at the place of the mistake.

    ``open_ends`` gets the brackets that are open there. Strings are not looked into.
    """
    ends = [] if open_ends is None else open_ends
    while True:
        yield from source.blanks()
        char = yield from source.peek()
        if char in ("{", "["):
            if len(ends) == MAX_DEPTH:
                return False
            source.pos += 1
            ends.append("}" if char == "{" else "]")
            yield from source.blanks()
            if (yield from source.peek()) != ends[-1]:
                if char == "{" and (yield from read_key(source)) is None:
                    return False
                continue
            source.pos += 1
            ends.pop()
        elif char == '"':
            if (yield from read_string(source)) is None:
                return False
        else:
            start = source.pos
            scalar = yield from source.takes_while(_SCALAR_CHARS, 1 << 16)
            if not _SCALAR.fullmatch(scalar):
                source.pos = start
                return False
        step = yield from _next_member(source, ends)
        if step is not None:
            return step


def _next_member(source: Source, ends: list[str]) -> Reading[bool | None]:
    """Go on after a value: None to the next one, True when all is closed, False for a mistake."""
    while ends:
        yield from source.blanks()
        char = yield from source.peek()
        if char == ",":
            source.pos += 1
            if ends[-1] == "}":
                yield from source.blanks()
                if (yield from read_key(source)) is None:
                    return False
            return None
        if char != ends[-1]:
            return False
        source.pos += 1
        ends.pop()
    return True


_BRACKET = re.compile(r'["{}\[\]]')


def read_brackets(source: Source, open_ends: list[str]) -> Reading[bool]:
    """Read to where all open brackets are closed; return False when they are not.

    For arguments that are no JSON: they are the caller's to refuse.
    """
    depth = len(open_ends)
    while depth and (yield from source.skip_to(_BRACKET)):
        char = yield from source.peek()
        if char == '"':
            if (yield from read_string(source)) is None:
                return False
            continue
        source.pos += 1
        depth += 1 if char in "{[" else -1
    return not depth


def listed(source: Source, element: Callable[[], Reading[bool]]) -> Reading[bool]:
    """Read elements in brackets, with commas between them; return whether a bracket opens.

    ``element`` reads one; the list ends before what it does not take, closed or not.
    """
    if not (yield from source.takes("[")):
        return False
    while True:
        yield from source.blanks()
        start = source.pos
        if not (yield from element()):
            source.pos = start
            break
        yield from source.blanks()
        if not (yield from source.takes(",")):
            break
    yield from source.takes("]")
    return True
