"""Whatever a client sends, it gets an answer that is no 5xx, and errors in the usual shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.server.harness import App

ROUTES = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
APP = App()
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 30)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "user", "text", "image_url", "json_schema", "auto", "\x00", "é"])
    | st.text(max_size=5)
)
NAMES = (
    *("role", "content", "type", "text", "image_url", "url", "uuid", "tools", "function", "name"),
    *("parameters", "json_schema", "schema", "json", "regex", "choice", "grammar", "image", "5"),
)
KEYS = st.sampled_from(NAMES) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Hi",
    "tokens": [1],
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path, and a body that is good but for a few fields."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    names = sorted(field.alias or name for name, field in ROUTES[path].model_fields.items())
    body = {name: value for name, value in GOOD.items() if name in names}
    if path == "/tokenize":
        del body[draw(st.sampled_from(["messages", "prompt"]))]
    changes = draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    return path, {**body, **changes}


@given(requests())
@settings(max_examples=150, deadline=None)
def test_any_body(request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    if isinstance(body.get("n"), int) and body["n"] > 64:
        body["n"] = 64 if body["n"] < 16385 else body["n"]
    answer = asyncio.run(APP.post(path, json.dumps(body).encode()))
    if answer.status != 200:
        assert answer.status in (400, 404), answer.body
        assert answer.error["type"] == "invalid_request_error"
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert not any("error" in event for event in answer.events())


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
@settings(max_examples=100, deadline=None)
def test_any_bytes(body: bytes) -> None:
    answer = asyncio.run(APP.post("/v1/chat/completions", body))
    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
