"""Requests of Open WebUI, as its page sent them; how it is set up is in docs/open_webui.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sensorium.models.embedder import Embedder
from sensorium.params import SamplingParams
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import USER, App

RECORDED = json.loads((Path(__file__).parent / "open_webui.json").read_text())["bodies"]
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("name", RECORDED)
async def test_a_recorded_request_is_answered(name: str) -> None:
    path, body = RECORDED[name]["path"], RECORDED[name]["body"]
    app = App()
    body = {**body, "model": app.models.default.name}
    answer = await app.post(path, body)
    assert answer.status == 200, answer.body
    if body["stream"]:
        with_usage = "stream_options" in body
        assert bool(answer.events()[-1].get("usage")) == with_usage


async def test_advanced_parameters_have_their_effect() -> None:
    app = App()
    body = RECORDED["all advanced parameters"]["body"]
    assert (await app.post(CHAT, {**body, "model": app.models.default.name})).status == 200
    [call] = app.frontend.calls
    params, prompt = call.params, call.prompt
    assert isinstance(params, SamplingParams)
    assert (params.repetition_penalty, params.top_k, params.min_p) == (1.1, 40, 0.05)
    assert params.structured_outputs is not None
    assert params.structured_outputs.json_object
    assert prompt.chat_template_kwargs["enable_thinking"] is True


@pytest.mark.parametrize(
    ("field", "value", "param", "words"),
    [
        ("mirostat", 1, "mirostat", "use temperature"),
        ("tfs_z", 0.5, "tfs_z", "use temperature"),
        ("format", 5, "format", "JSON schema"),
        ("num_predict", "many", "num_predict", "num_predict"),
        ("repeat_penalty", -1, "repeat_penalty", "repeat_penalty"),
        ("repeat_pen", 1, "repeat_pen", "Unknown field"),
    ],
)
async def test_what_has_no_effect_here_is_refused(
    field: str, value: Any, param: str, words: str
) -> None:
    answer = await App().post(CHAT, {"messages": USER, field: value})
    assert answer.status == 400
    assert answer.error["param"] == param
    assert words in answer.error["message"]


async def test_a_schema_as_format() -> None:
    app = App()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert (await app.post(CHAT, {"messages": USER, "format": schema})).status == 200
    assert app.frontend.calls[0].params.structured_outputs.json == schema


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_predict": 7}, 7),
        ({"num_predict": 7, "max_tokens": 9}, 9),
        ({"num_predict": -1}, None),
        ({"num_predict": -2}, None),
    ],
)
async def test_the_length_of_an_answer(fields: dict[str, int], expected: int | None) -> None:
    app = App()
    assert (await app.post(CHAT, {"messages": USER, **fields})).status == 200
    assert app.frontend.calls[0].params.max_tokens == expected


async def test_a_format_in_our_words_is_not_mixed_with_that_of_ollama() -> None:
    app = App()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = {"messages": USER, "format": schema}
    assert (await app.post(CHAT, {**body, "response_format": {"type": "text"}})).status == 200
    assert app.frontend.calls[0].params.structured_outputs is None
    refused = await app.post(CHAT, {**body, "response_format": {"type": "json_schema"}})
    assert (refused.status, refused.error["param"]) == (400, "response_format.json_schema")


async def test_texts_of_a_document_are_embedded() -> None:
    app = App(FakeFrontend(embedder=Embedder(8)))
    body = {"input": ["one", "two"], "model": app.models.default.name}
    assert (await app.post("/v1/embeddings", body)).status == 200
