"""Calls that are written as a Python list: ``[name(key="value", …), …]``.

Values are literals; nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from sensorium.text.tools.deltas import NAME_CHARS, CallSink
from sensorium.text.tools.source import Reading, Source, listed

_MOST_VALUE = 1 << 16
_SPECIAL = re.compile(r"[\"'()\[\]{},]")
_QUOTE_END = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
_JSON_WORDS = {"true": True, "false": False, "null": None}


def python_calls(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    """Read a list of calls of functions; return whether there was one."""
    yield from source.blanks()
    num_before = sink.num_calls
    is_list = yield from listed(source, lambda: _call(source, sink, is_bare))
    return is_list and sink.num_calls > num_before


def _call(source: Source, sink: CallSink, is_bare: bool) -> Reading[bool]:
    name = yield from source.takes_while(NAME_CHARS, 64)
    if not name or not sink.accepts(name, is_bare=is_bare):
        return False
    if not (yield from source.takes("(")):
        return False
    yield from source.blanks()
    if (yield from source.takes(")")):
        sink.whole(name, "{}")
        return True
    key = yield from _key(source)
    if not key:
        return False
    sink.begin(name)
    before = "{"
    while True:
        value = yield from _value(source)
        if value is None:
            return True
        sink.arguments(f"{before}{json.dumps(key)}: {_json(value)}")
        before = ", "
        if not (yield from source.takes(",")):
            break
        yield from source.blanks()
        if (yield from source.peek()) == ")":
            break
        key = yield from _key(source)
        if not key:
            return True
    if (yield from source.takes(")")):
        sink.arguments("}")
        sink.end()
    return True


def _key(source: Source) -> Reading[str]:
    """Read a key and its ``=``; empty where none is."""
    key = yield from source.takes_while(NAME_CHARS, 64)
    yield from source.blanks()
    return key if (yield from source.takes("=")) else ""


def _value(source: Source) -> Reading[str | None]:
    """Return the text of a value, up to the comma or bracket after it; None if it has no end."""
    start, depth = source.pos, 0
    while (yield from source.skip_to(_SPECIAL)):
        char = yield from source.peek()
        if depth == 0 and char in ",)":
            return source.text(start)
        source.pos += 1
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char != "," and not (yield from _string(source, char)):
            return None
    return None


def _string(source: Source, quote: str) -> Reading[bool]:
    """Go past the end of a string; return whether it has one."""
    while (yield from source.skip_to(_QUOTE_END[quote])):
        char = yield from source.peek()
        source.pos += 1
        if char == quote:
            return True
        if not (yield from source.peek()):
            return False
        source.pos += 1
    return False


def _json(text: str) -> str:
    """Return a literal as JSON; as a string of what was written where it is none."""
    text = text.strip()
    value: Any = text
    if text in _JSON_WORDS:
        value = _JSON_WORDS[text]
    elif len(text) <= _MOST_VALUE:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            value = text
    try:
        found = json.dumps(value, ensure_ascii=False, allow_nan=False)
        found.encode()
    except (TypeError, ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return found
