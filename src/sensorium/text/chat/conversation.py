"""Conversations: messages of text and media references, parsed from OpenAI's form."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError
from sensorium.multimodal.items import FileRef, MediaRef
from sensorium.multimodal.parse.files import FILE_PART_TYPES, file_from_part, is_file_part
from sensorium.multimodal.parse.messages import MEDIA_PART_TYPES, media_part_type, ref_from_part

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "query", "document")
"""Roles that templates commonly know. Others are passed on for the template to decide."""

TEXT_PART_TYPES = ("text", "input_text", "output_text", "refusal")

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

MAX_MESSAGES = 16384
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message."""

    text: str


Part = TextPart | MediaRef | FileRef


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant. ``arguments`` is a mapping, or text that is no JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any] | str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``is_string``: its content was a string (or missing), not a list of parts."""

    role: str
    parts: tuple[Part, ...] = ()
    is_string: bool = True
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """Texts of the message, joined by line breaks."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and the references to their media items, in order.

    ``files`` must have become media items before a template renders the conversation.
    """

    messages: tuple[Message, ...]
    refs: tuple[MediaRef, ...] = field(init=False)
    files: tuple[FileRef, ...] = field(init=False)

    def __post_init__(self) -> None:
        refs = tuple(p for m in self.messages for p in m.parts if isinstance(p, MediaRef))
        object.__setattr__(self, "refs", refs)
        files = tuple(p for m in self.messages for p in m.parts if isinstance(p, FileRef))
        object.__setattr__(self, "files", files)

    def with_files(self, given: Sequence[Sequence[Part]]) -> Conversation:
        """Return the conversation with other parts in the place of each of ``files``."""
        places = iter(given)
        messages = [
            dataclasses.replace(
                message,
                parts=tuple(
                    new
                    for part in message.parts
                    for new in (next(places) if isinstance(part, FileRef) else (part,))
                ),
            )
            for message in self.messages
        ]
        return Conversation(tuple(messages))


def parse_messages(
    messages: Sequence[Mapping[str, Any]], *, param: str = "messages"
) -> Conversation:
    """Parse messages in OpenAI's form.

    Raises InvalidRequestError with the place of the mistake (``messages[0].content[1].type``).
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        _bad(f"must be a list of messages, got {type(messages).__name__}", param)
    if not messages:
        _bad("is empty; send at least one message", param)
    _refuse_many(len(messages), param)
    parsed = [_message(m, f"{param}[{i}]") for i, m in enumerate(messages)]
    return checked_conversation(parsed, [f"{param}[{i}]" for i in range(len(parsed))], param=param)


def checked_conversation(
    messages: Sequence[Message], places: Sequence[str], *, param: str
) -> Conversation:
    """Return the conversation of messages that were parsed from another form than OpenAI's.

    ``places`` are the messages' own, ``param`` is the place of all of them. Raises
    InvalidRequestError.
    """
    _refuse_many(len(messages), param)
    with_embeds = [
        i
        for i, message in enumerate(messages)
        if any(isinstance(part, MediaRef) and part.kind == "embeds" for part in message.parts)
    ]
    if len(with_embeds) > 1:
        _bad(
            "has precomputed embeddings, as an earlier message has; only one message of a "
            "conversation may have them",
            f"{places[with_embeds[1]]}.content",
        )
    return Conversation(tuple(messages))


def _refuse_many(num_messages: int, param: str) -> None:
    if num_messages > MAX_MESSAGES:
        _bad(f"has {num_messages} messages; at most {MAX_MESSAGES} are allowed", param)


def texts_of(conversation: Conversation, *more: Any) -> Iterator[str]:
    """Yield all texts of a conversation and of the plain data in ``more``."""
    for message in conversation.messages:
        yield from (part.text for part in message.parts if isinstance(part, TextPart))
        yield from (
            text for text in (message.name, message.tool_call_id, message.reasoning) if text
        )
        for call in message.tool_calls:
            yield from _strings((call.id, call.name, call.arguments))
    yield from _strings(more)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _message(message: Mapping[str, Any], param: str) -> Message:
    if not isinstance(message, Mapping):
        _bad(f"must be an object with 'role' and 'content', got {type(message).__name__}", param)
    role = message.get("role")
    if not isinstance(role, str) or _ROLE.fullmatch(role) is None:
        _bad(
            f"must be a role such as {', '.join(ROLES)}, or another name of up to 64 letters, "
            f"digits, '_', '-' and '.' that the chat template knows; got {role!r:.80}",
            f"{param}.role",
        )
    content = message.get("content")
    calls = message.get("tool_calls") or ()
    if content is None and not calls and role != "assistant":
        _bad("is missing", f"{param}.content")
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    return Message(
        role=role,
        parts=parse_parts(content, f"{param}.content"),
        is_string=content is None or isinstance(content, str),
        name=_text(message.get("name"), f"{param}.name"),
        tool_calls=_tool_calls(calls, f"{param}.tool_calls"),
        tool_call_id=_text(message.get("tool_call_id"), f"{param}.tool_call_id"),
        reasoning=_text(reasoning, f"{param}.reasoning"),
    )


def parse_parts(content: object, param: str) -> tuple[Part, ...]:
    """Parse the content of a message: a string or a list of parts. Raises InvalidRequestError."""
    if content is None or content == "":
        return ()
    if isinstance(content, str):
        return (TextPart(_text(content, param) or ""),)
    if not isinstance(content, list | tuple):
        _bad(f"must be a string or a list of parts, got {type(content).__name__}", param)
    return tuple(_part(part, f"{param}[{i}]") for i, part in enumerate(content))


def _part(part: object, param: str) -> Part:
    if isinstance(part, str):
        return TextPart(_text(part, param) or "")
    if not isinstance(part, Mapping):
        _bad(f"must be an object with a 'type', got {type(part).__name__}", param)
    if is_file_part(part):
        return file_from_part(part, param)
    if media_part_type(part) is not None:
        return ref_from_part(part, param)
    kind = part.get("type")
    if kind is None:
        key = next((key for key in TEXT_PART_TYPES if key in part), None)
        if key is None:
            _bad("has no 'type' and no known key", f"{param}.type")
    elif kind in TEXT_PART_TYPES:
        key = "refusal" if kind == "refusal" else "text"
    else:
        known = [*TEXT_PART_TYPES, *MEDIA_PART_TYPES, *FILE_PART_TYPES]
        near = suggestion(str(kind)[:80], known)
        _bad(
            f"Unknown type of content part {kind!r:.80}; known are {', '.join(known)}.{near}",
            f"{param}.type",
        )
    text = part.get(key)
    if not isinstance(text, str):
        _bad(f"must be a string, got {type(text).__name__}", f"{param}.{key}")
    return TextPart(_text(text, f"{param}.{key}") or "")


def _tool_calls(calls: object, param: str) -> tuple[ToolCall, ...]:
    if not isinstance(calls, list | tuple):
        _bad(f"must be a list, got {type(calls).__name__}", param)
    return tuple(_tool_call(call, f"{param}[{i}]") for i, call in enumerate(calls))


def _tool_call(call: object, param: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        _bad("must be an object with 'function'", param)
    name = _text(function.get("name"), f"{param}.function.name")
    if not name:
        _bad("is missing", f"{param}.function.name")
    place = f"{param}.function.arguments"
    return ToolCall(
        id=_text(call.get("id"), f"{param}.id") or "",
        name=name,
        arguments=parse_arguments(function.get("arguments"), place),
    )


def parse_arguments(arguments: object, param: str) -> Mapping[str, Any] | str:
    """Return arguments as the object that templates expect; text that is no object stays text."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, Mapping):
        return _plain_mapping(arguments, param)
    text = _text(arguments, param) or ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _plain_mapping(value, param) if isinstance(value, Mapping) else text


def _plain_mapping(value: Mapping[Any, Any], param: str) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], plain_data(value, param))


def plain_data(value: Any, param: str, depth: int = 0) -> Any:
    """Return a copy of ``value`` of plain JSON types, the only ones that templates get.

    Raises InvalidRequestError for other types, lone surrogates, and nesting deeper than
    ``MAX_DEPTH``.
    """
    if depth > MAX_DEPTH:
        _bad(f"is nested deeper than {MAX_DEPTH} levels", param)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, param)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {
            _text(key, param): plain_data(item, param, depth + 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_data(item, param, depth + 1) for item in value]
    return _bad(f"must hold JSON values only, got {type(value).__name__}", param)


def _text(value: object, param: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        _bad(f"must be a string, got {type(value).__name__}", param)
    try:
        value.encode()
    except UnicodeEncodeError:
        _bad("contains a lone surrogate, which is not valid Unicode", param)
    return str(value)


def _bad(message: str, param: str) -> NoReturn:
    if message[0].islower():
        message = f"{param} {message}"
    raise InvalidRequestError(
        message if message.endswith((".", "?")) else f"{message}.", param=param
    )
