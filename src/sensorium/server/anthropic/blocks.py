"""Messages of content blocks, as the conversation that they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError, located
from sensorium.multimodal.items import FileRef, MediaRef
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

_ROLES = ("user", "assistant")
_IN_USER = ("text", "image", "document", "tool_result")
_IN_ASSISTANT = ("text", "tool_use", "thinking", "redacted_thinking")
_IN_RESULT = ("text", "image", "document")
_FIELDS = {"base64": "data", "url": "url", "file": "file_id", "text": "data"}
"""Types of sources, and the field that holds what they are."""


def parse_conversation(
    system: str | Sequence[Mapping[str, Any]] | None, messages: Sequence[Mapping[str, Any]]
) -> tuple[Conversation, list[str]]:
    """Return a conversation, and the place of each of its messages in the request.

    Raises InvalidRequestError with the place of the mistake.
    """
    if not messages:
        _bad("messages is empty; send at least one message", "messages")
    found = _Messages()
    if system:
        found.add("system", "system", _text_parts(system, "system"))
    for index, message in enumerate(messages):
        found.add_message(message, f"messages[{index}]")
    conversation = checked_conversation(found.messages, found.places, param="messages")
    return conversation, found.places


@dataclass(slots=True)
class _Messages:
    """Messages under construction, and their places."""

    messages: list[Message] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, role: str, place: str, parts: tuple[Part, ...], **fields: Any) -> None:
        """Add a message; a single text counts as a string, which every template takes."""
        is_string = not parts or (len(parts) == 1 and isinstance(parts[0], TextPart))
        self.messages.append(Message(role, parts, is_string=is_string, **fields))
        self.places.append(place)

    def add_message(self, message: Mapping[str, Any], place: str) -> None:
        """Add the messages that one of Anthropic's is: results of tools are some of their own."""
        role, content = message.get("role"), message.get("content")
        if role == "system":  # as other servers of this API take it
            self.add("system", place, _text_parts(content, f"{place}.content"))
            return
        if role not in _ROLES:
            _bad(
                f"{place}.role must be 'user' or 'assistant', got {abbreviate(role)}",
                f"{place}.role",
            )
        if isinstance(content, str):
            self.add(role, place, parse_parts(content, f"{place}.content"))
        elif role == "user":
            self._add_user(_blocks(content, f"{place}.content", _IN_USER), place)
        else:
            self._add_assistant(_blocks(content, f"{place}.content", _IN_ASSISTANT), place)

    def _add_user(self, blocks: Iterator[tuple[Mapping[str, Any], str]], place: str) -> None:
        parts: list[Part] = []
        any_results = False
        for block, at in blocks:
            if block["type"] == "tool_result":
                any_results = True
                self._add_result(block, at)
            else:
                parts += _parts(block, at)
        if parts or not any_results:
            self.add("user", place, tuple(parts))

    def _add_result(self, block: Mapping[str, Any], place: str) -> None:
        content = block.get("content")
        if content is None or isinstance(content, str):
            parts = parse_parts(content, f"{place}.content")
        else:
            inner = _blocks(content, f"{place}.content", _IN_RESULT)
            parts = tuple(part for one, at in inner for part in _parts(one, at))
        self.add("tool", place, parts, tool_call_id=_string(block, "tool_use_id", place))

    def _add_assistant(self, blocks: Iterator[tuple[Mapping[str, Any], str]], place: str) -> None:
        parts: list[Part] = []
        calls: list[ToolCall] = []
        thoughts: list[str] = []
        for block, at in blocks:
            match block["type"]:
                case "tool_use":
                    calls.append(_call(block, at))
                case "thinking":
                    thoughts.append(_string(block, "thinking", at, empty=True))
                case "text":
                    parts += _parts(block, at)
        self.add(
            "assistant",
            place,
            tuple(parts),
            tool_calls=tuple(calls),
            reasoning="\n".join(thoughts) or None,
        )


def _blocks(
    content: Any, place: str, known: Sequence[str]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the blocks of a list and their places; each is of a known type."""
    if not isinstance(content, list):
        _bad(f"{place} must be a string or a list of blocks, got {abbreviate(content)}", place)
    for index, block in enumerate(content):
        at = f"{place}[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind not in known:
            _bad(
                f"{at}.type must be one of {', '.join(known)} here, got "
                f"{abbreviate(kind)}.{suggestion(str(kind)[:80], list(known))}",
                f"{at}.type",
            )
        yield block, at


def _text_parts(content: Any, place: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return parse_parts(content, place)
    blocks = _blocks(content, place, ("text",))
    return tuple(part for block, at in blocks for part in _parts(block, at))


def _parts(block: Mapping[str, Any], place: str) -> tuple[Part, ...]:
    """Return the parts that a block of text, an image or a document is."""
    if block["type"] == "text":
        return _parsed({"type": "text", "text": block.get("text")}, place, "text")
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or not isinstance(kind, str) or kind not in _FIELDS:
        _bad(
            f"{place}.source.type must be one of {', '.join(_FIELDS)}, got {abbreviate(kind)}",
            f"{place}.source.type" if isinstance(source, Mapping) else f"{place}.source",
        )
    part = _media_part(block["type"], kind, source, f"{place}.source")
    return _parsed(part, place, f"source.{_FIELDS[kind]}")


def _parsed(part: dict[str, Any] | str, place: str, field: str) -> tuple[Part, ...]:
    """Return the parts of a chat's part that was made of the field of a block."""
    at = f"{place}.{field}"
    with located(rename=lambda inner: at if inner.startswith(f"{place}[0]") else inner):
        parts = parse_parts([part], place)
    return tuple(
        dataclasses.replace(found, param=at) if isinstance(found, MediaRef | FileRef) else found
        for found in parts
    )


def _media_part(
    block: str, kind: str, source: Mapping[str, Any], place: str
) -> dict[str, Any] | str:
    """Return the part of a chat that a source is."""
    if block == "image":
        if kind == "base64":
            media = _string(source, "media_type", place)
            url = f"data:{media};base64,{_string(source, 'data', place)}"
            return {"type": "image_url", "image_url": url}
        if kind == "url":
            return {"type": "image_url", "image_url": _string(source, "url", place)}
        if kind == "file":
            return {"type": "input_image", "file_id": _string(source, "file_id", place)}
        _bad(f"{place}.type of an image must be base64, url or file, got {kind!r}", f"{place}.type")
    if kind == "base64":
        media = _string(source, "media_type", place)
        data = f"data:{media};base64,{_string(source, 'data', place)}"
        return {"type": "input_file", "file_data": data, "filename": "document"}
    if kind == "url":
        return {"type": "input_file", "file_url": _string(source, "url", place)}
    if kind == "file":
        return {"type": "input_file", "file_id": _string(source, "file_id", place)}
    if kind == "text":
        return _string(source, "data", place, empty=True)
    return _bad(f"{place}.type of a document must be base64, url, file or text", f"{place}.type")


def _call(block: Mapping[str, Any], place: str) -> ToolCall:
    given = block.get("input")
    if not isinstance(given, Mapping):
        _bad(f"{place}.input must be an object, got {abbreviate(given)}", f"{place}.input")
    return ToolCall(
        _string(block, "id", place),
        _string(block, "name", place),
        parse_arguments(given, f"{place}.input"),
    )


def _string(value: Mapping[str, Any], name: str, place: str, *, empty: bool = False) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not (found or empty):
        what = "is required" if found is None else f"must be a string, got {abbreviate(found)}"
        _bad(f"{place}.{name} {what}", f"{place}.{name}")
    return found


def _bad(message: str, param: str) -> NoReturn:
    raise InvalidRequestError(message if message[-1] in ".?" else f"{message}.", param=param)
