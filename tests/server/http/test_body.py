"""Bodies: large ones hold the event loop for short times only, and wrong values cost no more
than right ones.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import threading
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from sensorium.errors import BodyTooLargeError, InvalidRequestError
from sensorium.server.http import body as body_module
from sensorium.server.http import encoding
from sensorium.server.http.body import LARGE_BODY, validate
from sensorium.server.openai.protocol import ChatBody, CompletionBody, DetokenizeBody
from sensorium.server.payload import (
    MANY_VALUES,
    abbreviate,
    check_num_values,
    decode_object,
    has_many_values,
)
from tests.server.harness import USER, App, running, status_of, until
from tests.server.test_turns import counted

CHAT = "/v1/chat/completions"
JSON_TYPE = {"content-type": "application/json"}


def with_picture(num_bytes: int, seed: int = 0) -> bytes:
    """A chat body with a data: URL of that many random bytes."""
    data = base64.b64encode(random.Random(seed).randbytes(num_bytes)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()


def cut(data: bytes, size: int) -> list[bytes]:
    """``data`` in pieces."""
    return [data[start : start + size] for start in range(0, len(data), size)]


def url_of(app: App, call: int) -> str:
    """The URL of the first item that a call got."""
    return app.frontend.calls[call].prompt.conversation.refs[0].source


@pytest.mark.parametrize("size", [1000, LARGE_BODY - 1, LARGE_BODY, 10**6])
async def test_bodies_come_whole_whatever_their_pieces(size: int) -> None:
    app, body = App(), with_picture(150_000)
    answer = await app.request("POST", CHAT, cut(body, size), JSON_TYPE)
    assert answer.status == 200
    assert f'"{url_of(app, 0)}"'.encode() in body


async def test_large_bodies_are_decoded_one_in_an_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, numbers = App(), list[int]()
    with counted() as iterations:

        def noted(body: bytes) -> dict[str, Any]:
            numbers.append(iterations.number)
            return decode_object(body)

        monkeypatch.setattr(body_module, "decode_object", noted)
        bodies = [with_picture(3 * LARGE_BODY, seed) for seed in range(16)]
        parts = [[*cut(body, LARGE_BODY), b""] for body in bodies]
        answers = await asyncio.gather(
            *(app.request("POST", CHAT, part, JSON_TYPE) for part in parts)
        )
    assert [answer.status for answer in answers] == [200] * 16
    assert len(set(numbers)) == 16
    found = {url_of(app, call) for call in range(16)}
    assert all(any(url.encode() in body for body in bodies) for url in found)
    assert len(found) == 16


async def test_compressed_bodies_wait_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the memory that was sent would be held for each otherwise."""
    app, unpacked, begun, go_on = App(), list[bytes](), list[bytes](), threading.Event()
    unpack = encoding.decompress

    def noted(*arguments: Any) -> bytes:
        unpacked.append(unpack(*arguments))
        return unpacked[-1]

    def held(body: bytes) -> dict[str, Any]:
        begun.append(body)
        assert go_on.wait(60)
        return decode_object(body)

    monkeypatch.setattr(encoding, "decompress", noted)
    monkeypatch.setattr(body_module, "decode_object", held)
    ids = {"prompt": [1] * (2 * MANY_VALUES), "max_tokens": 1}  # read in another thread
    body, headers = gzip.compress(json.dumps(ids).encode()), {"Content-Encoding": "gzip"}
    asking = [asyncio.ensure_future(app.post("/v1/completions", body, headers)) for _ in range(16)]
    await until(lambda: len(begun) == encoding.MOST_AT_ONCE)
    assert len(unpacked) == encoding.MOST_AT_ONCE, "the others wait as they were sent"
    go_on.set()
    answers = await asyncio.gather(*asking)
    assert {answer.status for answer in answers} <= {200, 400}
    assert len(unpacked) == 16


async def test_small_bodies_do_not_wait_for_large_ones() -> None:
    app, ended = App(), list[str]()

    async def ask(name: str, parts: list[bytes]) -> None:
        assert (await app.request("POST", CHAT, parts, JSON_TYPE)).status == 200
        ended.append(name)

    large = cut(with_picture(40 * LARGE_BODY), LARGE_BODY)
    small = [json.dumps({"messages": USER}).encode()]
    await asyncio.gather(ask("large", large), ask("large", large), ask("small", small))
    assert ended == ["small", "large", "large"]


async def test_a_large_body_through_a_socket() -> None:
    async with running() as server:
        body = json.loads(with_picture(2_000_000))
        connections = [await server.send(CHAT, body) for _ in range(3)]
        for reader, writer in connections:
            assert await status_of(reader) == 200
            writer.close()
        for call in server.frontend.calls:
            source = call.prompt.conversation.refs[0].source
            assert source == body["messages"][0]["content"][0]["image_url"]["url"]


# --- many values ----------------------------------------------------------------------------------


def test_what_counts_as_many() -> None:
    assert not has_many_values(with_picture(500_000))
    assert not has_many_values(json.dumps({"prompt": [1] * MANY_VALUES}).encode())
    assert has_many_values(json.dumps({"prompt": [1] * (MANY_VALUES + 1)}).encode())
    assert not has_many_values(b"")


@pytest.mark.parametrize("num", [10, 2 * MANY_VALUES])
async def test_many_values_are_decoded_and_looked_at_in_another_thread(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, threads = App(), list[int]()

    def noted(body: bytes) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return decode_object(body)

    monkeypatch.setattr(body_module, "decode_object", noted)
    ids = list(range(num))
    answer = await app.post("/v1/completions", {"prompt": ids})
    assert answer.status == 200
    assert app.frontend.calls[0].prompt.token_ids == tuple(ids)
    assert (threads == [threading.get_ident()]) == (num == 10)


async def test_errors_about_many_values_are_the_usual_ones() -> None:
    app = App()
    ids: list[Any] = [1] * (2 * MANY_VALUES)
    for body, param in (
        ({"prompt": [*ids, "x"]}, "prompt[0]"),
        ({"prompt": ids, "n": "2"}, "n"),
        ({"prompt": ids, "model": "other"}, "model"),
        ({"prompt": [*ids, -1]}, "prompt"),
        ({"prompt": [[*ids, -1]]}, "prompt[0]"),
    ):
        answer = await app.post("/v1/completions", body)
        assert answer.status in (400, 404)
        assert answer.error["param"] == param
    answer = await app.post("/v1/completions", b'{"prompt": [' + b"1," * 5000 + b"NaN]}")
    assert (
        answer.error["message"]
        == "prompt[5000] must be a finite number; JSON has no NaN and no infinity."
    )
    assert not app.frontend.calls


@pytest.mark.parametrize("value", ["{},", "[],", '"a",', "[1,1],"])
async def test_values_without_end_are_refused_before_they_are_decoded(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App(max_body_values=10_000)
    body = b'{"messages": [' + value.encode() * 10_001 + b"0]}"
    with monkeypatch.context() as patch:
        patch.setattr(body_module, "decode_object", None)
        answer = await app.post(CHAT, body)
    assert answer.status == 413
    assert answer.error["code"] == "body_too_large"
    assert "--max-body-values" in answer.error["message"]
    assert (await app.chat()).status == 200


def test_the_limit_on_values_is_exact() -> None:
    body = b'{"a": [1, 2, {"b": 3}]}'  # three opening brackets, two commas
    check_num_values(body, 5)
    with pytest.raises(BodyTooLargeError, match="has about 5 values"):
        check_num_values(body, 4)


# --- wrong values ---------------------------------------------------------------------------------

WRONG: list[tuple[type[BaseModel], dict[str, Any], str]] = [
    (ChatBody, {"messages": [1] * 10_000}, "messages[0]"),
    (ChatBody, {"messages": [], "tools": [1] * 10_000}, "tools[0]"),
    (ChatBody, {"messages": [], "stop": [1] * 10_000}, "stop[0]"),
    (ChatBody, {"messages": [], "stop_token_ids": [1, *["1"] * 10_000]}, "stop_token_ids[1]"),
    (ChatBody, {"messages": [], "bad_words": [1] * 10_000}, "bad_words[0]"),
    (ChatBody, {"messages": [], "modalities": ["text", *["x"] * 10_000]}, "modalities[1]"),
    (ChatBody, {"messages": [], "logit_bias": {"7": 1, **{f"{i}": "" for i in range(8, 9999)}}}, "logit_bias.8"),
    (ChatBody, {"messages": [], "logit_bias": {"7": True}}, "logit_bias.7"),
    (ChatBody, {"messages": [], "media_io_kwargs": {f"{i}": 1 for i in range(9999)}}, "media_io_kwargs.0"),
    (ChatBody, {"messages": [], **{f"k{i}": 1 for i in range(10_000)}}, "k0"),
    (ChatBody, {"messages": [], "stream_options": {f"k{i}": 1 for i in range(10_000)}}, "stream_options.k0"),
    (ChatBody, {"messages": [], "response_format": {"type": "text", **{f"k{i}": 1 for i in range(99)}}},
     "response_format.k0"),
    (CompletionBody, {"prompt": "a", "allowed_token_ids": [[]] * 10_000}, "allowed_token_ids[0]"),
    (DetokenizeBody, {"tokens": ["a"] * 10_000}, "tokens[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "body", "param"), WRONG, ids=[param for *_, param in WRONG])
def test_of_many_wrong_values_the_first_is_looked_at(
    model: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate(model, body)
    assert caught.value.param == param
    cause = caught.value.__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() < 5


def test_many_right_values_stay() -> None:
    body = {
        "messages": [{"role": "user"}] * 3000,
        "logit_bias": {str(i): i % 5 for i in range(3000)},
        "media_io_kwargs": {"image": {}, "video": {}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    }
    taken = validate(ChatBody, body)
    assert len(taken.messages) == 3000
    assert taken.logit_bias == {str(i): i % 5 for i in range(3000)}
    assert taken.media_io_kwargs == {"image": {}, "video": {}}
    assert taken.response_format.json_schema.schema_ == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        ("a", "'a'"),
        (None, "None"),
        ([1, "b", 2.5], "[1, 'b', 2.5]"),
        ({"b": 1, "a": [2]}, "{'b': 1, 'a': [2]}"),
        ({}, "{}"),
        ([[[[1]]]], "[[[...]]]"),
        ({"a": {"b": {"c": 1}, "d": {}}}, "{'a': {'b': {...}, 'd': {}}}"),
        ("x" * 10**6, f"'{'x' * 76}..."),
        (list(range(10**6)), f"{str(list(range(30)))[:77]}..."),
        ({f"key{i}": i for i in range(10**5)}, f"{str({f'key{i}': i for i in range(20)})[:77]}..."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_in_messages_are_short(value: Any, text: str) -> None:
    assert abbreviate(value) == text


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"a": [1.5, 1e999]}', "a[1]"),
        ('{"a": [1, 2.0, 1e999]}', "a[2]"),
        ('{"a": [1, {"b": [0.5, -1e999]}]}', "a[1].b[1]"),
        ('{"a": {"b": 1e999}}', "a.b"),
        ('{"a": ["x", [[1e999]]]}', "a[1][0][0]"),
    ],
)
def test_numbers_that_are_not_finite_are_found(text: str, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_object(text.encode())
    assert caught.value.param == param


def test_numbers_of_any_size_are_finite() -> None:
    text = f'{{"a": [1, {10**400}, "x", null, true], "b": [0.5, {10**400}], "c": [], "d": [{{}}]}}'
    assert decode_object(text.encode())["a"][1] == 10**400
