"""Tools of a request and its choice among them, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from sensorium.errors import InvalidRequestError
from sensorium.text.chat.conversation import plain_data
from sensorium.text.tools.deltas import TOOL_NAME

MAX_TOOLS = 256


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tool choice of a request.

    No call, the model's choice, at least one call, or a call of ``name``. ``allowed``: names of the
    only tools that may be called; None for all.
    """

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None
    allowed: frozenset[str] | None = None

    def among(self, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of ``tools`` that may be called."""
        if self.mode == "none":
            return []
        allowed = self.allowed
        return [t for t in tools if allowed is None or t["function"]["name"] in allowed]


def parse_tools(tools: object, *, param: str = "tools") -> list[dict[str, Any]]:
    """Tools in OpenAI's form, checked, out of plain JSON values.

    Raises InvalidRequestError with the place.
    """
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
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
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
    """Parse OpenAI's ``tool_choice``, in the form of chat or of responses.

    None is ``auto`` with tools and ``none`` without. Raises InvalidRequestError.
    """
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if choice in ("none", "auto", "required"):
        if choice == "required" and not tools:
            _bad("is 'required', but there are no tools", param)
        mode = "none" if not tools else choice
        return ToolChoice(mode)  # type: ignore[arg-type]
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(choice, tools, param)
    name, place = _name_in(choice, param)
    if name is None:
        _bad(
            "must be 'none', 'auto', 'required', an object that names a function, or one of type "
            "'allowed_tools'",
            param,
        )
    if name not in [tool["function"]["name"] for tool in tools]:
        _bad(f"names {name!r:.80}, which is not among the tools", place)
    return ToolChoice("named", name)


def _allowed(
    choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], param: str
) -> ToolChoice:
    """Parse a choice among some of the tools."""
    if "allowed_tools" in choice:
        choice, param = choice["allowed_tools"], f"{param}.allowed_tools"
    if not isinstance(choice, Mapping):
        _bad("must be an object with 'mode' and 'tools'", param)
    mode, listed = choice.get("mode", "auto"), choice.get("tools")
    if mode not in ("auto", "required"):
        _bad(f"must be 'auto' or 'required', got {mode!r:.80}", f"{param}.mode")
    if not isinstance(listed, list | tuple) or not 0 < len(listed) <= MAX_TOOLS:
        _bad(f"must be a list of 1 to {MAX_TOOLS} tools", f"{param}.tools")
    known = {tool["function"]["name"] for tool in tools}
    names = []
    for i, entry in enumerate(listed):
        name, place = _name_in(entry, f"{param}.tools[{i}]")
        if name is None or name not in known:
            _bad(f"names {name!r:.80}, which is not among the tools", place)
        names.append(name)
    return ToolChoice(mode, allowed=frozenset(names))


def _name_in(entry: object, param: str) -> tuple[str | None, str]:
    """Return the name in a reference to a function, and its place; None where there is none."""
    if not isinstance(entry, Mapping):
        return None, param
    function = entry.get("function")
    if isinstance(function, Mapping):
        entry, param = function, f"{param}.function"
    name = entry.get("name")
    return (name if isinstance(name, str) else None), f"{param}.name"


def _bad(what: str, param: str) -> NoReturn:
    raise InvalidRequestError(f"{param} {what}.", param=param)
