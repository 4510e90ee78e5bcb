"""What a grammar allows in excess, a small model does.

Schemas of clients are fulfilled, in few tokens, every time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import pytest

from sensorium import LLM, RequestOutput, SamplingParams
from sensorium.errors import InvalidRequestError
from tests.reliability.asking import Service, text

NUM_ASKED = 20


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="demo", num_kv_blocks=2000) as model:
        yield model


def ask(llm: LLM, temperature: float = 1.0, **constraint: Any) -> list[RequestOutput]:
    """The answers to ``NUM_ASKED`` requests that differ by their seed.

    The context is their only limit.
    """
    messages = [{"role": "user", "content": "What is in the picture?"}]
    params = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=None, structured_outputs=constraint
        )
        for seed in range(NUM_ASKED)
    ]
    return llm.chat([messages] * NUM_ASKED, params, use_tqdm=False)


class Shape(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["circle", "square"]
    note: str
    size: float
    count: int


class Scene(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    title: str
    shapes: list[Shape]
    tags: set[str]
    colours: dict[Literal["red", "blue"], int]
    raw: bytes
    matrix: list[list[int]]
    more: Shape | None = None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("model", [Shape, Scene])
def test_every_answer_is_valid(llm: LLM, model: Any, temperature: float) -> None:
    for output in ask(llm, temperature, json=model.model_json_schema()):
        assert output.outputs[0].finish_reason == "stop"
        model.model_validate_json(output.outputs[0].text)


def test_an_object_of_two_fields_costs_few_tokens(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    for output in ask(llm, json=schema):
        assert set(json.loads(output.outputs[0].text)) == {"name", "age"}
        assert len(output.outputs[0].token_ids) < 80


def test_any_json_ends(llm: LLM) -> None:
    for constraint in ({"json_object": True}, {"json": {}}, {"json": {"type": "number"}}):
        for output in ask(llm, **constraint):
            json.loads(output.outputs[0].text)


def test_what_is_not_enforced_is_said(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "title": "said"}
    with caplog.at_level(logging.WARNING):
        outputs = ask(llm, json=schema)
    expected = "structured_outputs.json: not enforced: uniqueItems"
    assert {output.warnings for output in outputs} == {(expected,)}
    assert expected in caplog.messages
    with pytest.raises(InvalidRequestError, match="uniqueItems"):
        ask(llm, json=schema, unsupported="refuse")
    assert ask(llm, regex="a")[0].warnings == ()


PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("max_tokens", [1, 5, None])
def test_required_calls_are_whole_calls(served: Service, max_tokens: int | None) -> None:
    tools = [tool("f", PARAMETERS), tool("g", {"type": "object", "properties": {}})]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        answer = served.ask(
            text("What is in the picture?"),
            tools=tools,
            tool_choice=choice,
            max_tokens=max_tokens,
        )
        [only] = answer.body["choices"]
        calls = only["message"].get("tool_calls") or []
        assert not only["message"]["content"]
        assert bool(calls) is (max_tokens is None)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            assert set(arguments) == ({"a"} if call["function"]["name"] == "f" else set())


def test_messages_name_the_schema_that_was_sent(served: Service) -> None:
    bad = {"type": "zzz"}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": bad}}
    cases: dict[str, dict[str, Any]] = {
        "response_format.json_schema.schema": {"response_format": form},
        "tools[1].function.parameters": {
            "tools": [tool("f", PARAMETERS), tool("g", bad)],
            "tool_choice": "required",
        },
        "tools[0].function.parameters": {
            "tools": [tool("g", bad), tool("f", PARAMETERS)],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
    }
    for place, fields in cases.items():
        answer = served.ask(text("a"), **fields)
        answer.is_refusal(400, "invalid_request", place)
        assert answer.error["message"].startswith(f"{place} cannot be used: Invalid type")
        assert "structured_outputs" not in answer.error["message"]


@pytest.mark.parametrize("value", [r'"\\ud800"', "1e999", "-0\\.1000000000000000000000000001"])
def test_what_a_model_writes_in_a_call_never_fails_the_server(served: Service, value: str) -> None:
    """A client can make any model write what no value of Python's can be written back as."""
    call = rf'<tool_call>[{{]"name": "f", "arguments": [{{]"a": {value}[}}][}}]</tool_call>'
    answer = served.ask(
        text("a"),
        tools=[tool("f", PARAMETERS)],
        tool_choice="auto",
        structured_outputs={"regex": call},
        max_tokens=200,
    )
    assert answer.status == 200
    [made] = answer.body["choices"][0]["message"]["tool_calls"]
    written = value.replace("\\\\", "\\").replace("\\.", ".")
    assert made["function"]["arguments"] == f'{{"a": {written}}}'
