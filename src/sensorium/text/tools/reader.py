"""Reading calls of tools out of what a model writes, while it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sensorium.text.tools.deltas import (
    CallSink,
    ContentDelta,
    Delta,
    ToolCallDelta,
    ToolCallEnd,
    new_call_id,
)
from sensorium.text.tools.json_calls import json_calls
from sensorium.text.tools.source import BLANKS, STRICT_JSON, Reading, Source

_BETWEEN = (";", ",")
"""Separators between calls."""


class Body(Protocol):
    """A reader of the calls after a tag, or, if ``is_bare``, of calls without one.

    It returns whether there was a call. Where there was none it has reported nothing.
    """

    def __call__(self, source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
        """Read."""
        ...


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Spellings of calls.

    ``openers``: readers of what follows a tag, by the tag; none begins another. ``closers``: tags
    after calls. ``bare``: readers of calls without a tag, at the beginning of an answer and after
    a call. ``new_id`` makes the ids of calls.
    """

    openers: Mapping[str, Body]
    closers: Sequence[str] = ()
    bare: Sequence[Body] = ()
    new_id: Callable[[], str] = new_call_id


class ToolCallReader(Protocol):
    """Turns generated text into deltas."""

    def feed(self, text: str) -> list[Delta]:
        """Return the deltas that new text completes."""
        ...

    def flush(self) -> list[Delta]:
        """Return the rest, when the generation has ended."""
        ...


class CallReader:
    """Reader of calls amid text.

    Calls end where their JSON does, never at a tag, which may stand in an argument. The name of a
    call and an argument object that has begun make it a call, and its arguments are reported as
    they come, the very text that was written. What only looks like a call is text. White space
    alone before, between and after calls is dropped. The deltas of a text say the same however it
    is cut into pieces.

    Args:
        syntax: The spellings of calls.
        tools: The argument schemas of the request's tools by name, or their names.
        most: Maximum number of calls; further ones are left out.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        tools: Mapping[str, Mapping[str, Any]] | Iterable[str] = (),
        *,
        most: int | None = None,
    ) -> None:
        self._syntax = syntax
        self._sink = CallSink(tools, most, syntax.new_id)
        self._source = Source()
        self._blank = ""
        self._keep_from: int | None = None
        tags = sorted(syntax.openers, key=len, reverse=True)
        self._tags = re.compile("|".join(map(re.escape, tags)) or "(?!)")
        self._beginnings = {tag[:size] for tag in tags for size in range(1, len(tag))}
        self._longest = max(map(len, tags), default=1)
        self._reading: Generator[None, None, None] = self._read()
        next(self._reading)

    @property
    def num_kept(self) -> int:
        """Return the number of characters that are kept of what was read."""
        return self._source.num_kept

    def feed(self, text: str) -> list[Delta]:
        """Return the deltas that new text completes."""
        if not text:
            return []
        self._source.append(text)
        next(self._reading)
        sink, source = self._sink, self._source
        if sink.stream_from is not None and source.pos > sink.stream_from:
            sink.arguments(source.text(sink.stream_from))
            sink.stream_from = source.pos
        if sink.stream_from is not None or self._keep_from is None:
            source.forget(source.pos)
        else:
            source.forget(self._keep_from)
        return self._taken()

    def flush(self) -> list[Delta]:
        """Return the rest. A call whose arguments are not complete has no ``ToolCallEnd``."""
        self._source.ended = True
        for _ in self._reading:
            raise RuntimeError("a reader of calls waits for more than the end")
        if self._blank and not self._sink.num_calls:
            self._sink.deltas.append(ContentDelta(self._blank))
        self._blank = ""
        return self._taken()

    def _taken(self) -> list[Delta]:
        deltas, self._sink.deltas = self._sink.deltas, []
        return deltas

    def _read(self) -> Reading[None]:
        """Read the whole answer."""
        source = self._source
        while True:
            if (yield from self._bare()):
                yield from self._close()
                continue
            while True:
                tag = yield from self._prose()
                if tag is None:
                    return
                start = source.pos - len(tag)
                self._keep_from = start
                found = yield from self._syntax.openers[tag](source, self._sink, is_bare=False)
                self._keep_from = None
                if found:
                    break
                source.pos = start + 1
                self._text(source.text(start))
            self._blank = ""
            yield from self._close()

    def _bare(self) -> Reading[bool]:
        """Read a call that no tag announces; return whether there was one."""
        source = self._source
        if not self._sink.tools:
            return False
        start = self._keep_from = source.pos
        found = False
        for body in self._syntax.bare:
            found = yield from body(source, self._sink, is_bare=True)
            if found:
                self._blank = ""
                break
            source.pos = start
        self._keep_from = None
        return found

    def _prose(self) -> Reading[str | None]:
        """Pass on text up to a tag; return it, None at the end."""
        source = self._source
        while True:
            found = source.search(self._tags)
            start = source.pos
            if found is not None:
                source.pos = found[1]
                self._text(source.text(start, found[0]))
                return source.text(found[0])
            source.pos = source.end if source.ended else source.end - self._num_held(start)
            self._text(source.text(start))
            if source.ended:
                return None
            yield

    def _num_held(self, start: int) -> int:
        """Return the length of the longest end of the text that begins a tag."""
        source = self._source
        most = min(self._longest - 1, source.end - start)
        rest = source.text(source.end - most, source.end)
        sizes = (size for size in range(most, 0, -1) if rest[most - size :] in self._beginnings)
        return next(sizes, 0)

    def _close(self) -> Reading[None]:
        """Leave out what ends a call and what stands between calls."""
        source = self._source
        start = self._keep_from = source.pos
        yield from source.blanks()
        if not (yield from self._closer()):
            between = yield from source.takes_any(_BETWEEN)
            yield from source.blanks()
            if between is None or (yield from source.peek()) not in ("{", "["):
                source.pos = start
        self._keep_from = None

    def _closer(self) -> Reading[bool]:
        """Go past a closing tag, also one that the end of the answer cuts off."""
        source = self._source
        for closer in self._syntax.closers:
            if (yield from source.takes(closer)):
                return True
            rest = source.text(source.pos, source.end)
            if source.ended and rest and closer.startswith(rest):
                source.pos = source.end
                return True
        return False

    def _text(self, text: str) -> None:
        """Report text, but for white space at its end."""
        text = self._blank + text
        kept = text.rstrip(BLANKS)
        self._blank = text[len(kept) :]
        if kept:
            self._sink.deltas.append(ContentDelta(kept))


class NamedCallReader:
    """The whole text is the arguments of one call (``tool_choice`` names a function)."""

    def __init__(self, name: str, new_id: Callable[[], str] = new_call_id) -> None:
        self._sink = CallSink((name,), new_id=new_id)
        self._name = name
        self._pieces: list[str] = []

    def feed(self, text: str) -> list[Delta]:
        """Return the new text as arguments."""
        if text and not self._sink.num_calls:
            self._sink.begin(self._name)
        self._pieces.append(text)
        self._sink.arguments(text)
        deltas, self._sink.deltas = self._sink.deltas, []
        return deltas

    def flush(self) -> list[Delta]:
        """Return the end of the call, unless its arguments were cut off."""
        try:
            STRICT_JSON.decode("".join(self._pieces))
        except (ValueError, RecursionError):
            return []
        return [ToolCallEnd(0)]


class CallsOnly:
    """Reader of an answer that is calls and nothing else: half a call is never content."""

    def __init__(self, reader: ToolCallReader) -> None:
        self._reader = reader

    def feed(self, text: str) -> list[Delta]:
        """Return the calls that new text begins, continues or completes."""
        return _calls_only(self._reader.feed(text))

    def flush(self) -> list[Delta]:
        """Return the rest of calls: what has not begun by now is no call."""
        return _calls_only(self._reader.flush())


class CallListReader(CallsOnly):
    """The text is a JSON list of ``{"name", "parameters"}``."""

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(CallReader(CallSyntax({"[": _listed}, new_id=new_id)))


def _listed(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    source.pos -= 1
    return (yield from json_calls(source, sink, is_bare=is_bare))


def _calls_only(deltas: list[Delta]) -> list[Delta]:
    return [delta for delta in deltas if isinstance(delta, ToolCallDelta | ToolCallEnd)]
