"""Every error has one shape, the right status and points at its place; the next request works."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium import errors
from tests.server.fake_frontend import FakeFrontend, fail
from tests.server.harness import USER, App

ALL = [
    (errors.InvalidRequestError, 400, "invalid_request"),
    (errors.PromptTooLongError, 400, "context_length_exceeded"),
    (errors.ChatTemplateError, 422, "chat_template_failed"),
    (errors.TooManyItemsError, 400, "too_many_items"),
    (errors.UnsupportedModalityError, 400, "unsupported_modality"),
    (errors.PlaceholderMismatchError, 400, "placeholder_mismatch"),
    (errors.MediaRefusedError, 400, "media_refused"),
    (errors.MediaTooLargeError, 413, "media_too_large"),
    (errors.MediaUndecodableError, 400, "media_undecodable"),
    (errors.InvalidEmbeddingsError, 400, "invalid_embeddings"),
    (errors.MediaNotCachedError, 404, "media_not_cached"),
    (errors.MediaFetchError, 424, "media_fetch_failed"),
    (errors.MediaFetchTimeoutError, 424, "media_fetch_timeout"),
    (errors.OverloadedError, 503, "overloaded"),
    (errors.EngineDeadError, 503, "engine_unavailable"),
]
PLACE = "messages[0].content[1].image_url"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("cls", "status", "code"), ALL)
async def test_errors_before_the_first_token(
    cls: type[errors.SensoriumError], status: int, code: str, stream: bool
) -> None:
    app = App(FakeFrontend(before=fail(cls("What and why.", param=PLACE))))
    answer = await app.chat(stream=stream)
    assert answer.status == status
    assert answer.error == {
        "message": "What and why.",
        "type": cls.type,
        "param": PLACE,
        "code": code,
    }
    assert ("retry-after" in answer.headers) == (status == 503)
    app.frontend.before = None
    assert (await app.chat()).status == 200


async def test_errors_after_the_first_token_become_an_event() -> None:
    app = App(FakeFrontend(between=fail(errors.EngineDeadError("The engine has stopped."))))
    answer = await app.chat(stream=True)
    assert answer.status == 200
    events = answer.events()
    assert events[0]["choices"]
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert (await app.chat()).status == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_unexpected_errors_tell_nothing_of_the_inside(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(FakeFrontend(before=fail(RuntimeError("secret /etc/passwd 0xdeadbeef"))))
    answer = await app.chat(stream=stream, request_id="r-77")
    assert answer.status == 500
    assert answer.error["code"] == "internal_error"
    assert "secret" not in answer.body.decode()
    assert answer.headers["x-request-id"] == "r-77"
    assert "r-77" in caplog.text
    assert "secret" in caplog.text


async def test_unexpected_errors_within_a_stream_tell_nothing_either() -> None:
    app = App(FakeFrontend(between=fail(RuntimeError("secret"))))
    answer = await app.chat(stream=True)
    assert answer.events()[-1]["error"]["code"] == "internal_error"
    assert "secret" not in answer.body.decode()


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 10**9}, "n", "16384"),
    ({"n": 0}, "n", "0"),
    ({"n": "1"}, "n", "an integer"),
    ({"n": True}, "n", "an integer"),
    ({"n": 1.0}, "n", "an integer"),
    ({"temperature": -1}, "temperature", "-1"),
    ({"temperature": "hot"}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "0"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": 10**30}, "max_tokens", "between"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "max_tokens"),
    ({"seed": 2**70}, "seed", "between"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": 5}, "stop", "a string or a list"),
    ({"stop": ["a", 5]}, "stop[1]", "a string"),
    ({"stop": ["x"] * 100}, "stop", "100"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
    ({"logprobs": 3}, "logprobs", "true or false"),
    ({"logit_bias": {"5": 1000}}, "logit_bias[5]", "100"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias[-1]", "token id"),
    ({"logit_bias": [1]}, "logit_bias", "an object"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (
        {"stream": True, "stream_options": {"include_usag": True}},
        "stream_options.include_usag",
        "include_usage",
    ),
    ({"tempurature": 1}, "tempurature", "'temperature'"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "text", "schema": 1}}, "response_format.schema", "Unknown"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "regex"),
    ({"messages": "Hi"}, "messages", "a list"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": [5]}, "messages[0]", "an object"),
    ({"messages": [{"role": "us er", "content": "a"}]}, "messages[0].role", "'us er'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "a string",
    ),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "letters"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"mm_processor_kwargs": 5}, "mm_processor_kwargs", "an object"),
    ({"media_io_kwargs": {"image": 5}}, "media_io_kwargs.image", "an object"),
    ({"priority": 1 << 40}, "priority", "wrong"),
    ({"modalities": ["audio"]}, "modalities[0]", "text"),
    ({"functions": []}, "functions", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "word"), WRONG, ids=lambda v: str(v)[:40])
async def test_wrong_fields_are_named(fields: dict[str, Any], param: str, word: str) -> None:
    app = App()
    answer = await app.chat(**fields)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
    assert answer.error["param"] == param
    assert word in answer.error["message"]
    assert not app.frontend.calls
    assert (await app.chat()).status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"messages": [], "temperature": NaN}', "temperature"),
        (b'{"messages": [], "logit_bias": {"3": Infinity}}', "logit_bias.3"),
        (b'{"messages": [], "stop": [-Infinity]}', "stop[0]"),
        (b'{"messages": [], "top_p": 1e999}', "top_p"),
        (b"", None), (b"{", None), (b'{"a": 1,}', None), (b"[]", None), (b"null", None),
        (b'"x"', None), (b"\xff\xfe", None), (b'{"a": "\xff"}', None), (b"[" * 100_000, None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b"1" * 10_000, None),
    ],
    ids=range(15),
)  # fmt: skip
async def test_what_is_no_json_object_is_refused(body: bytes, param: str | None) -> None:
    app = App()
    answer = await app.post("/v1/chat/completions", body)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
    assert answer.error["param"] == param
    assert (await app.chat()).status == 200


async def test_deep_nesting_is_refused() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    answer = await App().chat(chat_template_kwargs={"a": deep}, unknown=deep)
    assert answer.status == 400


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_other_kinds_of_content_are_refused(kind: str) -> None:
    body = json.dumps({"messages": USER}).encode()
    answer = await App().post("/v1/chat/completions", body, {"content-type": kind})
    assert answer.status == 400
    assert "application/json" in answer.error["message"]


async def test_the_charset_of_the_content_does_not_matter() -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = await App().post("/v1/chat/completions", {"messages": USER}, headers)
    assert answer.status == 200


async def test_required_fields_are_named() -> None:
    assert (await App().post("/v1/chat/completions", {})).error["param"] == "messages"
    assert (await App().post("/v1/completions", {})).error["param"] == "prompt"


async def test_unknown_models() -> None:
    answer = await App().chat(model="gpt-9")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert answer.error["param"] == "model"
    assert "'demo'" in answer.error["message"]
    assert (await App().get("/v1/models/gpt-9")).status == 404


async def test_unknown_paths_and_methods() -> None:
    answer = await App().get("/v1/chat/completion")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "/v1/chat/completions" in answer.error["message"]
    answer = await App().get("/v1/chat/completions")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert (await App().post("/v1/chat/completions/", {})).status == 404


async def test_a_body_over_the_limit() -> None:
    app = App(max_body_bytes=1000)
    answer = await app.chat(user="x" * 2000)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    headers = {"content-type": "application/json", "content-length": "5000"}
    answer = await app.request("POST", "/v1/chat/completions", [b"{"], headers)
    assert answer.status == 413
    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    parts = [b" " * 400] * 3
    answer = await app.request("POST", "/v1/chat/completions", parts, headers)
    assert answer.status == 413
    assert "1000" in answer.error["message"]
    assert (await app.chat()).status == 200
