"""Models, health, version, metrics, tokenizing, the page, the description of the API."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sensorium
from sensorium import errors
from tests.server.fake_frontend import TOKENIZER
from tests.server.harness import USER, App


async def test_models() -> None:
    body = (await App().get("/v1/models")).json()
    assert body["object"] == "list"
    [card] = body["data"]
    assert card["id"] == "demo"
    assert card["object"] == "model"
    assert card["max_model_len"] == 4096
    assert card["modalities"] == ["text", "image"]
    assert (await App().get("/v1/models/demo")).json()["id"] == "demo"


async def test_names_given_by_flag() -> None:
    app = App(served_model_name=("org/a", "b"))
    assert [c["id"] for c in (await app.get("/v1/models")).json()["data"]] == ["org/a", "b"]
    assert (await app.get("/v1/models/org/a")).json()["id"] == "org/a"
    assert (await app.chat(model="b")).json()["model"] == "b"
    assert (await app.chat()).json()["model"] == "org/a"
    assert (await app.chat(model="demo")).status == 404


async def test_health_follows_the_engine() -> None:
    app = App()
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        assert (await app.request(method, path)).status == 200
    app.frontend.alive = False
    for path in ("/health", "/ping"):
        answer = await app.get(path)
        assert (answer.status, answer.error["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after"] == "7"


async def test_version() -> None:
    assert (await App().get("/version")).json() == {"version": sensorium.__version__}


async def test_metrics() -> None:
    app = App(metrics_prefix="vllm:")
    await app.chat()
    answer = await app.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    assert 'vllm:generation_tokens_total{engine="0",model_name="demo"} 30.0' in text
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25' in text
    assert app.frontend.metrics is app.app.state.context.metrics


async def test_metrics_are_there_while_the_engine_is_not() -> None:
    app = App()
    app.frontend.alive = False
    answer = await app.get("/metrics")
    assert answer.status == 200
    assert b"generation_tokens_total" in answer.body


async def test_tokenize_a_prompt() -> None:
    answer = await App().post("/tokenize", {"prompt": "Hi there", "return_token_strs": True})
    body = answer.json()
    ids = TOKENIZER.encode("Hi there")
    assert body["tokens"] == ids
    assert body["count"] == len(ids)
    assert body["max_model_len"] == 4096
    assert body["token_strs"] == [TOKENIZER.token_text(i) for i in ids]


async def test_tokenize_a_conversation_with_its_images() -> None:
    content = [
        {"type": "text", "text": "Hi"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    answer = await App().post("/tokenize", {"messages": [{"role": "user", "content": content}]})
    body = answer.json()
    assert body["count"] == len(TOKENIZER.encode("Hi")) + 4
    assert body["modality_tokens"] == {"image": 4}


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": USER}])
async def test_tokenize_needs_one_of_two(body: dict[str, object]) -> None:
    answer = await App().post("/tokenize", body)
    assert answer.status == 400
    assert answer.error["param"] in ("prompt", "messages")


async def test_detokenize() -> None:
    answer = await App().post("/detokenize", {"tokens": TOKENIZER.encode("Hi there")})
    assert answer.json() == {"prompt": "Hi there"}


@pytest.mark.parametrize("token", [-1, 10**6, 2**40, 1.5, True, "a"])
async def test_detokenize_refuses_what_is_no_token(token: object) -> None:
    answer = await App().post("/detokenize", {"tokens": [1, token]})
    assert answer.status == 400
    assert answer.error["param"] in ("tokens", "tokens[1]")


ROUTES = {
    "/v1/chat/completions": {"400", "404", "413", "415", "422", "424", "503"},
    "/v1/embeddings": {"400", "404", "413", "415", "422", "424", "503"},
    "/detokenize": {"400", "404", "413", "415", "503"},
    "/v1/models/{name}": {"404"},
    "/v1/models": set(),
    "/health": {"503"},
}


async def test_the_description_knows_the_errors() -> None:
    schema = (await App().get("/openapi.json")).json()
    schemas = schema["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert schemas["Error"]["properties"]["error"]["required"] == [
        "message",
        "type",
        "param",
        "code",
    ]
    for path, expected in ROUTES.items():
        for operation in schema["paths"][path].values():
            responses = operation["responses"]
            assert set(responses) == {"200", *expected}
            for status in expected:
                content = responses[status]["content"]["application/json"]
                assert content == {"schema": {"$ref": "#/components/schemas/Error"}}
    chat = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    for status, code in (
        ("400", "context_length_exceeded"),
        ("422", "model_output_not_finite"),
        ("422", "chat_template_failed"),
        ("424", "media_fetch_timeout"),
        ("503", "overloaded"),
    ):
        assert f"`{code}`" in chat[status]["description"]
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}


def test_the_page_of_the_server_knows_all_codes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    classes = [errors.RequestError, errors.UnavailableError]
    for cls in classes:
        classes += cls.__subclasses__()
    assert {f"{cls.status} | {cls.code}" for cls in classes} <= {
        f"{status} | {code}"
        for status, codes in re.findall(r"^\| (\d+) \| ([^|]*) \|", page, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }


async def test_the_description_knows_what_is_required() -> None:
    schemas = (await App().get("/openapi.json")).json()["components"]["schemas"]
    required = {
        name: schemas[name].get("required")
        for name in ("ChatBody", "CompletionBody", "DetokenizeBody")
    }
    assert required == {
        "ChatBody": ["messages"],
        "CompletionBody": ["prompt"],
        "DetokenizeBody": ["tokens"],
    }
    assert schemas["EmbeddingBody"]["oneOf"] == [
        {"required": ["input"]},
        {"required": ["messages"]},
    ]
    assert schemas["TokenizeBody"]["oneOf"] == [
        {"required": ["prompt"]},
        {"required": ["messages"]},
    ]


async def test_the_description_knows_where_a_key_is_needed() -> None:
    headers = {"authorization": "Bearer right"}
    paths = (await App(api_key=("right",)).get("/openapi.json", headers)).json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in ("/health", "/ping"))


async def test_the_description_knows_the_bodies_and_no_page_loads_from_elsewhere() -> None:
    schema = (await App().get("/openapi.json")).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    assert "temperature" in schema["components"]["schemas"][name]["properties"]
    assert "StreamOptions" in schema["components"]["schemas"]
    for path in ("/docs", "/redoc"):
        assert (await App().get(path)).status == 404
