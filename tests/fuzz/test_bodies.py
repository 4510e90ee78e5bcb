"""Whatever a client sends to the HTTP layer, it gets an answer that is no 5xx, and errors in the
usual shape.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sensorium.server.anthropic.protocol import CountBody, MessagesBody
from sensorium.server.responses.protocol import InputTokensBody, ResponsesBody
from tests.fuzz.requests import BODIES, Sent
from tests.fuzz.verdict import Answer, what_is_wrong
from tests.server.harness import App

APP = App()
ALL_BODIES: dict[str, type[BaseModel]] = {
    **BODIES,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": InputTokensBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
}
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
    "input": "Hi",
    "tokens": [1],
    "max_tokens": 8,
}
EXCLUDE_EACH_OTHER = {"/tokenize": ["messages", "prompt"], "/v1/embeddings": ["messages", "input"]}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path, and a body that is good but for a few fields."""
    path = draw(st.sampled_from(sorted(ALL_BODIES)))
    names = sorted(field.alias or name for name, field in ALL_BODIES[path].model_fields.items())
    body = {name: value for name, value in GOOD.items() if name in names}
    if path in EXCLUDE_EACH_OTHER:
        del body[draw(st.sampled_from(EXCLUDE_EACH_OTHER[path]))]
    changes = draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    return path, {**body, **changes}


def send(path: str, body: bytes) -> tuple[Sent, Answer]:
    answer = asyncio.run(APP.post(path, body))
    return Sent(path, body), Answer(answer.status, answer.headers, answer.body)


@given(requests())
@settings(max_examples=250, deadline=None, derandomize=True)
def test_any_body(request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    if path not in BODIES:
        body.pop("stream", None)  # their events have other forms
        body.pop("background", None)
    if isinstance(body.get("n"), int) and body["n"] > 64:
        body["n"] = 64 if body["n"] < 16385 else body["n"]
    sent, answer = send(path, json.dumps(body).encode())
    assert not what_is_wrong(sent, answer)
    assert answer.status in (200, 400, 404), answer.body


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_bytes(body: bytes) -> None:
    sent, answer = send("/v1/chat/completions", body)
    assert not what_is_wrong(sent, answer)
    assert answer.code == "invalid_request"
