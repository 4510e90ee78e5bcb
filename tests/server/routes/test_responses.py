"""POST /v1/responses: shapes that the official client's own models accept, events, what is stored."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from sensorium.engine.prompts.types import ChatPrompt
from sensorium.errors import EngineDeadError, PromptTooLongError
from sensorium.server.responses.store import Reading
from tests.server.fake_frontend import TOKENIZER, Call, FakeFrontend, fail, hang
from tests.server.harness import Answer, App, running, until

REPLY = "Hello, world!"
NUM_TOKENS = len(TOKENIZER.encode(REPLY))
EVENT = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Oslo"}}</tool_call>'


async def respond(app: App, value: Any = "Hi", **body: Any) -> Answer:
    """The answer to a request."""
    return await app.post("/v1/responses", {"input": value, **body})


def parsed(answer: Answer) -> Response:
    """The response, as the official client's model takes it."""
    assert answer.status == 200, answer.body
    return Response.model_validate(answer.json())


def events_of(answer: Answer) -> list[Any]:
    """The events of a stream, each valid, named by its type and numbered."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.body.decode().split("\n\n") if block]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        assert set(value) >= {"type", "sequence_number"}
        events.append(EVENT.validate_python(value))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def types_of(events: list[Any]) -> list[str]:
    """The types of events, those in a row once."""
    kinds = [event.type.removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


def messages_of(app: App) -> list[tuple[str, str]]:
    """Roles and texts of the conversation that reached the model last."""
    prompt = app.frontend.calls[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return [(message.role, message.text) for message in prompt.conversation.messages]


async def test_a_response_has_openais_shape() -> None:
    app = App(FakeFrontend(num_cached_tokens=1))
    answer = await respond(app, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    response = parsed(answer)
    assert response.id.startswith("resp_")
    assert response.status == "completed"
    assert response.output_text == REPLY
    assert response.instructions == "Be brief."
    assert response.metadata == {"a": "b"}
    assert (response.temperature, response.top_p) == (0.5, 1.0)
    assert response.usage is not None
    assert response.usage.output_tokens == NUM_TOKENS
    assert response.usage.input_tokens_details.cached_tokens == 1
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.total_tokens == response.usage.input_tokens + NUM_TOKENS
    assert messages_of(app) == [("system", "Be brief."), ("user", "Hi")]


async def test_a_stream_has_the_events_of_a_message_in_order() -> None:
    events = events_of(await respond(App(), stream=True))
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == REPLY
    last = events[-1].response
    assert last.output_text == REPLY
    assert last.output[0] == events[-2].item
    assert last.output[0].status == "completed"


async def test_a_stream_and_a_whole_answer_say_the_same() -> None:
    app = App(FakeFrontend(reply=f"Well. {CALL}"))
    whole = parsed(await respond(app, tools=[WEATHER]))
    streamed = events_of(await respond(app, tools=[WEATHER], stream=True))[-1].response

    def content(response: Response) -> list[dict[str, Any]]:
        return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]

    assert content(whole) == content(streamed)
    assert [item.type for item in whole.output] == ["message", "function_call"]


async def test_calls_of_functions_are_streamed_as_items() -> None:
    events = events_of(await respond(App(FakeFrontend(reply=CALL)), tools=[WEATHER], stream=True))
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    [call] = events[-1].response.output
    assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Oslo"})
    assert call.call_id.startswith("call_")
    assert call.id.startswith("fc_")
    deltas = [event.delta for event in events if event.type.endswith("arguments.delta")]
    assert "".join(deltas) == call.arguments
    assert events[2].item.arguments == ""
    assert events[2].item.status == "in_progress"


async def test_the_limit_of_tokens_makes_it_incomplete() -> None:
    response = parsed(await respond(App(), max_output_tokens=2))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.max_output_tokens == 2
    events = events_of(await respond(App(), max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"


async def test_log_probabilities_come_where_included() -> None:
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    [message] = parsed(await respond(App(), **include)).output
    logprobs = message.content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == REPLY
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    events = events_of(await respond(App(), stream=True, **include))
    pieces = [event for event in events if event.type == "response.output_text.delta"]
    assert sum(len(event.logprobs) for event in pieces) == NUM_TOKENS
    refused = await respond(App(), top_logprobs=2)
    assert refused.error["param"] == "top_logprobs"
    assert parsed(await respond(App())).output[0].content[0].logprobs == []


async def test_items_become_the_conversation_that_they_mean() -> None:
    app = App()
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
            {"type": "reasoning_text", "text": "I must look."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "user", "content": [
            {"type": "input_text", "text": "And here?"},
            {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "low"}]},
    ]  # fmt: skip
    answer = parsed(await respond(app, items))
    messages = app.frontend.calls[-1].prompt.conversation.messages
    assert [message.role for message in messages] == [
        *("developer", "user", "assistant", "tool", "tool", "user")
    ]
    assistant = messages[2]
    assert assistant.text == "Let me see."
    assert assistant.reasoning == "I must look."
    assert [(call.id, dict(call.arguments)) for call in assistant.tool_calls] == [
        ("c1", {"a": 1}),
        ("c2", {}),
    ]
    assert [(m.tool_call_id, m.text) for m in messages[3:5]] == [("c1", "rain"), ("c2", "sun")]
    assert messages[5].parts[1].param == "input[8].content[1].image_url"
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.model_dump()["image_tokens"] == 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": ""}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "n"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": [1]}]}, "input[0].summary[0]"),
        ({"input": [{"role": "user", "content": "x", "id": 3}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": "x", "status": "?"}]}, "input[0].status"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "?"}]}, "tools[0].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"include": ["everything"]}, "include[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"truncation": "middle"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "background"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"n": 2}, "n"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named_in_the_words_of_this_api(
    body: dict[str, Any], param: str
) -> None:
    answer = await App().post("/v1/responses", {"input": "Hi", **body})
    assert answer.status == 400
    assert answer.error["param"] == param, answer.error
    for name in ("messages", "max_completion_tokens", "response_format", ".function"):
        assert name not in answer.error["message"]


async def test_errors_of_the_engine_have_their_own_status_also_in_streams() -> None:
    app = App(FakeFrontend(before=fail(PromptTooLongError("too long", param="messages"))))
    for stream in (False, True):
        answer = await respond(app, stream=stream)
        assert (answer.status, answer.error["param"]) == (400, "input")


async def test_an_error_in_the_middle_of_a_stream_ends_it() -> None:
    frontend = FakeFrontend(between=fail(EngineDeadError("The engine died.")))
    events = events_of(await respond(App(frontend), stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2].code == "engine_unavailable"
    failed = events[-1].response
    assert failed.status == "failed"
    assert failed.error.code == "server_error"
    assert failed.error.message == "The engine died."


async def test_structured_text_is_a_constraint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    app = App()
    response = parsed(await respond(app, text={"format": form}))
    assert app.frontend.calls[-1].params.structured_outputs.json == schema
    assert response.text.format.model_dump(by_alias=True, exclude_none=True)["schema"] == schema
    parsed(await respond(app, text={"format": {"type": "json_object"}}))
    assert app.frontend.calls[-1].params.structured_outputs.json_object


async def test_sampling_values_beyond_openais_work() -> None:
    app = App()
    parsed(await respond(app, top_k=5, seed=7, stop=["x"], reasoning={"effort": "low"}))
    params = app.frontend.calls[-1].params
    assert (params.top_k, params.seed, tuple(params.stop)) == (5, 7, ("x",))
    assert app.frontend.calls[-1].prompt.chat_template_kwargs["reasoning_effort"] == "low"


async def test_a_conversation_goes_on_from_a_stored_response() -> None:
    app = App()
    first = parsed(await respond(app, "My name is Ada.", instructions="Be brief."))
    second = parsed(await respond(app, "Who am I?", previous_response_id=first.id))
    assert second.previous_response_id == first.id
    talk = [("user", "My name is Ada."), ("assistant", REPLY), ("user", "Who am I?")]
    assert messages_of(app) == talk
    await app.request("DELETE", f"/v1/responses/{first.id}")
    parsed(await respond(app, "Again.", previous_response_id=second.id))
    assert messages_of(app) == [*talk, ("assistant", REPLY), ("user", "Again.")]


async def test_a_history_that_goes_while_it_is_continued_is_kept() -> None:
    app = App()
    first = parsed(await respond(app, "one"))

    async def delete(call: Call) -> None:
        await app.request("DELETE", f"/v1/responses/{first.id}")

    app.frontend.before = delete
    second = parsed(await respond(app, "two", previous_response_id=first.id))
    app.frontend.before = None
    assert (await app.get(f"/v1/responses/{first.id}")).status == 404
    parsed(await respond(app, "three", previous_response_id=second.id))
    texts = [text for _, text in messages_of(app)]
    assert texts == ["one", REPLY, "two", REPLY, "three"]


async def test_what_is_not_stored_is_not_found() -> None:
    app = App()
    kept_out = parsed(await respond(app, store=False))
    unknown = [
        await respond(app, previous_response_id=kept_out.id),
        await app.get(f"/v1/responses/{kept_out.id}"),
        await app.request("DELETE", f"/v1/responses/{kept_out.id}"),
        await app.get(f"/v1/responses/{kept_out.id}/input_items"),
        await app.post(f"/v1/responses/{kept_out.id}/cancel", {}),
    ]
    for answer in unknown:
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert unknown[0].error["param"] == "previous_response_id"


async def test_stored_responses_belong_to_a_key() -> None:
    app = App(api_key=("one", "two"))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    made = (await app.post("/v1/responses", {"input": "Hi"}, one)).json()
    path = f"/v1/responses/{made['id']}"
    assert (await app.get(path, one)).json() == made
    assert (await app.get(path, two)).status == 404
    assert (await app.request("DELETE", path, headers=two)).status == 404
    follow = {"input": "Hi", "previous_response_id": made["id"]}
    assert (await app.post("/v1/responses", follow, two)).status == 404
    reference = {"input": [{"type": "item_reference", "id": made["output"][0]["id"]}]}
    assert (await app.post("/v1/responses", reference, two)).status == 404
    assert (await app.post("/v1/responses", reference, one)).status == 200


async def test_items_may_be_references() -> None:
    app = App()
    first = parsed(await respond(app, "Hi"))
    reference = {"type": "item_reference", "id": first.output[0].id}
    parsed(await respond(app, [{"role": "user", "content": "Hi"}, reference]))
    assert messages_of(app) == [("user", "Hi"), ("assistant", REPLY)]
    refused = await respond(app, [{"type": "item_reference", "id": "msg_0"}])
    assert (refused.status, refused.error["param"]) == (404, "input[0].id")


async def test_references_are_bounded_and_read_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = App(max_body_bytes=100_000)
    first = parsed(await respond(app, [{"role": "user", "content": "x" * 40_000, "id": "msg_x"}]))
    threads = []
    item = Reading.item

    def watched(self: Reading, item_id: str, param: str) -> Any:
        threads.append(threading.current_thread())
        return item(self, item_id, param)

    monkeypatch.setattr(Reading, "item", watched)
    parsed(await respond(app, [{"id": "msg_x"}, {"id": "msg_x"}]))
    refused = await respond(app, [{"type": "item_reference", "id": "msg_x"}] * 900)
    assert (refused.status, refused.error["param"]) == (400, "input[2].id")
    assert len(threads) == 5
    assert threading.main_thread() not in threads
    listed = await app.get(f"/v1/responses/{first.id}/input_items")
    [only] = listed.json()["data"]
    assert only["content"][0]["text"] == "x" * 40_000


async def test_input_items_are_listed_in_pages() -> None:
    app = App()
    first = parsed(await respond(app, "one"))
    items = [{"role": "user", "content": "two"}, {"role": "user", "content": "three"}]
    second = parsed(await respond(app, items, previous_response_id=first.id))
    path = f"/v1/responses/{second.id}/input_items"

    async def texts(query: str) -> tuple[list[str], ResponseItemList]:
        page = ResponseItemList.model_validate((await app.get(path + query)).json())
        return [item.content[0].text for item in page.data], page

    assert (await texts("?order=asc"))[0] == ["one", REPLY, "two", "three"]
    newest, page = await texts("?limit=2")
    assert (newest, page.has_more) == (["three", "two"], True)
    rest, page = await texts(f"?after={page.last_id}")
    assert (rest, page.has_more) == ([REPLY, "one"], False)
    for query in ("?limit=0", "?limit=101", "?limit=x", "?order=up"):
        assert (await app.get(path + query)).status == 400
    assert (await app.get(f"{path}?after=x")).status == 404


async def test_without_a_store_nothing_is_kept() -> None:
    app = App(response_store_entries=0)
    response = await respond(app)
    assert response.json()["store"] is False
    assert (await app.get(f"/v1/responses/{response.json()['id']}")).status == 404
    assert (await respond(app, store=True)).error["param"] == "store"
    assert (await respond(app, background=True)).status == 400


async def test_a_response_in_the_background_is_fetched_later() -> None:
    gate = asyncio.Event()

    async def wait(call: Call) -> None:
        await gate.wait()

    app = App(FakeFrontend(before=wait))
    queued = parsed(await respond(app, background=True))
    assert (queued.status, queued.output) == ("queued", [])
    path = f"/v1/responses/{queued.id}"
    await until(lambda: app.frontend.num_open)
    assert parsed(await app.get(path)).status == "in_progress"
    gate.set()
    context = app.app.state.context
    await until(lambda: not context.background)
    done = parsed(await app.get(path))
    assert (done.status, done.output_text) == ("completed", REPLY)
    assert parsed(await app.post(f"{path}/cancel", {})).status == "completed"
    assert context.num_in_flight == 0


async def test_a_response_in_the_background_is_cancelled() -> None:
    app = App(FakeFrontend(before=hang))
    queued = parsed(await respond(app, background=True))
    await until(lambda: app.frontend.num_open)
    cancelled = parsed(await app.post(f"/v1/responses/{queued.id}/cancel", {}))
    assert cancelled.status == "cancelled"
    assert app.frontend.num_open == 0
    at_once = parsed(await respond(app, background=True))
    answer = await app.post(f"/v1/responses/{at_once.id}/cancel", {})
    assert parsed(answer).status == "cancelled"
    gone = parsed(await respond(app, background=True))
    await until(lambda: app.frontend.num_open)
    assert (await app.request("DELETE", f"/v1/responses/{gone.id}")).json()["deleted"]
    assert app.frontend.num_open == 0
    assert (await app.get(f"/v1/responses/{gone.id}")).status == 404
    others = parsed(await respond(App()))
    assert others.background is False


async def test_only_a_response_in_the_background_can_be_cancelled() -> None:
    app = App()
    response = parsed(await respond(app))
    answer = await app.post(f"/v1/responses/{response.id}/cancel", {})
    assert answer.status == 400
    assert "background" in answer.error["message"]


async def test_a_response_in_the_background_tells_of_its_error() -> None:
    app = App(FakeFrontend(before=fail(PromptTooLongError("too long", param="messages"))))
    queued = parsed(await respond(app, background=True))
    await until(lambda: not app.app.state.context.background)
    failed = parsed(await app.get(f"/v1/responses/{queued.id}"))
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("invalid_prompt", "too long")


class ShortContext(FakeFrontend):
    """A front end that takes only conversations that may be shortened."""

    async def prepare(self, prompt: Any) -> Any:
        """Refuse the others."""
        if not prompt.drops_turns:
            raise PromptTooLongError("too long", param="messages")
        return await super().prepare(prompt)


async def test_truncation_lets_the_first_turns_be_left_out() -> None:
    app = App(ShortContext())
    for body in ({}, {"truncation": "disabled"}):
        refused = await respond(app, **body)
        assert (refused.status, refused.error["param"]) == (400, "input")
        refused = await app.post("/v1/responses/input_tokens", {"input": "Hi", **body})
        assert (refused.status, refused.error["param"]) == (400, "input")
    assert parsed(await respond(app, truncation="auto")).truncation == "auto"
    counted = await app.post("/v1/responses/input_tokens", {"input": "Hi", "truncation": "auto"})
    assert counted.status == 200


async def test_input_tokens_are_counted() -> None:
    app = App()
    answer = await app.post("/v1/responses/input_tokens", {"input": "Hi", "instructions": "Yo"})
    counted = InputTokenCountResponse.model_validate(answer.json())
    assert counted.input_tokens == len(TOKENIZER.encode("YoHi"))
    assert app.frontend.calls == []


async def test_a_client_that_leaves_ends_the_work_and_leaves_nothing_stored() -> None:
    async with running(FakeFrontend(between=hang)) as server:
        _, writer = await server.send("/v1/responses", {"input": "Hi", "stream": True})
        await until(lambda: server.frontend.num_open)
        writer.close()
        await until(lambda: not server.frontend.num_open)
        assert server.app.state.context.responses.num_entries == 0


async def test_the_official_client_streams_parses_and_fetches() -> None:
    async with running(FakeFrontend(reply=f"Well. {CALL}")) as server:
        client = AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        asked: Any = {"model": "demo", "input": "Weather?", "tools": [WEATHER]}
        async with client.responses.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created"
        assert final.output[1].parsed_arguments == {"place": "Oslo"}
        fetched = await client.responses.retrieve(final.id)
        assert fetched.output_text == "Well."
        items = await client.responses.input_items.list(final.id)
        assert items.data[0].content[0].text == "Weather?"
        count = await client.responses.input_tokens.count(model="demo", input="Hi")
        assert count.input_tokens == len(TOKENIZER.encode("Hi"))
        await client.responses.delete(final.id)
        later = await client.responses.create(model="demo", input="Hi", background=True)
        assert (await client.responses.cancel(later.id)).status in ("cancelled", "completed")
        await client.close()


async def test_files_and_sounds_are_parts_of_a_message() -> None:
    app = App()
    parts = [
        {"type": "input_file", "file_data": "data:application/pdf;base64,JVBERi0xLjQK"},
        {"type": "input_file", "file_url": "https://example.com/a.pdf"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]
    parsed(await respond(app, [{"role": "user", "content": parts}]))
    [message] = app.frontend.calls[-1].prompt.conversation.messages
    assert [part.param for part in message.parts] == [
        "input[0].content[0].file_data",
        "input[0].content[1].file_url",
        "input[0].content[2].input_audio",
    ]
    for part in ({"type": "input_file", "file_id": "f"}, {"type": "input_image", "file_id": "f"}):
        answer = await respond(app, [{"role": "user", "content": [part]}])
        assert (answer.status, answer.error["param"]) == (404, "input[0].content[0].file_id")
