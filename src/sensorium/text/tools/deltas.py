"""Pieces of an answer: content, reasoning and tool calls; and where readers of calls put them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Pattern of tools' names."""
_ID_CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SHORT_ID = 9
NAME_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
"""Characters of tools' names."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer outside of reasoning and tool calls."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text that the model wrote before its answer, without the tags around it."""

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


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The end of call ``index``, whose arguments are complete. A call that was cut off has none."""

    index: int


Delta = ContentDelta | ReasoningDelta | ToolCallDelta | ToolCallEnd


def new_call_id() -> str:
    """Return an id for a tool call, in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Return an id of nine letters and digits, the only ones that Mistral's templates take."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(SHORT_ID))


class CallSink:
    """Collector of the deltas of calls while they are read.

    Args:
        tools: The JSON schemas of the arguments by the names of the request's tools.
        most: Maximum number of calls; further ones are read and left out. None: no limit.
        new_id: Makes the ids of calls.
    """

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]] | Iterable[str] = (),
        most: int | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.tools = dict(tools) if isinstance(tools, Mapping) else {name: {} for name in tools}
        self.deltas: list[Delta] = []
        self.num_calls = 0
        self.stream_from: int | None = None
        self._most = most
        self._new_id = new_id

    def accepts(self, name: str, *, is_bare: bool) -> bool:
        """Return whether ``name`` may be that of a call.

        ``is_bare``: no tag says that it is one, so only the tools of the request count.
        """
        return name in self.tools if is_bare else TOOL_NAME.fullmatch(name) is not None

    def begin(self, name: str) -> None:
        """Begin a call. From here on its text cannot become content any more."""
        self.num_calls += 1
        self._put(ToolCallDelta(self.num_calls - 1, "", self._new_id(), name))

    def arguments(self, text: str) -> None:
        """Append to the arguments of the call."""
        if text:
            self._put(ToolCallDelta(self.num_calls - 1, text))

    def end(self) -> None:
        """End the call."""
        self._put(ToolCallEnd(self.num_calls - 1))

    def whole(self, name: str, arguments: str) -> None:
        """Put a call that is complete."""
        self.begin(name)
        self.arguments(arguments)
        self.end()

    def _put(self, delta: Delta) -> None:
        if self._most is None or self.num_calls <= self._most:
            self.deltas.append(delta)
