"""Tools of a chat request: those that the template lists, and the calls in the model's output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sensorium.server.openai.protocol import ChatBody
from sensorium.text.tool_calls import Delta, ToolCallDelta, ToolCallReader
from sensorium.text.tools import (
    ForcedCall,
    ToolChoice,
    forced_call,
    parse_tool_choice,
    parse_tools,
    reader_for,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """The text and OpenAI's ``tool_calls`` of a whole answer."""

    content: str
    calls: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Tools of a request.

    ``for_template``: tools that the template lists. ``forced``: the form of a demanded call.
    """

    choice: ToolChoice
    for_template: list[dict[str, Any]] = field(default_factory=list)
    forced: ForcedCall | None = None

    def reader(self) -> DeltaReader:
        """Return a reader for one sample."""
        names = [tool["function"]["name"] for tool in self.for_template]
        return DeltaReader(None if self.choice.mode == "none" else reader_for(self.choice, names))

    def reply(self, text: str) -> Reply:
        """Return the content and the calls of a whole answer, without a call that was cut off."""
        reader = self.reader()
        content, calls = "", list[dict[str, Any]]()
        for delta in (*reader.feed(text), *reader.flush()):
            content += delta.get("content", "")
            for piece in delta.get("tool_calls", ()):
                if piece["index"] == len(calls):
                    calls.append({k: v for k, v in piece.items() if k != "index"})
                else:
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        if self.choice.mode == "named":
            calls = [call for call in calls if _is_json(call["function"]["arguments"])]
        return Reply(content, calls)


def tool_plan(body: ChatBody) -> ToolPlan:
    """Return the tools and the choice of ``body``. Raises InvalidRequestError with the place."""
    tools = parse_tools(body.tools)
    choice = parse_tool_choice(body.tool_choice, tools)
    if choice.mode == "none":
        return ToolPlan(choice)
    parallel = body.parallel_tool_calls is not False
    return ToolPlan(choice, tools, forced_call(choice, tools, parallel=parallel))


class DeltaReader:
    """Turns text, as it grows, into the ``delta`` members of chunks.

    Without a reader of calls all of it is content.
    """

    def __init__(self, calls: ToolCallReader | None) -> None:
        self._calls = calls
        self.has_calls = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas for the text that was added."""
        if self._calls is None:
            return [{"content": text}] if text else []
        return list(self._members(self._calls.feed(text)))

    def flush(self) -> list[dict[str, Any]]:
        """Return the deltas for text that was held back."""
        return [] if self._calls is None else list(self._members(self._calls.flush()))

    def _members(self, deltas: Iterable[Delta]) -> Iterable[dict[str, Any]]:
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                self.has_calls = True
                yield {"tool_calls": [_piece(delta)]}
            else:
                yield {"content": delta.text}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _piece(delta: ToolCallDelta) -> dict[str, Any]:
    """Return a piece of a call: the first has id and name, later ones have arguments alone."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {
        "index": delta.index,
        "id": delta.id,
        "type": "function",
        "function": {"name": delta.name, "arguments": delta.arguments},
    }
