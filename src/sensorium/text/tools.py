"""Tools: checking them, forcing a call by a grammar, and reading calls out of generated text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

from sensorium.errors import InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.conversation import plain_data

MAX_TOOLS = 256
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the caller asked for: no call, the model's choice, at least one call, or a call of
    ``name``."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer outside of tool calls."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call ``index``: ``id`` and ``name`` come once, at its beginning; ``arguments``
    are JSON text to append."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Delta = ContentDelta | ToolCallDelta


class ToolCallReader(Protocol):
    """Turns generated text into deltas."""

    def feed(self, text: str) -> list[Delta]:
        """What new text completes."""
        ...

    def flush(self) -> list[Delta]:
        """The rest, when the generation has ended."""
        ...


def parse_tools(tools: object, *, param: str = "tools") -> list[dict[str, Any]]:
    """Tools in OpenAI's form, checked, out of plain JSON values. Raises InvalidRequestError with
    the place."""
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        _bad(f"must be a list, got {type(tools).__name__}", param)
    if len(tools) > MAX_TOOLS:
        _bad(f"has {len(tools)} entries; at most {MAX_TOOLS} are allowed", param)
    parsed = [_tool(tool, f"{param}[{i}]") for i, tool in enumerate(tools)]
    seen: set[str] = set()
    for i, tool in enumerate(parsed):
        name = tool["function"]["name"]
        if name in seen:
            _bad(f"is a second tool named {name!r}", f"{param}[{i}].function.name")
        seen.add(name)
    return parsed


def _tool(tool: object, param: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        _bad("must be an object with 'type': 'function' and 'function'", param)
    if tool.get("type", "function") != "function":
        _bad(f"must be 'function', got {tool.get('type')!r:.80}", f"{param}.type")
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _bad(
            f"must be 1 to 64 letters, digits, underscores, dots or hyphens, got {name!r:.80}",
            f"{param}.function.name",
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        _bad("must be a JSON schema (an object)", f"{param}.function.parameters")
    return {"type": "function", "function": plain_data(dict(function), f"{param}.function")}


def parse_tool_choice(
    choice: object, tools: Sequence[Mapping[str, Any]], *, param: str = "tool_choice"
) -> ToolChoice:
    """OpenAI's ``tool_choice``; None is ``auto`` with tools and ``none`` without. Raises
    InvalidRequestError."""
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if choice in ("none", "auto", "required"):
        if choice == "required" and not tools:
            _bad("is 'required', but there are no tools", param)
        mode = "none" if not tools else choice
        return ToolChoice(mode)  # type: ignore[arg-type]
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        _bad("must be 'none', 'auto', 'required' or an object that names a function", param)
    if name not in [tool["function"]["name"] for tool in tools]:
        _bad(f"names {name!r:.80}, which is not among the tools", f"{param}.function.name")
    return ToolChoice("named", name)


def forced_call(
    choice: ToolChoice, tools: Sequence[Mapping[str, Any]], *, parallel: bool = True
) -> StructuredOutputs | None:
    """The constraint that makes the model call: for ``named`` the arguments, for ``required`` a
    list of ``{"name", "parameters"}``; None when nothing is forced."""
    if choice.mode == "named":
        tool = next(t for t in tools if t["function"]["name"] == choice.name)
        return StructuredOutputs(json=_arguments_schema(tool))
    if choice.mode != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "parameters": _arguments_schema(tool),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return StructuredOutputs(json=_with_hoisted_definitions(schema, tools))


def _arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool["function"].get("parameters")
    return dict(schema) if schema else {"type": "object"}


def _with_hoisted_definitions(
    schema: dict[str, Any], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """References such as ``#/$defs/Point`` count from the root, so the tools' definitions move
    there."""
    for key in ("$defs", "definitions"):
        merged: dict[str, Any] = {}
        for tool in tools:
            merged |= (tool["function"].get("parameters") or {}).get(key) or {}
        if merged:
            schema[key] = merged
    return schema


def reader_for(choice: ToolChoice) -> ToolCallReader:
    """What reads the text that a model generates under ``choice``."""
    if choice.mode == "named" and choice.name is not None:
        return NamedCallReader(choice.name)
    if choice.mode == "required":
        return CallListReader()
    return ToolCallParser()


class ToolCallParser:
    """Calls in the form of Hermes and Qwen: ``<tool_call>{"name": …, "arguments":
    {…}}</tool_call>`` amid text.

    A call is reported when it is complete. What looks like one but is no such JSON is given back
    as text. White space alone before, between and after calls is dropped."""

    def __init__(self) -> None:
        self._buffer = ""
        self._searched = 0  # how much of the buffer holds no closing tag for sure
        self._inside = False
        self._num_calls = 0
        self._blank = ""

    def feed(self, text: str) -> list[Delta]:
        """What new text completes."""
        self._buffer += text
        out: list[Delta] = []
        while self._advance(out):
            pass
        return out

    def flush(self) -> list[Delta]:
        """The rest: an unclosed call counts if its JSON is complete."""
        out: list[Delta] = []
        rest, self._buffer = self._buffer, ""
        if self._inside:
            self._call(rest, "", out)
        elif rest:
            self._text(rest, out)
        if self._blank and not self._num_calls:
            out.append(ContentDelta(self._blank))
        self._inside, self._blank = False, ""
        return out

    def _advance(self, out: list[Delta]) -> bool:
        tag = _CLOSE if self._inside else _OPEN
        at = self._buffer.find(tag, self._searched)
        if at >= 0:
            before, self._buffer = self._buffer[:at], self._buffer[at + len(tag) :]
            self._searched = 0
            if self._inside:
                self._call(before, _CLOSE, out)
            elif before:
                self._text(before, out)
            self._inside = not self._inside
            return True
        if self._inside:
            self._searched = max(0, len(self._buffer) - len(tag) + 1)
            return False
        safe = len(self._buffer) - _num_partial(self._buffer, tag)
        if safe:
            self._text(self._buffer[:safe], out)
            self._buffer = self._buffer[safe:]
        return False

    def _text(self, text: str, out: list[Delta]) -> None:
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept:
            out.append(ContentDelta(kept))

    def _call(self, body: str, close: str, out: list[Delta]) -> None:
        call = _parsed_call(body)
        if call is None:
            self._text(f"{_OPEN}{body}{close}", out)
            return
        self._blank = ""
        name, arguments = call
        out.append(ToolCallDelta(self._num_calls, arguments, new_call_id(), name))
        self._num_calls += 1


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
        """A call without arguments, if nothing was generated."""
        return self.feed("{}") if self._name else []


class CallListReader:
    """The text is a JSON list of ``{"name", "parameters"}`` (``tool_choice`` is ``required``);
    each call is reported when it is complete. Text that is no such list comes back as text."""

    def __init__(self) -> None:
        self._call: list[str] = []  # in pieces: text that grows by characters is copied each time
        self._depth = 0
        self._in_string = self._escaped = False
        self._num_calls = 0
        self._seen: list[str] = []

    def feed(self, text: str) -> list[Delta]:
        """The calls that new text completes."""
        out: list[Delta] = []
        self._seen.append(text)
        for char in text:
            if self._depth >= 2:
                self._call.append(char)
            self._step(char)
            if self._depth == 2 and not self._call:
                self._call.append(char)
            elif self._depth == 1 and self._call:
                call = _parsed_call("".join(self._call))
                if call is not None:
                    out.append(ToolCallDelta(self._num_calls, call[1], new_call_id(), call[0]))
                    self._num_calls += 1
                self._call.clear()
        return out

    def flush(self) -> list[Delta]:
        """The text itself, if it held no call."""
        seen = "".join(self._seen)
        return [ContentDelta(seen)] if seen and not self._num_calls else []

    def _step(self, char: str) -> None:
        """Follow strings and brackets."""
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
            self._depth += 1
        elif char in "]}":
            self._depth -= 1


def new_call_id() -> str:
    """An id for a tool call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def _parsed_call(body: str) -> tuple[str, str] | None:
    """Name and arguments (JSON text) of a call, or None when it is not one."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        return call["name"], arguments
    return call["name"], json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def _num_partial(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    return next(
        (k for k in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:k])), 0
    )


def _bad(what: str, param: str) -> NoReturn:
    raise InvalidRequestError(f"{param} {what}.", param=param)
