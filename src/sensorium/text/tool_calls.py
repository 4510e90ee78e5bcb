"""Reading calls of tools out of what a model writes, while it writes.

Calls are found by their JSON, never by a closing tag, which may stand in an argument. Nothing is
evaluated: it is JSON or it is text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL, _LLAMA = "[TOOL_CALLS]", "<|python_tag|>"
_TAGS = (_HERMES, _MISTRAL, _LLAMA)
_ARGS = "[ARGS]"
_BETWEEN = (";", ",", "")
_NAME = re.compile(r"[A-Za-z0-9_.-]{0,64}")
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Pattern of tools' names."""
_BLANKS = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BARE = re.compile(r"\[?\s*\{\s*\"(name|type|function|parameters|arguments|id)\"\s*:")
_PIECE_CHARS = 1024
"""A whole answer is read in pieces of so many characters."""
_BARE_CHARS = 200
"""Pieces of JSON without a tag after which it must look like a call."""


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


_JSON = json.JSONDecoder(parse_int=float, parse_constant=_no_number)
"""Reads the JSON of calls, strictly; numbers, which may have any number of digits, are not
looked at."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer outside of tool calls."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call ``index``: ``id`` and ``name`` come once, at its beginning.

    ``arguments`` are JSON text to append.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Delta = ContentDelta | ToolCallDelta


class ToolCallReader(Protocol):
    """Turns generated text into deltas."""

    def feed(self, text: str) -> list[Delta]:
        """Return the calls and text that new text completes."""
        ...

    def flush(self) -> list[Delta]:
        """The rest, when the generation has ended."""
        ...


class JsonValue:
    """Follows the strings and brackets of one JSON object or list, to its end."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = self._escaped = False

    def step(self, char: str) -> None:
        """Go on by one character."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "[{":
            self.depth += 1
        elif char in "]}":
            self.depth -= 1

    def end_in(self, text: str) -> int | None:
        """Return where in ``text``, the continuation of what was seen, the value ends.

        None when it does not.
        """
        for pos, char in enumerate(text):
            self.step(char)
            if self.depth <= 0:
                return pos + 1
        return None


class ToolCallParser:
    """Calls amid text, as models were trained to write them: ``<tool_call>{"name": …, "arguments".

    {…}}</tool_call>`` (Hermes, Qwen), ``<|python_tag|>{"name": …, "parameters": {…}}`` (Llama 3),
    ``[TOOL_CALLS] [{…}, …]`` and ``[TOOL_CALLS]name{…}`` (Mistral).

    The tags of the last two are special tokens, which texts are without: at the beginning of an
    answer and after a call, their JSON alone is a call when it names one of ``names`` and has
    arguments. A call is reported when it is complete. What looks like one but is no such JSON is
    given back as text. White space alone before, between and after calls is dropped.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(names)
        self._buffer = ""
        self._opener: str | None = (
            "" if self._names else None
        )  # "" where none is needed, None where text stands
        self._lead = ""  # what stands before the value that is being read
        self._name: str | None = None  # the name in it, in Mistral's newer form
        self._value: JsonValue | None = None
        self._pieces: list[
            str
        ] = []  # of the value: text that grows by characters is copied each time
        self._closing = False  # a call has ended, its tag perhaps not
        self._num_calls = 0
        self._blank = ""

    def feed(self, text: str) -> list[Delta]:
        """Return the calls and text that new text completes."""
        out: list[Delta] = []
        for start in range(
            0, len(text), _PIECE_CHARS
        ):  # each step copies the rest of what is there
            out += self._read(text[start : start + _PIECE_CHARS], is_last=False)
        return out

    def flush(self) -> list[Delta]:
        """The rest: an unclosed call counts if its JSON is complete."""
        out = self._read("", is_last=True)
        if self._value is not None:
            self._reject(out)
        self._text((self._opener or "") + self._buffer, out)
        self._buffer, self._opener = "", None
        if self._blank and not self._num_calls:
            out.append(ContentDelta(self._blank))
        self._blank = ""
        return out

    def _read(self, text: str, *, is_last: bool) -> list[Delta]:
        self._buffer += text
        out: list[Delta] = []
        while self._buffer and self._advance(out, is_last):
            pass
        return out

    def _advance(self, out: list[Delta], is_last: bool) -> bool:
        """Read on by one step; False when more text is needed for it."""
        if self._value is not None:
            return self._go_on(self._value, out)
        if self._closing:
            return self._close(is_last)
        if self._opener is not None:
            return self._begin(self._opener, out, is_last)
        return self._find_tag(out)

    def _find_tag(self, out: list[Delta]) -> bool:
        found = [(at, tag) for tag in _TAGS if (at := self._buffer.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            self._text(self._buffer[:at], out)
            self._buffer, self._opener = self._buffer[at + len(tag) :], tag
            return True
        safe = len(self._buffer) - max(_num_partial(self._buffer, tag) for tag in _TAGS)
        self._text(self._buffer[:safe], out)
        self._buffer = self._buffer[safe:]
        return False

    def _begin(self, opener: str, out: list[Delta], is_last: bool) -> bool:
        """Look for JSON, or a name with JSON, at the place of a call."""
        rest = self._buffer.lstrip()
        blank = self._buffer[: len(self._buffer) - len(rest)]
        takes_all = opener in ("", _MISTRAL)
        if not rest or (not opener and not is_last and any(t.startswith(rest) for t in _TAGS)):
            return False
        if not opener and rest.startswith(_TAGS):
            self._opener = None
            return True
        if rest[0] == "{" or (rest[0] == "[" and takes_all):
            self._start(opener + blank, rest, None)
            return True
        name = _NAME.match(rest)[0] if takes_all else ""  # type: ignore[index]
        known = name in self._names if not opener else bool(name)
        for head in (name, name + _ARGS) if known else ():
            if rest.startswith(head + "{"):
                self._start(opener + blank + head, rest[len(head) :], name)
                return True
        grows = name == rest and (opener or any(n.startswith(name) for n in self._names))
        if not is_last and (grows or (known and f"{name}{_ARGS}{{".startswith(rest))):
            return False
        self._opener = None
        self._text(opener, out)
        return True

    def _start(self, lead: str, text: str, name: str | None) -> None:
        self._value, self._lead, self._name = JsonValue(), lead, name
        self._pieces, self._buffer = [], text

    def _go_on(self, value: JsonValue, out: list[Delta]) -> bool:
        """Read on in a value."""
        end = value.end_in(self._buffer)
        piece, self._buffer = self._buffer[:end], "" if end is None else self._buffer[end:]
        self._pieces.append(piece)
        if end is None:
            if not self._lead.strip() and not self._may_be_call(piece):
                self._reject(out)
            return False
        calls = _calls("".join(self._pieces), self._name, is_bare=not self._opener)
        if not calls or (not self._opener and any(name not in self._names for name, _ in calls)):
            self._reject(out)
            return True
        self._blank, self._value = "", None
        self._opener, self._closing = "" if self._names else None, True
        for name, arguments in calls:
            out.append(ToolCallDelta(self._num_calls, arguments, new_call_id(), name))
            self._num_calls += 1
        return True

    def _may_be_call(self, piece: str) -> bool:
        """Return whether JSON without a tag begins like a call.

        Other JSON need not wait for its end.
        """
        if ":" not in piece and len(self._pieces) < _BARE_CHARS:
            return True
        return bool(_BARE.match("".join(self._pieces[:_BARE_CHARS])))

    def _reject(self, out: list[Delta]) -> None:
        """Treat as text what was taken for a call."""
        self._value, self._opener = None, None
        self._text(self._lead + "".join(self._pieces), out)

    def _close(self, is_last: bool) -> bool:
        """Leave out what ends a call and what stands between calls."""
        rest = self._buffer.lstrip()
        if not is_last and (_HERMES_END.startswith(rest) or rest.rstrip() in _BETWEEN):
            return False
        self._closing = False
        if rest.startswith(_HERMES_END):
            self._buffer = rest.removeprefix(_HERMES_END)
        elif rest and _HERMES_END.startswith(rest):  # cut off
            self._buffer = ""
        elif rest[:1] in _BETWEEN and rest[1:].lstrip()[:1] in ("{", "["):
            self._buffer = rest[1:]
        return True

    def _text(self, text: str, out: list[Delta]) -> None:
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept:
            out.append(ContentDelta(kept))


class NamedCallReader:
    """The whole text is the arguments of one call (``tool_choice`` names a function)."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Delta]:
        """The new text as arguments."""
        if not text:
            return []
        name, self._name = self._name, None
        return [ToolCallDelta(0, text, new_call_id() if name else None, name)]

    def flush(self) -> list[Delta]:
        """Nothing: what was not generated is no call."""
        return []


class CallListReader:
    """The text is a JSON list of ``{"name", "parameters"}`` (``tool_choice`` is ``required``).

    Each call is reported when it is complete. Half a call is none, and never content.
    """

    def __init__(self) -> None:
        self._call: list[str] = []  # in pieces: text that grows by characters is copied each time
        self._value = JsonValue()
        self._num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        """The calls that new text completes."""
        out: list[Delta] = []
        for char in text:
            was_inside = self._value.depth >= 2
            self._value.step(char)
            if was_inside or self._value.depth == 2:
                self._call.append(char)
            if was_inside and self._value.depth == 1:
                for name, arguments in _calls("".join(self._call), None):
                    out.append(ToolCallDelta(self._num_calls, arguments, new_call_id(), name))
                    self._num_calls += 1
                self._call.clear()
        return out

    def flush(self) -> list[Delta]:
        """Nothing: what is not complete by now is no call."""
        return []


def new_call_id() -> str:
    """An id for a tool call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def _calls(body: str, name: str | None, *, is_bare: bool = False) -> list[tuple[str, str]]:
    """Names and arguments of the calls in a JSON value; none when it is no call, or not all of it.

    ``is_bare``: nothing else says that it is one, and an answer may have a member ``name``, too.

    Arguments are the very text that was written, for it may hold what no value of Python's can be
    written back as: halves of surrogate pairs, numbers beyond a float's range.
    """
    try:
        value = _JSON.decode(body)
        if name is not None:
            return [(name, body.strip())] if isinstance(value, dict) else []
        texts = list(_members(body).values()) if isinstance(value, list) else [body]
        calls = [_call(text, is_bare) for text in texts]
    except (ValueError, RecursionError):
        return []
    return [] if None in calls else [call for call in calls if call is not None]


def _call(text: str, is_bare: bool) -> tuple[str, str] | None:
    """Name and arguments of the call that valid JSON is, or holds as ``function``.

    None for other JSON.
    """
    members = _members(text)
    inner = members.get("function", "")
    if inner.startswith("{"):
        members = _members(inner)
    name = _JSON.decode(members.get("name", inner or "null"))
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        return None
    if is_bare and not inner and members.keys().isdisjoint(("arguments", "parameters")):
        return None
    arguments = members.get("arguments", members.get("parameters", "null"))
    if arguments.startswith('"'):  # JSON within a text, as in OpenAI's messages
        arguments = _JSON.decode(arguments)
        if not arguments.isascii() and _SURROGATE.search(arguments):
            return None
    return name, "{}" if arguments == "null" else arguments


def _members(text: str) -> dict[str | int, str]:
    """The texts of the members of an object or list in valid JSON, by their names or places.

    None of other values.
    """
    found: dict[str | int, str] = {}
    text = text.strip()
    is_object = text.startswith("{")
    pos = _skip_blanks(text, 1)
    while text[:1] in ("{", "[") and text[pos] not in "]}":
        name: str | int = len(found)
        if is_object:
            name, pos = _JSON.raw_decode(text, pos)
            pos = _skip_blanks(text, _skip_blanks(text, pos) + len(":"))
        _, end = _JSON.raw_decode(text, pos)
        found[name] = text[pos:end]
        pos = _skip_blanks(text, end)
        if text[pos] == ",":
            pos = _skip_blanks(text, pos + 1)
    return found


def _skip_blanks(text: str, pos: int) -> int:
    return _BLANKS.match(text, pos).end()  # type: ignore[union-attr]


def _num_partial(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    return next(
        (k for k in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:k])), 0
    )
