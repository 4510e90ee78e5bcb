"""The judge of answers sees what must not be, and lets pass what may."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.fuzz.messages import leak_in
from tests.fuzz.requests import BODIES, RequestMaker, Sent, Target
from tests.fuzz.verdict import Answer, what_is_wrong

BODY = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": None}]}]}
SENT = Sent("/v1/chat/completions", json.dumps(BODY).encode(), value=BODY)
PLACE = "messages[0].content[0].image_url"


def answer(status: int, **changes: Any) -> Answer:
    error = {
        "message": "The image is damaged.",
        "type": "invalid_request_error",
        "param": PLACE,
        "code": "media_undecodable",
    }
    return Answer(status, {}, json.dumps({"error": {**error, **changes}}).encode())


def test_a_good_error_passes() -> None:
    assert not what_is_wrong(SENT, answer(400))
    assert not what_is_wrong(SENT, answer(503, code="overloaded", param=None))
    assert not what_is_wrong(SENT, answer(400, param=f"{PLACE}.url.anything"))


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (answer(500, code="internal_error", param=None), "status 500"),
        (answer(502), "status 502"),
        (answer(404), "code 'media_undecodable' with status 404"),
        (answer(400, code="surprise"), "code 'surprise'"),
        (answer(400, param=None), "no place"),
        (answer(400, param="messages[1].content"), "no place"),
        (answer(400, code="invalid_request", param=None), "without a place"),
        (answer(400, param=5), "param 5"),
        (answer(400, message=""), "a message of 0"),
        (answer(400, message="x" * 3000), "a message of 3000"),
        (answer(400, message="<_io.BytesIO object at 0x7f01>"), "an address"),
        (Answer(400, {}, b'{"error": {}}'), "other members"),
        (Answer(400, {}, b'{"detail": 1}'), "another shape"),
        (Answer(400, {}, b"{nothing"), "no JSON"),
        (Answer(400, {}, b"Bad Request"), "no JSON"),
        (Answer(0, lost="reset"), "no answer"),
        (Answer(200, {}, b'{"id": 1}'), "without ['choices'"),
        (Answer(200, {}, b"{"), "no JSON"),
        (Answer(200, {"content-type": "text/event-stream"}, b"data: {}\n\n"), "a stream that ends"),
    ],
)
def test_what_must_not_be(found: Answer, what: str) -> None:
    assert what in what_is_wrong(SENT, found)


def test_errors_within_a_stream() -> None:
    good = json.loads(answer(400).body)
    for event, wrong in (
        (good, ""),
        ({"error": {**good["error"], "code": "internal_error"}}, "code"),
    ):
        body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
        found = what_is_wrong(SENT, Answer(200, {"content-type": "text/event-stream"}, body))
        assert found.startswith(wrong)
        assert bool(found) == bool(wrong)


@pytest.mark.parametrize(
    "message",
    [
        "failed at 0x7f3a10",
        "no such file: /usr/lib/x",
        "in image.py",
        "libav says no",
        "KeyError",
        "refused by 169.254.169.254",
    ],
)
def test_what_a_message_gives_away(message: str) -> None:
    assert leak_in(message)
    assert not leak_in(message, sent=message)  # the client's own words are no secret


def test_usual_messages_give_nothing_away() -> None:
    for message in (
        "The image has 9 x 9 pixels; at most 4 pixels are allowed (--max-image-pixels).",
        "The bytes are not an image in a known format (PNG, JPEG, WEBP).",
        "messages[0].content[1].image_url must be a URL or an object with 'url', got int.",
        "The path '/v1/chat' does not exist. Did you mean '/v1/chat/completions'?",
        "Content-Type must be application/json, got 'text/plain'.",
    ):
        assert not leak_in(message), message


def test_requests_are_functions_of_their_seed_and_can_be_kept() -> None:
    target = Target(("image", "video"))
    paths = set()
    for seed in range(60):
        first, second = (RequestMaker(target, random.Random(seed)).make() for _ in range(2))
        assert first == second
        assert Sent.from_json(json.loads(json.dumps(first.to_json()))).body == first.body
        paths.add(first.path)
    assert paths >= set(BODIES) - {"/v1/embeddings", "/detokenize"}
