"""Content blocks of an answer as they grow, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

Block = dict[str, Any]
Event = dict[str, Any]
Delta = dict[str, Any]
"""A delta of chat: ``content``, ``reasoning_content`` or ``tool_calls``."""

_FIELDS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
_DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


@dataclass(slots=True)
class _Open:
    """A block that grows. ``begun``: the block as it begins; ``number``: that of a call."""

    kind: str
    begun: Block
    number: int = -1
    pieces: list[str] = field(default_factory=list)


class ContentBlocks:
    """Blocks made of the deltas of one answer: text, thinking and uses of tools, in their order."""

    def __init__(self) -> None:
        self._blocks: list[_Open] = []
        self._is_open = False

    @property
    def has_calls(self) -> bool:
        """True when a tool is used: the answer has a call that was not cut off."""
        calls = (block for block in self._blocks if block.kind == "tool_use")
        return any(_input("".join(block.pieces)) is not None for block in calls)

    def feed(self, deltas: Sequence[Delta]) -> Iterator[Event]:
        """Yield the events for deltas."""
        for delta in deltas:
            if delta.get("content"):
                yield from self._add("text", {"type": "text", "text": ""}, delta["content"])
            elif delta.get("reasoning_content"):
                thought: Block = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._add("thinking", thought, delta["reasoning_content"])
            for piece in delta.get("tool_calls") or ():
                function = piece["function"]
                begun: Block = {
                    "type": "tool_use",
                    "id": piece.get("id"),
                    "name": function.get("name"),
                    "input": {},
                }
                text = function.get("arguments") or ""
                yield from self._add("tool_use", begun, text, piece["index"])

    def finish(self) -> Iterator[Event]:
        """Yield the event that ends the open block, if there is one."""
        if self._is_open:
            self._is_open = False
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def whole(self) -> list[Block]:
        """Return the blocks of a complete answer, without a call that was cut off."""
        found = []
        for block in self._blocks:
            text: Any = "".join(block.pieces)
            if block.kind == "tool_use":
                text = _input(text)
                if text is None:
                    continue
            name = "input" if block.kind == "tool_use" else _FIELDS[block.kind]
            found.append({**block.begun, name: text})
        return found

    def _add(self, kind: str, begun: Block, text: str, number: int = -1) -> Iterator[Event]:
        last = self._blocks[-1] if self._is_open else None
        if last is None or last.kind != kind or last.number != number:
            yield from self.finish()
            last = _Open(kind, begun, number)
            self._blocks.append(last)
            self._is_open = True
            index = len(self._blocks) - 1
            yield {"type": "content_block_start", "index": index, "content_block": begun}
        if text:
            last.pieces.append(text)
            delta = {"type": _DELTAS[kind], _FIELDS[kind]: text}
            index = len(self._blocks) - 1
            yield {"type": "content_block_delta", "index": index, "delta": delta}


def _input(text: str) -> msgspec.Raw | None:
    """Return the arguments of a call, as they were written; None when they are no JSON object."""
    try:
        value = msgspec.json.decode(text or "{}")
    except (ValueError, RecursionError):
        return None
    return msgspec.Raw((text or "{}").encode()) if isinstance(value, dict) else None
