"""Output items of a response as they grow, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from sensorium.server.responses.items import Item, new_id

Event = dict[str, Any]
Delta = dict[str, Any]
"""A delta of chat: ``content``, ``reasoning_content`` or ``tool_calls``."""
Status = Literal["completed", "incomplete"]


class OutputItems:
    """Items made of the deltas of one answer: messages, reasoning and calls, in their order.

    The attribute ``items`` holds them in their latest state; each event has a copy.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: _OpenItem | None = None
        self._call = -1
        self._logprobs: list[dict[str, Any]] = []

    def feed(
        self, deltas: Sequence[Delta], logprobs: Sequence[dict[str, Any]] = ()
    ) -> Iterator[Event]:
        """Yield the events for deltas.

        ``logprobs``: those of the tokens since the last call. They go to the next piece of text of
        a message; those of other tokens are dropped.
        """
        self._logprobs += logprobs
        for delta in deltas:
            if delta.get("content"):
                yield from self._text(_OpenMessage, delta["content"])
            elif delta.get("reasoning_content"):
                yield from self._text(_OpenReasoning, delta["reasoning_content"])
            for piece in delta.get("tool_calls") or ():
                yield from self._piece(piece)

    def finish(self, status: Status) -> Iterator[Event]:
        """Yield the last events. An answer without anything becomes an empty message."""
        if not self.items:
            yield from self._begin(_OpenMessage())
        yield from self._end(status)

    def _text(self, kind: type[_OpenMessage | _OpenReasoning], text: str) -> Iterator[Event]:
        if not isinstance(self._open, kind):
            yield from self._end("completed")
            yield from self._begin(kind())
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        yield self._marked(self._open.add(text, logprobs))

    def _piece(self, piece: dict[str, Any]) -> Iterator[Event]:
        """Yield the events for a piece of a call: its id and name come first."""
        function = piece["function"]
        self._logprobs = []
        if not isinstance(self._open, _OpenCall) or piece["index"] != self._call:
            yield from self._end("completed")
            self._call = piece["index"]
            yield from self._begin(_OpenCall(piece["id"], function["name"]))
        assert self._open is not None
        if function.get("arguments"):
            yield self._marked(self._open.add(function["arguments"], []))

    def _begin(self, item: _OpenItem) -> Iterator[Event]:
        self._open = item
        self.items.append(item.snapshot("in_progress"))
        yield self._of_item("response.output_item.added", item.bare())
        if (part := item.part()) is not None:
            yield self._marked({"type": "response.content_part.added", "part": part})

    def _end(self, status: Status) -> Iterator[Event]:
        """Yield the events that end the open item, if there is one."""
        item = self._open
        if item is None:
            return
        yield self._marked(item.done())
        if (part := item.part()) is not None:
            yield self._marked({"type": "response.content_part.done", "part": part})
        self.items[-1] = item.snapshot(status)
        yield self._of_item("response.output_item.done", item.snapshot(status))
        self._open = None

    def _of_item(self, kind: str, item: Item) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": item}

    def _marked(self, event: Event) -> Event:
        """Return an event with the place of the open item."""
        assert self._open is not None
        place: Event = {"item_id": self._open.id, "output_index": len(self.items) - 1}
        if self._open.has_parts:
            place["content_index"] = 0
        return {**event, **place}


class _OpenItem:
    """An item that grows. ``prefix``: what its delta and done events begin with."""

    prefix = ""
    has_parts = True

    def __init__(self, kind: str) -> None:
        self.id = new_id(kind)
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._pieces)

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        """Append text; return the event for it."""
        self._pieces.append(text)
        self._logprobs += logprobs
        return {"type": f"{self.prefix}.delta", "delta": text}

    def done(self) -> Event:
        """Return the event for the end of the text."""
        return {"type": f"{self.prefix}.done", "text": self.text}

    def part(self) -> dict[str, Any] | None:
        """Return the content part so far; None for items without."""
        return None

    def bare(self) -> Item:
        """Return the item before it has any content."""
        raise NotImplementedError

    def snapshot(self, status: str) -> Item:
        """Return a copy of the item."""
        raise NotImplementedError


class _OpenMessage(_OpenItem):
    prefix = "response.output_text"

    def __init__(self) -> None:
        super().__init__("message")

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        return {**super().add(text, logprobs), "logprobs": logprobs}

    def done(self) -> Event:
        return {**super().done(), "logprobs": list(self._logprobs)}

    def part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def bare(self) -> Item:
        return {
            "id": self.id,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }

    def snapshot(self, status: str) -> Item:
        return {**self.bare(), "status": status, "content": [self.part()]}


class _OpenReasoning(_OpenItem):
    prefix = "response.reasoning_text"

    def __init__(self) -> None:
        super().__init__("reasoning")

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def bare(self) -> Item:
        return {
            "id": self.id,
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }

    def snapshot(self, status: str) -> Item:
        return {**self.bare(), "status": status, "content": [self.part()]}


class _OpenCall(_OpenItem):
    prefix = "response.function_call_arguments"
    has_parts = False

    def __init__(self, call_id: str, name: str) -> None:
        super().__init__("function_call")
        self._call_id = call_id
        self._name = name

    def done(self) -> Event:
        return {"type": f"{self.prefix}.done", "name": self._name, "arguments": self.text}

    def bare(self) -> Item:
        return {
            "id": self.id,
            "type": "function_call",
            "status": "in_progress",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "",
        }

    def snapshot(self, status: str) -> Item:
        if status == "completed" and not _is_json(self.text):
            status = "incomplete"  # the model ended in the middle of it
        return {**self.bare(), "status": status, "arguments": self.text}


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
