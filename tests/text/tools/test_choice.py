"""Tools are checked, and calls are forced by schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium.errors import InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import compile_grammar
from sensorium.text.tools.choice import ToolChoice, parse_tool_choice, parse_tools
from sensorium.text.tools.forced import MAX_CALLS, forced_call

POINT = {
    "type": "object",
    "properties": {"p": {"$ref": "#/$defs/P"}},
    "$defs": {"P": {"type": "integer"}},
}
TOOLS = parse_tools(
    [
        {"type": "function", "function": {"name": "f", "parameters": POINT}},
        {"function": {"name": "g", "description": "no parameters"}},
    ]
)


def test_tools_may_define_different_things_by_one_name() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {**POINT, "$defs": {"P": {"type": kind}}}
        return {"function": {"name": name, "parameters": parameters}}

    call = forced_call(
        ToolChoice("required"), parse_tools([tool("f", "string"), tool("g", "null")])
    )
    assert call is not None
    text = json.dumps(call.constraint["json"])
    places = [f"#/items/anyOf/{i}/properties/parameters/$defs/P" for i in range(2)]
    assert all(place in text for place in places)
    assert compile_grammar(StructuredOutputs(json=call.constraint["json"])).relaxed == ()


def test_arguments_are_an_object_and_calls_are_bounded() -> None:
    tools = parse_tools([{"function": {"name": "f", "parameters": {"description": "any"}}}])
    named, required = (forced_call(ToolChoice(mode, "f"), tools) for mode in ("named", "required"))
    assert named is not None
    assert named.constraint["json"]["type"] == "object"
    assert required is not None
    assert required.constraint["json"]["maxItems"] == MAX_CALLS
    assert required.param == "tools[0].function.parameters"


def test_choices() -> None:
    assert parse_tool_choice(None, TOOLS).mode == "auto"
    assert parse_tool_choice(None, []).mode == "none"
    assert parse_tool_choice("auto", []).mode == "none"
    named = parse_tool_choice({"type": "function", "function": {"name": "g"}}, TOOLS)
    assert named == ToolChoice("named", "g")
    for bad in ("sometimes", {"function": {"name": "h"}}, {}, 3):
        with pytest.raises(InvalidRequestError):
            parse_tool_choice(bad, TOOLS)
    with pytest.raises(InvalidRequestError, match="no tools"):
        parse_tool_choice("required", [])


def test_forced_calls_compile() -> None:
    assert forced_call(ToolChoice("auto"), TOOLS) is None
    required = forced_call(ToolChoice("required"), TOOLS, parallel=False)
    assert required is not None
    assert required.constraint["json"]["maxItems"] == 1
    assert required.param == "tools"
    named = forced_call(ToolChoice("named", "f"), TOOLS)
    assert named is not None
    assert named.constraint["json"] == POINT
    assert named.param == "tools[0].function.parameters"
    for call in (required, named, forced_call(ToolChoice("named", "g"), TOOLS)):
        assert call is not None
        assert compile_grammar(StructuredOutputs(json=call.constraint["json"])).relaxed == ()


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ([1], "tools[0]"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "tools[0].type"),
        ([{"function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
        ([{"function": {"name": "f"}}] * 2, "tools[1].function.name"),
        ([{"function": {"name": "f", "x": object()}}], "tools[0].function"),
        ([{"function": {"name": f"f{i}"}} for i in range(300)], "tools"),
    ],
)
def test_bad_tools(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_tools(tools)
    assert caught.value.param == param
    assert parse_tools(None) == []


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools", "allowed_tools": {"mode": "MODE", "tools": [{"type": "function", "function": {"name": "g"}}]}},
        {"type": "allowed_tools", "mode": "MODE", "tools": [{"type": "function", "name": "g"}]},
    ],
    ids=["chat", "responses"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_some_of_the_tools_are_allowed(choice: dict[str, Any], mode: str) -> None:
    found = parse_tool_choice(json.loads(json.dumps(choice).replace("MODE", mode)), TOOLS)
    assert (found.mode, found.allowed) == (mode, frozenset("g"))
    assert [tool["function"]["name"] for tool in found.among(TOOLS)] == ["g"]


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"mode": "none", "tools": [{"name": "f"}]}, "tool_choice.mode"),
        ({"mode": "auto", "tools": []}, "tool_choice.tools"),
        ({"mode": "auto", "tools": [{"name": "f"}, {"name": "h"}]}, "tool_choice.tools[1].name"),
        ({"mode": "auto", "tools": ["f"]}, "tool_choice.tools[0]"),
        ({"allowed_tools": 3}, "tool_choice.allowed_tools"),
        ({"allowed_tools": {"tools": [{"function": {"name": 3}}]}}, "tool_choice.allowed_tools.tools[0].function.name"),
    ],
)  # fmt: skip
def test_bad_choices_among_tools(choice: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_tool_choice({"type": "allowed_tools", **choice}, TOOLS)
    assert caught.value.param == param
