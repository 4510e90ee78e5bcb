"""Input items: their checks, the form in which they are stored, and the messages that they mean."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError
from sensorium.server.payload import abbreviate
from sensorium.text.chat.conversation import (
    Conversation,
    Message,
    Part,
    TextPart,
    ToolCall,
    checked_conversation,
    parse_arguments,
    parse_parts,
)

Item = dict[str, Any]
FindItem = Callable[[str, str], Item]
"""Returns the stored item of an id; its second argument is the place of the reference."""

_ROLES = ("user", "assistant", "system", "developer")
_KNOWN = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_STATUSES = ("in_progress", "completed", "incomplete")
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}
MAX_ID = 128


def new_id(kind: str) -> str:
    """Return a new id for an item of a type, or for anything else with that prefix."""
    return f"{_PREFIXES.get(kind, kind)}_{secrets.token_hex(24)}"


def parse_items(value: str | Sequence[Mapping[str, Any]], find: FindItem) -> list[Item]:
    """Return the items of ``input`` in the form in which they are stored and listed.

    Each has an id and a status. References are replaced by the items that they name. Raises
    InvalidRequestError with the place of the mistake, NotFoundError for an unknown reference.
    """
    if isinstance(value, str):
        return [_message({"role": "user", "content": value}, "input")]
    if not value:
        _bad("input is empty; give a text or at least one item", "input")
    return [_item(item, f"input[{i}]", find) for i, item in enumerate(value)]


def is_reference(item: Mapping[str, Any]) -> bool:
    """Return true for a reference to a stored item."""
    return _kind(item) == "item_reference"


def _kind(item: Mapping[str, Any]) -> object:
    """Return the type of an item, which messages and references may leave out."""
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference" if set(item) == {"id"} else None
    return kind


def _item(item: Mapping[str, Any], place: str, find: FindItem) -> Item:
    kind = _kind(item)
    match kind:
        case "message":
            return _message(item, place)
        case "function_call":
            return _function_call(item, place)
        case "function_call_output":
            return _function_call_output(item, place)
        case "reasoning":
            return _reasoning(item, place)
        case "item_reference":
            return find(_string(item, "id", place), f"{place}.id")
    return _bad(
        f"{place}.type must be one of {', '.join(_KNOWN)}, got {abbreviate(kind)}; items of "
        f"built-in tools do not exist here.{suggestion(str(kind)[:80], list(_KNOWN))}",
        f"{place}.type",
    )


def _message(item: Mapping[str, Any], place: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        _bad(
            f"{place}.role must be one of {', '.join(_ROLES)}, got {abbreviate(role)}",
            f"{place}.role",
        )
    content = item.get("content")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        content = [_text_part(kind, content)]
    if not isinstance(content, list):
        _bad(
            f"{place}.content must be a string or a list of parts, got {abbreviate(content)}",
            f"{place}.content",
        )
    return {
        "id": _id(item, "message", place),
        "type": "message",
        "role": role,
        "status": _status(item, place),
        "content": [_part(part) for part in content],
    }


def _text_part(kind: str, text: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return {**part, "annotations": []} if kind == "output_text" else part


def _part(part: Any) -> Any:
    """Return a part as it is stored: images have the detail that clients expect."""
    if isinstance(part, Mapping) and part.get("type") == "input_image":
        return {"detail": "auto", **part}
    return part


def _function_call(item: Mapping[str, Any], place: str) -> Item:
    return {
        "id": _id(item, "function_call", place),
        "type": "function_call",
        "status": _status(item, place),
        "call_id": _string(item, "call_id", place),
        "name": _string(item, "name", place),
        "arguments": _string(item, "arguments", place, empty=True),
    }


def _function_call_output(item: Mapping[str, Any], place: str) -> Item:
    output = item.get("output")
    if not isinstance(output, str | list):
        _bad(
            f"{place}.output must be a string or a list of parts, got {abbreviate(output)}",
            f"{place}.output",
        )
    return {
        "id": _id(item, "function_call_output", place),
        "type": "function_call_output",
        "status": _status(item, place),
        "call_id": _string(item, "call_id", place),
        "output": output if isinstance(output, str) else [_part(part) for part in output],
    }


def _reasoning(item: Mapping[str, Any], place: str) -> Item:
    found: Item = {
        "id": _id(item, "reasoning", place),
        "type": "reasoning",
        "status": _status(item, place),
    }
    for name in ("summary", "content"):
        parts = item.get(name)
        parts = [] if parts is None else parts
        if not isinstance(parts, list):
            _bad(f"{place}.{name} must be a list, got {abbreviate(parts)}", f"{place}.{name}")
        for i, part in enumerate(parts):
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                at = f"{place}.{name}[{i}]"
                _bad(f"{at} must be an object with a 'text', got {abbreviate(part)}", at)
        kind = "summary_text" if name == "summary" else "reasoning_text"
        found[name] = [{"type": kind, "text": part["text"]} for part in parts]
    return found


def _id(item: Mapping[str, Any], kind: str, place: str) -> str:
    value = item.get("id")
    if value is None:
        return new_id(kind)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID:
        _bad(
            f"{place}.id must be a string of 1 to {MAX_ID} characters, got {abbreviate(value)}",
            f"{place}.id",
        )
    return value


def _status(item: Mapping[str, Any], place: str) -> str:
    value = item.get("status")
    if value is None:
        return "completed"
    if value not in _STATUSES:
        _bad(
            f"{place}.status must be one of {', '.join(_STATUSES)}, got {abbreviate(value)}",
            f"{place}.status",
        )
    return str(value)


def _string(item: Mapping[str, Any], name: str, place: str, *, empty: bool = False) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not (value or empty):
        what = "is required" if value is None else f"must be a string, got {abbreviate(value)}"
        _bad(f"{place}.{name} {what}", f"{place}.{name}")
    return value


def _bad(message: str, param: str) -> NoReturn:
    raise InvalidRequestError(message if message[-1] in ".?" else f"{message}.", param=param)


@dataclass(slots=True)
class _Draft:
    """A message to which calls may be added."""

    role: str
    parts: tuple[Part, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message:
        """Return the message. A single text counts as a string, which every template takes."""
        parts = self.parts
        return Message(
            self.role,
            parts,
            is_string=not parts or (len(parts) == 1 and isinstance(parts[0], TextPart)),
            tool_calls=tuple(self.calls),
            tool_call_id=self.tool_call_id,
            reasoning=self.reasoning,
        )


@dataclass(slots=True)
class Messages:
    """Messages under construction, and the place of each in the request.

    Calls, and text before them, become one message of the assistant, and reasoning a part of the
    message after it, as templates expect.
    """

    places: list[str] = field(default_factory=list)
    _drafts: list[_Draft] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)

    def add(self, item: Item, place: str) -> None:
        """Add the message, or the part of one, that an item is. Raises InvalidRequestError."""
        match item["type"]:
            case "reasoning":
                self._reasoning += [part["text"] for part in item["content"] or item["summary"]]
            case "function_call":
                self._add_call(item, place)
            case "function_call_output":
                parts = parse_parts(item["output"], f"{place}.output")
                self._append(_Draft("tool", parts, tool_call_id=item["call_id"]), place)
            case _:
                parts = parse_parts(item["content"], f"{place}.content")
                self._append(_Draft(item["role"], parts), place)

    def add_text(self, role: str, text: str, place: str) -> None:
        """Add a message of text alone. Raises InvalidRequestError."""
        self._append(_Draft(role, parse_parts(text, place)), place)

    def conversation(self) -> Conversation:
        """Return all of them. Raises InvalidRequestError when they are too many."""
        messages = [draft.message() for draft in self._drafts]
        return checked_conversation(messages, self.places, param="input")

    def _add_call(self, item: Item, place: str) -> None:
        """Add a call to the assistant's message before it, else to a new one."""
        arguments = parse_arguments(item["arguments"], f"{place}.arguments")
        last = self._drafts[-1] if self._drafts else None
        if last is None or last.role != "assistant" or self._reasoning:
            last = _Draft("assistant")
            self._append(last, place)
        last.calls.append(ToolCall(item["call_id"], item["name"], arguments))

    def _append(self, draft: _Draft, place: str) -> None:
        if draft.role == "assistant" and self._reasoning:
            draft.reasoning = "\n".join(self._reasoning)
        self._reasoning = []
        self._drafts.append(draft)
        self.places.append(place)
