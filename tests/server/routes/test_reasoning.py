"""Reasoning and calls are split from the content of chat completions, in the model's forms."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.errors import ConfigError, InvalidRequestError
from tests.server.fake_frontend import FakeFrontend, fail
from tests.server.harness import App

THINKS = "<think>\nTwo and two.\n</think>\n\nFour."
TEMPLATE = "{{ '<think>' }}"
OPENED = [{"role": "user", "content": "2 + 2? <think>\n"}]


def app(reply: str = THINKS, **config: Any) -> App:
    """A server of a model whose template knows reasoning."""
    return App(FakeFrontend(reply=reply, template_text=TEMPLATE), **config)


def joined(answer: Any, name: str) -> str:
    """A member of all deltas of a stream."""
    choices = [choice for event in answer.events() for choice in event["choices"]]
    return "".join(choice["delta"].get(name) or "" for choice in choices)


async def test_reasoning_is_a_member_of_its_own() -> None:
    message = (await app().chat()).json()["choices"][0]["message"]
    assert message["content"] == "Four."
    assert message["reasoning_content"] == message["reasoning"] == "Two and two."
    stream = await app().chat(stream=True)
    assert joined(stream, "content") == "Four."
    assert joined(stream, "reasoning_content") == joined(stream, "reasoning") == "Two and two."


async def test_a_prompt_may_open_it() -> None:
    reply = THINKS.removeprefix("<think>\n")
    for stream in (False, True):
        answer = await app(reply).chat(messages=OPENED, stream=stream)
        if stream:
            assert joined(answer, "reasoning") == "Two and two."
            assert joined(answer, "content") == "Four."
        else:
            message = answer.json()["choices"][0]["message"]
            assert (message["reasoning"], message["content"]) == ("Two and two.", "Four.")


async def test_a_continued_message_may_have_opened_it() -> None:
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo"},
    ]
    answer = await app(" and two.\n</think>\nFour.").chat(
        messages=messages, continue_final_message=True
    )
    message = answer.json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("and two.", "Four.")


async def test_an_answer_that_is_cut_off_is_all_reasoning() -> None:
    answer = (await app("<think>\nTwo and").chat()).json()["choices"][0]
    assert answer["message"]["content"] is None
    assert answer["message"]["reasoning"] == "Two and"


async def test_it_can_be_left_in_the_content_or_out_of_the_answer() -> None:
    message = (await app(reasoning_parser="none").chat()).json()["choices"][0]["message"]
    assert message["content"] == THINKS
    assert "reasoning" not in message
    for stream in (False, True):
        answer = await app().chat(include_reasoning=False, stream=stream)
        if stream:
            assert joined(answer, "content") == "Four."
            assert joined(answer, "reasoning") == ""
        else:
            message = answer.json()["choices"][0]["message"]
            assert message["content"] == "Four."
            assert "reasoning" not in message


async def test_models_without_it_and_constrained_answers_are_not_split() -> None:
    plain = App(FakeFrontend(reply=THINKS))
    assert (await plain.chat()).json()["choices"][0]["message"]["content"] == THINKS
    answer = await app('{"a": 1}').chat(messages=OPENED, response_format={"type": "json_object"})
    assert answer.json()["choices"][0]["message"]["content"] == '{"a": 1}'


async def test_usage_has_the_details() -> None:
    for stream in (False, True):
        answer = await app().chat(stream=stream, stream_options={"include_usage": True}) if stream else await app().chat()  # fmt: skip
        usage = answer.events()[-1]["usage"] if stream else answer.json()["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] >= 0


async def test_unknown_forms_are_refused_at_the_start() -> None:
    for name in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match=f"{name} must be one of auto, none, ") as caught:
            App(**{name: "hermse"})
        assert caught.value.param == name


async def test_some_tools_are_allowed() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "g"}}],
        },
    }
    called = App(FakeFrontend(reply='{"name": "g", "arguments": {}}'))
    answer = (await called.chat(tools=tools, tool_choice=choice)).json()["choices"][0]
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["g"]
    listed = called.frontend.calls[0].prompt.tools
    assert [tool["function"]["name"] for tool in listed] == ["g"]
    answer = (await called.chat(tools=tools, tool_choice="auto")).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    other = App(FakeFrontend(reply='{"name": "f", "arguments": {}}'))
    answer = (await other.chat(tools=tools, tool_choice=choice)).json()["choices"][0]
    assert answer["finish_reason"] == "stop"


async def test_one_call_at_a_time() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
    for parallel, expected in ((True, 2), (False, 1)):
        answer = await App(FakeFrontend(reply=reply)).chat(
            tools=tools, parallel_tool_calls=parallel
        )
        assert len(answer.json()["choices"][0]["message"]["tool_calls"]) == expected


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("f", "g")
]
HERMES_CALL = '<tool_call>\n{"name": "g", "arguments": {"p": 1}}\n</tool_call>'


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
@pytest.mark.parametrize("stream", [False, True])
async def test_demanded_calls_have_the_form_of_the_model(choice: Any, stream: bool) -> None:
    served = App(FakeFrontend(reply=HERMES_CALL, template_text="<tool_call>"))
    answer = await served.chat(tools=TOOLS, tool_choice=choice, stream=stream)
    constraint = served.frontend.calls[0].params.structured_outputs  # type: ignore[union-attr]
    assert constraint is not None
    assert constraint.json is None
    assert constraint.structural_tag is not None
    if stream:
        assert joined(answer, "content") == ""
        choices = [choice for event in answer.events() for choice in event["choices"]]
        pieces = [p for c in choices for p in c["delta"].get("tool_calls", ())]
        assert pieces[0]["function"]["name"] == "g"
        assert "".join(p["function"]["arguments"] for p in pieces) == '{"p": 1}'
    else:
        message = answer.json()["choices"][0]["message"]
        assert message["content"] is None
        [call] = message["tool_calls"]
        assert call["function"] == {"name": "g", "arguments": '{"p": 1}'}


async def test_a_wrong_schema_is_found_among_the_allowed_tools() -> None:
    place = "structured_outputs.structural_tag.format.content.tags[1].content.json_schema"
    error = InvalidRequestError(f"{place} cannot be used.", param=place)
    tools = [*TOOLS, {"type": "function", "function": {"name": "h"}}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "f"}, {"name": "h"}]}
    served = App(FakeFrontend(template_text="<tool_call>", before=fail(error)))
    answer = await served.chat(tools=tools, tool_choice=choice)
    assert answer.error["param"] == "tools[2].function.parameters"
