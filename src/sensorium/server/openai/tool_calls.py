"""Tools of a chat request: which of them the template shows, and the calls in what the model wrote."""

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
    """A whole answer, taken apart: its text, and OpenAI's ``tool_calls``."""

    content: str
    calls: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """``shown``: tools for the template; ``forced``: what a forced call must look like."""

    choice: ToolChoice
    shown: list[dict[str, Any]] = field(default_factory=list)
    forced: ForcedCall | None = None

    def reader(self) -> DeltaReader:
        """A reader for one sample."""
        names = [tool["function"]["name"] for tool in self.shown]
        return DeltaReader(None if self.choice.mode == "none" else reader_for(self.choice, names))

    def reply(self, text: str) -> Reply:
        """Content and calls of a whole answer. Half a call, of one that was cut off or stopped, is none."""
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
    """What the tools of ``body`` mean. Raises InvalidRequestError with the place of what is wrong."""
    tools = parse_tools(body.tools)
    choice = parse_tool_choice(body.tool_choice, tools)
    if choice.mode == "none":
        return ToolPlan(choice)
    parallel = body.parallel_tool_calls is not False
    return ToolPlan(choice, tools, forced_call(choice, tools, parallel=parallel))


class DeltaReader:
    """Turns growing text into the ``delta`` members of chunks; without a reader of calls, all of it is content."""

    def __init__(self, calls: ToolCallReader | None) -> None:
        self._calls = calls
        self.has_calls = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Deltas for the text that was added."""
        if self._calls is None:
            return [{"content": text}] if text else []
        return list(self._members(self._calls.feed(text)))

    def flush(self) -> list[dict[str, Any]]:
        """Deltas for what was held back."""
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
    """A piece of a call; its head comes with the id and the name, the rest with arguments alone."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {
        "index": delta.index,
        "id": delta.id,
        "type": "function",
        "function": {"name": delta.name, "arguments": delta.arguments},
    }
