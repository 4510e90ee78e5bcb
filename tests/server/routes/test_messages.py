"""POST /v1/messages: Anthropic's shapes and events, as the official client takes them."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import TypeAdapter

from sensorium.errors import EngineDeadError, PromptTooLongError
from tests.server.fake_frontend import TOKENIZER, FakeFrontend, fail
from tests.server.harness import USER, Answer, App, running

if TYPE_CHECKING:
    from anthropic.types import Message

REPLY = "Hello, world!"
NUM_TOKENS = len(TOKENIZER.encode(REPLY))
WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Oslo"}}</tool_call>'
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


async def ask(app: App, **body: Any) -> Answer:
    """The answer to a request."""
    return await app.post("/v1/messages", {"messages": USER, "max_tokens": 256, **body})


@cache
def event_reader() -> TypeAdapter[Any]:
    """What reads an event of a stream as the official client does, whose import takes seconds."""
    from anthropic.types import RawMessageStreamEvent

    return TypeAdapter(RawMessageStreamEvent)


def parsed(answer: Answer) -> Message:
    """The message, as the official client's model takes it."""
    from anthropic.types import Message

    assert answer.status == 200, answer.body
    return Message.model_validate(answer.json())


def events_of(answer: Answer) -> list[Any]:
    """The events of a stream, each valid and named by its type; pings are left out."""
    assert answer.status == 200, answer.body
    events = []
    for block in (block for block in answer.body.decode().split("\n\n") if block):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        if value["type"] != "ping":
            events.append(event_reader().validate_python(value))
    return events


def error_of(answer: Answer) -> dict[str, Any]:
    """The error, in Anthropic's shape."""
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["x-request-id"]
    return body["error"]


async def test_a_message_has_anthropics_shape() -> None:
    app = App(FakeFrontend(num_cached_tokens=1))
    message = parsed(await ask(app, system="Be brief.", top_k=3, stop_sequences=["x"]))
    assert message.id.startswith("msg_")
    assert [block.model_dump(exclude_none=True) for block in message.content] == [
        {"type": "text", "text": REPLY}
    ]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    num_prompt = len(TOKENIZER.encode("Be brief.Hi"))
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt - 1, 1)
    assert usage.output_tokens == NUM_TOKENS
    call = app.frontend.calls[-1]
    assert [m.role for m in call.prompt.conversation.messages] == ["system", "user"]
    assert (call.params.max_tokens, call.params.top_k, call.params.stop) == (256, 3, ("x",))


async def test_a_stream_has_the_events_of_a_message_in_order() -> None:
    events = events_of(await ask(App(), stream=True))
    kinds = [event.type for event in events]
    pieces = kinds.count("content_block_delta")
    assert kinds == [
        *("message_start", "content_block_start", *["content_block_delta"] * pieces),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert "".join(event.delta.text for event in events[2 : 2 + pieces]) == REPLY
    assert events[0].message.content == []
    assert events[0].message.usage.input_tokens == len(TOKENIZER.encode("Hi"))
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == NUM_TOKENS


async def test_tools_are_used_in_blocks() -> None:
    app = App(FakeFrontend(reply=f"Well. {CALL}"))
    message = parsed(await ask(app, tools=[WEATHER]))
    assert message.stop_reason == "tool_use"
    text, use = message.content
    assert text.text == "Well."
    assert (use.type, use.name, use.input) == ("tool_use", "weather", {"place": "Oslo"})
    [tool] = app.frontend.calls[-1].prompt.tools
    assert tool["function"]["parameters"] == WEATHER["input_schema"]
    events = events_of(await ask(app, tools=[WEATHER], stream=True))
    begun = [event for event in events if event.type == "content_block_start"]
    assert [event.content_block.type for event in begun] == ["text", "tool_use"]
    assert begun[1].content_block.input == {}
    text = "".join(
        event.delta.partial_json
        for event in events
        if event.type == "content_block_delta" and event.delta.type == "input_json_delta"
    )
    assert json.loads(text) == {"place": "Oslo"}
    assert events[-2].delta.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        ({"type": "any"}, "json"),
        ({"type": "tool", "name": "weather"}, "json"),
        ({"type": "auto"}, None),
        ({"type": "none"}, None),
    ],
)
async def test_a_choice_of_tools_is_chats(choice: dict[str, Any], mode: str | None) -> None:
    app = App()
    parsed(await ask(app, tools=[WEATHER], tool_choice=choice))
    constraint = app.frontend.calls[-1].params.structured_outputs
    assert (constraint is None) == (mode is None)


async def test_blocks_become_the_conversation_that_they_mean() -> None:
    app = App()
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"place": "Oslo"}}
    image = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
    }
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "rain"}, image],
    }
    linked = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    thought = {"type": "thinking", "thinking": "Look.", "signature": ""}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Well."}, use]},
        {"role": "user", "content": [result, linked, {"type": "text", "text": "And?"}]},
    ]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    parsed(await ask(app, messages=messages, system=system, tools=[WEATHER]))
    found = app.frontend.calls[-1].prompt.conversation.messages
    roles = ["system", "user", "assistant", "tool", "user"]
    assert [message.role for message in found] == roles
    assert (found[2].text, found[2].reasoning) == ("Well.", "Look.")
    assert dict(found[2].tool_calls[0].arguments) == {"place": "Oslo"}
    assert (found[3].tool_call_id, found[3].text) == ("t1", "rain")
    assert found[3].parts[1].param == "messages[2].content[0].content[1].source.data"
    assert found[4].parts[0].param == "messages[2].content[1].source.url"
    assert found[4].text == "And?"


async def test_the_last_message_of_the_assistant_is_continued() -> None:
    app = App()
    prefilled = [*USER, {"role": "assistant", "content": "Once"}]
    parsed(await ask(app, messages=prefilled))
    prompt = app.frontend.calls[-1].prompt
    assert prompt.continue_final_message
    assert not prompt.add_generation_prompt


async def test_thinking_is_a_variable_of_the_template() -> None:
    app = App()
    for thinking, wanted in (
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        (None, {}),
    ):
        parsed(await ask(app, thinking=thinking))
        assert app.frontend.calls[-1].prompt.chat_template_kwargs == wanted


async def test_structured_text_is_a_constraint() -> None:
    app = App()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    parsed(await ask(app, output_config={"format": {"type": "json_schema", "schema": schema}}))
    assert app.frontend.calls[-1].params.structured_outputs.json == schema


async def test_the_reason_to_stop_is_told() -> None:
    message = parsed(await ask(App(), max_tokens=2))
    assert message.stop_reason == "max_tokens"


async def test_a_call_that_was_cut_off_is_no_reason_to_stop() -> None:
    reply = CALL.removesuffix("}}</tool_call>")
    message = parsed(await ask(App(FakeFrontend(reply=reply)), tools=[WEATHER]))
    assert "tool_use" not in [block.type for block in message.content]
    assert message.stop_reason == "end_turn"
    streamed = await ask(App(FakeFrontend(reply=reply)), tools=[WEATHER], stream=True)
    assert events_of(streamed)[-2].delta.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].source",
        ),
        *(
            (
                {"messages": [{"role": "user", "content": [{"type": kind, "source": source}]}]},
                "messages[0].content[0].source.type",
            )
            for kind in ("image", "document")
            for source in ({"type": []}, {"type": {}})
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"name": "?", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "x", "input_schema": 1}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"temperature": -1}, "temperature"),
    ],
)
async def test_what_is_wrong_is_named_in_the_words_of_this_api(
    body: dict[str, Any], param: str
) -> None:
    answer = await ask(App(), **body)
    assert answer.status == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0] == param.split("[")[0]
    assert error["param"].startswith(param)
    for name in ("max_completion_tokens", "response_format", ".function"):
        assert name not in error["message"]


async def test_errors_have_anthropics_shape_wherever_they_come_from() -> None:
    too_long = FakeFrontend(before=fail(PromptTooLongError("too long", param="messages")))
    assert error_of(await ask(App(too_long)))["code"] == "context_length_exceeded"
    wrong_model = error_of(await ask(App(), model="claude"))
    assert (wrong_model["type"], wrong_model["code"]) == ("not_found_error", "model_not_found")
    assert error_of(await App().get("/v1/messages"))["code"] == "method_not_allowed"
    small = await ask(App(max_body_bytes=10))
    assert (small.status, error_of(small)["type"]) == (413, "request_too_large")
    keyless = await ask(App(api_key=("right",)))
    assert (keyless.status, error_of(keyless)["type"]) == (401, "authentication_error")
    dead = FakeFrontend(between=fail(EngineDeadError("The engine died.")))
    assert error_of(await ask(App(dead)))["type"] == "overloaded_error"
    streamed = (await ask(App(dead), stream=True)).body.decode().strip().split("\n\n")[-1]
    name, data = streamed.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == "The engine died."


async def test_the_key_may_be_in_a_header_of_its_own_on_these_paths_alone() -> None:
    app = App(api_key=("right",))
    body = {"messages": USER, "max_tokens": 5}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        sent = {k: v for k, v in body.items() if k == "messages" or path == "/v1/messages"}
        assert (await app.post(path, sent, {"x-api-key": "right"})).status == 200
        assert (await app.post(path, sent, {"x-api-key": "wrong"})).status == 401
        assert (await app.post(path, sent, {"authorization": "Bearer right"})).status == 200
    chat = await app.post("/v1/chat/completions", {"messages": USER}, {"x-api-key": "right"})
    assert chat.status == 401


async def test_tokens_are_counted() -> None:
    from anthropic.types import MessageTokensCount

    app = App()
    body = {"messages": USER, "system": "Yo", "model": "demo"}
    counted = MessageTokensCount.model_validate(
        (await app.post("/v1/messages/count_tokens", body)).json()
    )
    assert counted.input_tokens == len(TOKENIZER.encode("YoHi"))
    assert app.frontend.calls == []


async def test_the_official_client_streams_and_uses_tools() -> None:
    from anthropic import APIStatusError, AsyncAnthropic, AuthenticationError

    async with running(FakeFrontend(reply=f"Well. {CALL}"), api_key=("right",)) as server:
        client = AsyncAnthropic(base_url=server.base_url, api_key="right", max_retries=0)
        asked: Any = {"model": "demo", "max_tokens": 256, "messages": USER, "tools": [WEATHER]}
        async with client.messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "Well."
        assert final.content[1].input == {"place": "Oslo"}
        assert final.stop_reason == "tool_use"
        counted = await client.messages.count_tokens(model="demo", messages=USER)
        assert counted.input_tokens == len(TOKENIZER.encode("Hi"))
        with pytest.raises(APIStatusError) as refused:
            await client.messages.create(model="claude", max_tokens=1, messages=USER)
        assert refused.value.status_code == 404
        await client.close()
        stranger = AsyncAnthropic(base_url=server.base_url, api_key="wrong", max_retries=0)
        with pytest.raises(AuthenticationError):
            await stranger.messages.create(model="demo", max_tokens=1, messages=USER)
        await stranger.close()


async def test_documents_are_files_or_text() -> None:
    app = App()
    sources = [
        {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"},
        {"type": "url", "url": "https://example.com/a.pdf"},
        {"type": "text", "media_type": "text/plain", "data": "hello"},
    ]
    blocks = [{"type": "document", "source": source} for source in sources]
    parsed(await ask(app, messages=[{"role": "user", "content": blocks}]))
    [message] = app.frontend.calls[-1].prompt.conversation.messages
    assert [part.param for part in message.parts[:2]] == [
        "messages[0].content[0].source.data",
        "messages[0].content[1].source.url",
    ]
    assert message.text == "hello"
    for kind in ("document", "image"):
        block = {"type": kind, "source": {"type": "file", "file_id": "file-0"}}
        answer = await ask(app, messages=[{"role": "user", "content": [block]}])
        error = error_of(answer)
        assert (answer.status, error["param"]) == (404, "messages[0].content[0].source.file_id")
