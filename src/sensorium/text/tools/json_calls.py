"""Calls that are written as JSON: ``{"name": …, "arguments": {…}}``, and lists of such."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sensorium.text.tools.deltas import NAME_CHARS, CallSink
from sensorium.text.tools.source import (
    STRICT_JSON,
    Reading,
    Source,
    listed,
    read_brackets,
    read_key,
    read_value,
)

_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset(("name", "type", "function", "id", *_ARGUMENTS))
"""Keys that a call without a tag may begin with."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(slots=True)
class _Call:
    """A call in the making: the JSON texts of its members; ``begun`` once it is reported."""

    members: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    in_function: bool = False

    def text(self, *keys: str) -> str | None:
        """Return the string that the first of ``keys`` holds; None where it is none."""
        value = next((self.members[key] for key in keys if key in self.members), "")
        try:
            found = STRICT_JSON.decode(value)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, str) else None

    @property
    def name(self) -> str | None:
        """Return the name of the function; Llama writes it as ``function``, too."""
        return self.text("name", "function")


def json_calls(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    """Read a call, or a list of calls; return whether there was one.

    ``is_bare``: no tag says that it is a call, and an answer may have a member ``name``, too. Only
    the tools of the request are called then, with arguments.
    """
    yield from source.blanks()
    if (yield from source.peek()) == "{":
        return (yield from _call(source, sink, is_bare))
    num_before = sink.num_calls
    is_list = yield from listed(source, lambda: _call(source, sink, is_bare))
    return is_list and sink.num_calls > num_before


def named_call(
    source: Source, sink: CallSink, *, is_bare: bool, separators: tuple[str, ...] = ("[ARGS]",)
) -> Reading[bool]:
    """Read a name, a separator that may be left out, and arguments, as Mistral writes them."""
    yield from source.blanks()
    name = yield from source.takes_while(NAME_CHARS, 64)
    if not name or not sink.accepts(name, is_bare=is_bare):
        return False
    if not is_bare and (yield from source.takes("[CALL_ID]")):
        yield from source.takes_while(NAME_CHARS, 64)
    yield from source.takes_any(separators)
    return (yield from streamed_object(source, sink, name))


def streamed_object(source: Source, sink: CallSink, name: str) -> Reading[bool]:
    """Read the arguments of a call of ``name``, and report them as they come.

    Returns False, with nothing reported, where no object begins. What is no JSON further on is
    reported all the same, up to its last bracket: only the caller can do anything about it.
    """
    start = source.pos
    if not (yield from source.takes("{")):
        return False
    yield from source.blanks()
    if (yield from source.peek()) not in ('"', "}"):
        return False
    source.pos = start
    sink.begin(name)
    sink.stream_from = start
    open_ends: list[str] = []
    complete = yield from read_value(source, open_ends)
    if not complete:
        complete = yield from read_brackets(source, open_ends)
    sink.arguments(source.text(sink.stream_from))
    sink.stream_from = None
    if complete:
        sink.end()
    return True


def _call(source: Source, sink: CallSink, is_bare: bool) -> Reading[bool]:
    """Read one object that is a call; return whether it is, which may be known before its end."""
    call = _Call()
    if (yield from source.peek()) != "{":
        return False
    complete = yield from _members(source, sink, call, is_bare, is_inner=False)
    if call.begun or not complete:
        return call.begun
    name = call.name
    if name is None or not sink.accepts(name, is_bare=is_bare):
        return False
    if is_bare and not call.in_function and call.members.keys().isdisjoint(_ARGUMENTS):
        return False
    arguments = _arguments(call)
    if arguments is None:
        return False
    sink.whole(name, arguments)
    return True


def _arguments(call: _Call) -> str | None:
    """Return the arguments of a whole call, the very text that was written; None for no object.

    They may be JSON within a string, as in OpenAI's messages.
    """
    raw = next((call.members[key] for key in _ARGUMENTS if key in call.members), "null")
    text = call.text(*_ARGUMENTS) if raw.startswith('"') else raw
    if text is None or (not text.isascii() and _SURROGATE.search(text)):
        return None
    try:
        value = STRICT_JSON.decode(text)
    except (ValueError, RecursionError):
        return None
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None


def _members(
    source: Source, sink: CallSink, call: _Call, is_bare: bool, *, is_inner: bool
) -> Reading[bool]:
    """Read the members of an object; return whether it is complete JSON.

    Arguments after the name are reported as they come.
    """
    source.pos += 1
    yield from source.blanks()
    if (yield from source.takes("}")):
        return True
    while True:
        key = yield from read_key(source)
        if key is None or (is_bare and key not in _KEYS):
            return False
        yield from source.blanks()
        opens = (yield from source.peek()) == "{"
        if key == "function" and opens and not is_inner:
            call.in_function = True
            complete = yield from _members(source, sink, call, is_bare, is_inner=True)
        elif key in _ARGUMENTS and opens and _is_known(call, sink, is_bare):
            call.begun = yield from streamed_object(source, sink, call.name or "")
            complete = call.begun
        else:
            start = source.pos
            complete = yield from read_value(source)
            call.members.setdefault(key, source.text(start))
            if is_bare and key == "name" and not _is_known(call, sink, is_bare):
                return False
        yield from source.blanks()
        if not complete or (yield from source.takes("}")):
            return complete
        if not (yield from source.takes(",")):
            return False
        yield from source.blanks()


def _is_known(call: _Call, sink: CallSink, is_bare: bool) -> bool:
    """Return whether the call can begin: its name is known, and it has not begun."""
    name = call.name
    return not call.begun and name is not None and sink.accepts(name, is_bare=is_bare)
