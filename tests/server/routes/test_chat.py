"""POST /v1/chat/completions: shapes, streams, what reaches the front end."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.errors import InvalidRequestError
from sensorium.params import StructuredOutputs
from tests.server.fake_frontend import TOKENIZER, FakeFrontend, fail
from tests.server.harness import USER, App

REPLY = "Hello, world!"
NUM_TOKENS = len(TOKENIZER.encode(REPLY))


async def test_an_answer_has_openais_shape() -> None:
    answer = await App(FakeFrontend(num_cached_tokens=1)).chat(model="demo")
    assert answer.status == 200
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "demo"
    assert body["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    assert isinstance(body["created"], int)
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": REPLY, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": None,
    }
    num_prompt = len(TOKENIZER.encode("Hi"))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": NUM_TOKENS,
        "total_tokens": num_prompt + NUM_TOKENS,
        "prompt_tokens_details": {"cached_tokens": 1, "image_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_usage_counts_the_tokens_of_images() -> None:
    content = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ]
    answer = await App().chat(messages=[{"role": "user", "content": content}])
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 4


@pytest.mark.parametrize(
    "content",
    ["Hello, you", [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you"}]],
)
async def test_an_expected_answer_reaches_the_engine(content: Any) -> None:
    app = App()
    prediction = {"type": "content", "content": content}
    answer = await app.chat(prediction=prediction)
    assert app.frontend.calls[-1].params.prediction == "Hello, you"
    details = answer.json()["usage"]["completion_tokens_details"]
    assert details == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = (await app.chat(prediction=prediction, **options)).events()
    assert streamed[-1]["usage"]["completion_tokens_details"] == details


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("text", "prediction"),
        ({"content": "a"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "tokens", "content": "a"}, "prediction.type"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": "a", "more": 1}, "prediction.more"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content[0]"),
    ],
)
async def test_a_wrong_expected_answer_is_refused(prediction: Any, param: str) -> None:
    answer = await App().chat(prediction=prediction)
    assert answer.status == 400
    assert answer.error["param"].startswith(param)


async def test_a_stream_tells_role_text_and_end() -> None:
    answer = await App().chat(stream=True)
    events = answer.events()
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == REPLY
    assert deltas[-1] == {}
    reasons = [e["choices"][0]["finish_reason"] for e in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]
    assert "usage" not in events[0]


async def test_a_stream_reports_usage_where_asked() -> None:
    answer = await App().chat(stream=True, stream_options={"include_usage": True})
    *chunks, last = answer.events()
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == NUM_TOKENS


async def test_a_stream_reports_usage_all_along_where_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = (await App().chat(stream=True, stream_options=options)).events()
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts)
    assert counts[-1] == NUM_TOKENS


async def test_several_samples() -> None:
    answer = await App().chat(n=3)
    assert [c["index"] for c in answer.json()["choices"]] == [0, 1, 2]
    assert answer.json()["usage"]["completion_tokens"] == 3 * NUM_TOKENS
    events = (await App().chat(n=3, stream=True)).events()
    for index in range(3):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == REPLY
        assert [c["finish_reason"] for c in mine][-1] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(stream: bool) -> None:
    answer = await App().chat(logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        chunks = [e["choices"][0]["logprobs"] for e in answer.events()]
        content = [entry for c in chunks if c for entry in c["content"]]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == NUM_TOKENS
    assert b"".join(bytes(e["bytes"]) for e in content).decode() == REPLY
    for entry in content:
        assert entry["logprob"] == -2.0
        assert [t["logprob"] for t in entry["top_logprobs"]] == [-1.0, -2.0, -3.0]
        assert entry["token"] == bytes(entry["bytes"]).decode()


async def test_log_probabilities_without_alternatives() -> None:
    answer = await App().chat(logprobs=True)
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [e["top_logprobs"] for e in content] == [[]] * NUM_TOKENS


async def test_alternatives_need_logprobs() -> None:
    error = (await App().chat(top_logprobs=2)).error
    assert error["param"] == "top_logprobs"


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_where_asked(stream: bool) -> None:
    answer = await App().chat(return_token_ids=True, stream=stream)
    if stream:
        events = answer.events()
        assert events[0]["prompt_token_ids"] == TOKENIZER.encode("Hi")
        ids = [i for e in events for i in e["choices"][0].get("token_ids", [])]
    else:
        assert answer.json()["prompt_token_ids"] == TOKENIZER.encode("Hi")
        ids = answer.json()["choices"][0]["token_ids"]
    assert ids == TOKENIZER.encode(REPLY)


async def test_all_sampling_fields_arrive() -> None:
    app = App()
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3,
        "min_tokens": 1, "stop_token_ids": [5], "ignore_eos": True, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "allowed_token_ids": [1, 2],
        "bad_words": ["no"], "prompt_logprobs": 1, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    answer = await app.chat(**fields, stop="END", logit_bias={"17": -5}, max_tokens=9, priority=-3)
    assert answer.status == 200, answer.body
    [call] = app.frontend.calls
    for name, value in fields.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(call.params, name) == expected
    assert call.params.stop == ("END",)
    assert call.params.logit_bias == {17: -5}
    assert call.params.max_tokens == 9
    assert call.priority == -3


async def test_the_models_defaults_hold_where_the_request_is_silent() -> None:
    app = App(FakeFrontend(default_params={"temperature": 0.2, "top_k": 5, "max_tokens": 77}))
    await app.chat(top_k=9, temperature=None)
    params = app.frontend.calls[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.2, 9, 77)


async def test_without_a_limit_the_context_is_the_limit() -> None:
    app = App()
    await app.chat()
    assert app.frontend.calls[0].params.max_tokens is None
    assert app.frontend.calls[0].params.temperature == 1.0


async def test_max_completion_tokens_wins_and_is_named_in_errors() -> None:
    app = App()
    answer = await app.chat(max_tokens=5, max_completion_tokens=2)
    assert app.frontend.calls[0].params.max_tokens == 2
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    error = (await app.chat(max_completion_tokens=0)).error
    assert error["param"] == "max_completion_tokens"
    assert "max_completion_tokens" in error["message"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputs(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            StructuredOutputs(json={"type": "object"}),
        ),
    ],
)
async def test_response_formats(form: dict[str, object], expected: StructuredOutputs) -> None:
    app = App()
    await app.chat(response_format=form)
    assert app.frontend.calls[0].params.structured_outputs == expected


async def test_a_format_without_a_schema_is_refused() -> None:
    error = (await App().chat(response_format={"type": "json_schema"})).error
    assert error["param"] == "response_format.json_schema"


async def test_two_constraints_are_refused() -> None:
    answer = await App().chat(
        response_format={"type": "json_object"}, structured_outputs={"regex": "a+"}
    )
    assert answer.status == 400
    assert answer.error["param"] == "response_format"


async def test_rendering_options_and_media_options_arrive() -> None:
    app = App(api_key=("k",), trust_request_chat_template=True)
    body = {
        "messages": [*USER, {"role": "assistant", "content": "The"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "chat_template": "{{ messages }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "mm_processor_kwargs": {"max_pixels": 100},
        "media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}},
        "cache_salt": "s",
        "reasoning_effort": "low",
    }
    answer = await app.post("/v1/chat/completions", body, {"authorization": "Bearer k"})
    assert answer.status == 200, answer.body
    prompt = app.frontend.calls[0].prompt
    assert prompt.continue_final_message
    assert not prompt.add_generation_prompt
    assert prompt.chat_template == "{{ messages }}"
    assert prompt.chat_template_kwargs == {"reasoning_effort": "low", "enable_thinking": False}
    assert prompt.media.mm_processor_kwargs == {"max_pixels": 100}
    assert prompt.media.media_io_kwargs == {"image": {"rgba_background_color": [0, 0, 0]}}
    assert prompt.media.cache_salt == "s"
    assert prompt.media.tenant
    assert prompt.media.tenant != "k"


async def test_two_keys_are_two_tenants() -> None:
    app = App(api_key=("a", "b"))
    for key in ("a", "b", "a"):
        await app.post(
            "/v1/chat/completions", {"messages": USER}, {"authorization": f"Bearer {key}"}
        )
    first, second, third = (call.prompt.media.tenant for call in app.frontend.calls)
    assert first == third != second


async def test_the_callers_request_id_is_used_and_engine_ids_stay_unique() -> None:
    app = App()
    first = await app.chat(request_id="mine-1")
    second = await app.post("/v1/chat/completions", {"messages": USER}, {"x-request-id": "mine-1"})
    for answer in (first, second):
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["id"] == "chatcmpl-mine-1"
    ids = [call.request_id for call in app.frontend.calls]
    assert len(set(ids)) == 2
    assert all(i.startswith("mine-1") for i in ids)


async def test_a_harmful_request_id_is_replaced_or_refused() -> None:
    app = App()
    answer = await app.post("/v1/chat/completions", {"messages": USER}, {"x-request-id": "a b\x00"})
    assert answer.headers["x-request-id"] != "a b\x00"
    assert (await app.chat(request_id="a\r\nSet-Cookie: x")).error["param"] == "request_id"


async def test_fields_that_clients_send_always_do_no_harm() -> None:
    answer = await App().chat(
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", modalities=["text"],
        prompt_cache_key="k", parallel_tool_calls=True, tools=None, stop=None, n=None,
    )  # fmt: skip
    assert answer.status == 200, answer.body


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls_are_read_out_of_the_text(stream: bool) -> None:
    app = App(FakeFrontend(reply=f"Let me see. {CALL}"))
    answer = await app.chat(tools=TOOLS, stream=stream)
    if stream:
        choices = [e["choices"][0] for e in answer.events()]
        content = "".join(c["delta"].get("content") or "" for c in choices)
        calls = [p for c in choices for p in c["delta"].get("tool_calls", [])]
        reason = choices[-1]["finish_reason"]
        assert calls[0]["index"] == 0
    else:
        [choice] = answer.json()["choices"]
        content, calls = choice["message"]["content"], choice["message"]["tool_calls"]
        reason = choice["finish_reason"]
    assert content == "Let me see."
    assert reason == "tool_calls"
    assert calls[0]["type"] == "function"
    assert calls[0]["id"]
    assert calls[0]["function"]["name"] == "weather"
    assert "".join(c["function"]["arguments"] for c in calls) == '{"city": "Bonn"}'
    assert app.frontend.calls[0].prompt.tools[0]["function"]["name"] == "weather"


async def test_a_named_tool_forces_its_arguments() -> None:
    app = App(FakeFrontend(reply='{"city": "Bonn"}'))
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = (await app.chat(tools=TOOLS, tool_choice=choice)).json()["choices"][0]
    assert app.frontend.calls[0].params.structured_outputs.json["type"] == "object"
    assert answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city": "Bonn"}',
    }


NAMED_TOOL = {"type": "function", "function": {"name": "weather"}}
HALF_CALLS = [("required", '[{"name": "weather", "param'), (NAMED_TOOL, '{"city": "Bo')]


@pytest.mark.parametrize(("choice", "half"), HALF_CALLS)
async def test_half_a_forced_call_is_neither_call_nor_content(choice: Any, half: str) -> None:
    frontend = FakeFrontend(reply=half + 'nn"}')
    num_tokens = len(frontend.tokenizer.encode(half))
    app = App(frontend)
    for max_tokens in (1, num_tokens):
        answer = await app.chat(tools=TOOLS, tool_choice=choice, max_tokens=max_tokens)
        [only] = answer.json()["choices"]
        assert only["finish_reason"] == "length"
        assert not only["message"]["content"]
        assert not only["message"].get("tool_calls")


@pytest.mark.parametrize(("choice", "half"), HALF_CALLS)
async def test_a_forced_call_that_a_stop_text_ends_is_none(choice: Any, half: str) -> None:
    answer = await App(FakeFrontend(reply=half)).chat(tools=TOOLS, tool_choice=choice)
    [only] = answer.json()["choices"]
    assert only["finish_reason"] == "stop"
    assert not only["message"]["content"]
    assert "tool_calls" not in only["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [r'{"city": "\ud83d"}', '{"city": 1e999}'])
async def test_arguments_are_sent_as_they_were_written(text: str, stream: bool) -> None:
    """Whatever escapes and numbers a model writes, the answer is JSON and no failure of the server."""
    reply = f'[{{"name": "weather", "parameters": {text}}}]'
    for choice, written in (("required", reply), (NAMED_TOOL, text), ("auto", reply)):
        answer = await App(FakeFrontend(reply=written)).chat(
            tools=TOOLS, tool_choice=choice, stream=stream
        )
        assert answer.status == 200
        if stream:
            deltas = [e["choices"][0]["delta"] for e in answer.events()]
            calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        else:
            calls = answer.json()["choices"][0]["message"]["tool_calls"]
        assert "".join(call["function"]["arguments"] for call in calls) == text


async def test_half_a_required_call_is_not_streamed() -> None:
    app = App(FakeFrontend(reply='[{"name": "weather", "parameters": {"city": "Bonn"}}, {"na'))
    answer = await app.chat(tools=TOOLS, tool_choice="required", stream=True)
    deltas = [e["choices"][0]["delta"] for e in answer.events()]
    assert not any(d.get("content") for d in deltas)
    pieces = [p["function"] for d in deltas for p in d.get("tool_calls", [])]
    assert [p["name"] for p in pieces if "name" in p] == ["weather"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_enforced_is_said_in_a_header(stream: bool) -> None:
    warning = "structured_outputs.json: not enforced: not, uniqueItems"
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    for fields, place in (
        ({"response_format": schema}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json"),
        ({"guided_json": {}}, "guided_json"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": NAMED_TOOL}, "tools[0].function.parameters"),
        ({"tools": [*TOOLS, OTHER_TOOL], "tool_choice": "required"}, "tools"),
    ):
        answer = await App(FakeFrontend(warnings=(warning,))).chat(stream=stream, **fields)
        expected = f"{place}: not enforced: not, uniqueItems"
        assert answer.headers["x-sensorium-warning"] == expected
    assert "x-sensorium-warning" not in (await App().chat(stream=stream)).headers


OTHER_TOOL = {"type": "function", "function": {"name": "other", "parameters": {"type": "zzz"}}}


async def test_messages_name_the_field_that_was_sent() -> None:
    place = "structured_outputs.json.items.anyOf[1]"
    error = InvalidRequestError(f"{place} cannot be used: Invalid type: zzz.", param=place)
    app = App(FakeFrontend(before=fail(error)))
    answer = await app.chat(tools=[*TOOLS, OTHER_TOOL], tool_choice="required")
    assert answer.error["param"] == "tools[1].function.parameters"
    expected = "tools[1].function.parameters cannot be used: Invalid type: zzz."
    assert answer.error["message"] == expected
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "zzz"}}}
    error = InvalidRequestError(
        "structured_outputs.json cannot be used: x.", param="structured_outputs.json"
    )
    answer = await App(FakeFrontend(before=fail(error))).complete(response_format=schema)
    assert answer.error["param"] == "response_format.json_schema.schema"
    assert answer.error["message"] == "response_format.json_schema.schema cannot be used: x."


async def test_options_alone_belong_to_the_other_constraint() -> None:
    app = App()
    options = {"whitespace": "flexible", "unsupported": "refuse", "json": None}
    await app.chat(response_format={"type": "json_object"}, structured_outputs=options)
    outputs = app.frontend.calls[0].params.structured_outputs
    assert outputs == StructuredOutputs(
        json_object=True, whitespace="flexible", unsupported="refuse"
    )
    await app.chat(tools=TOOLS, tool_choice="required", structured_outputs=options)
    outputs = app.frontend.calls[1].params.structured_outputs
    assert (outputs.whitespace, outputs.json["type"]) == ("flexible", "array")
    for wrong in ({"whitespace": "some"}, {"whitespace": "flexible"}, {"unsupported": 1}):
        error = (await app.chat(structured_outputs=wrong)).error
        assert error["param"].startswith("structured_outputs")


async def test_tool_choice_none_hides_the_tools() -> None:
    app = App(FakeFrontend(reply=CALL))
    answer = await app.chat(tools=TOOLS, tool_choice="none")
    assert app.frontend.calls[0].prompt.tools is None
    assert answer.json()["choices"][0]["message"]["content"] == CALL


async def test_an_error_about_an_option_points_at_the_option() -> None:
    param = "structured_outputs.whitespace_pattern"
    app = App(FakeFrontend(before=fail(InvalidRequestError(f"{param} is none.", param=param))))
    answer = await app.chat(
        response_format={"type": "json_object"}, structured_outputs={"whitespace_pattern": "("}
    )
    assert (answer.error["param"], answer.error["message"]) == (param, f"{param} is none.")
    answer = await app.chat(guided_json={}, guided_whitespace_pattern="(")
    assert answer.error["message"] == "guided_whitespace_pattern is none."


async def test_errors_about_a_constraint_point_at_the_field_it_came_from() -> None:
    error = InvalidRequestError("The schema is wrong.", param="structured_outputs.json")
    for fields, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.json"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools[0].function.parameters"),
    ):
        error.param = "structured_outputs.json"
        answer = await App(FakeFrontend(before=fail(error))).chat(**fields)
        assert (answer.status, answer.error["param"]) == (400, param)
