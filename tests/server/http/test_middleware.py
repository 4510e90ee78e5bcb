"""Compressed bodies, HEAD, and what the access log says of a request that was refused."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from typing import Any

import pytest

from sensorium.errors import EngineDeadError
from sensorium.server.access_log import redacted_param
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import USER, App, running, status_of

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"messages": USER, "max_tokens": 4}).encode()


async def sent(app: App, body: bytes, encoding: str) -> Any:
    return await app.post(CHAT, body, {**JSON, "Content-Encoding": encoding})


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("x-gzip", gzip.compress(BODY, mtime=0)),
        ("GZIP", gzip.compress(BODY[:9], mtime=0) + gzip.compress(BODY[9:], mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", zlib.compress(BODY, wbits=-15)),
        ("identity", BODY),
    ],
)
async def test_compressed_bodies_are_read(encoding: str, body: bytes) -> None:
    app = App()
    answer = await sent(app, body, encoding)
    assert answer.status == 200, answer.body
    assert app.frontend.calls[0].params.max_tokens == 4


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
async def test_other_encodings_are_415(encoding: str) -> None:
    answer = await sent(App(), BODY, encoding)
    assert answer.status == 415
    assert answer.error["code"] == "unsupported_encoding"
    assert "gzip or deflate" in answer.error["message"]


@pytest.mark.parametrize("body", [gzip.compress(BODY, mtime=0)[:-9], b"\x1f\x8bnot", BODY, b""])
async def test_damaged_bodies_are_the_clients_fault(body: bytes) -> None:
    answer = await sent(App(), body, "gzip")
    assert answer.status == 400
    assert "Content-Encoding" in answer.error["message"]


async def test_what_becomes_too_large_is_413() -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "a" * (4 << 20)}]}).encode()
    small = gzip.compress(large)
    assert len(small) < 16 * 1024
    times = await sent(App(), small, "gzip")
    whole = await sent(App(max_body_bytes=1 << 20), small, "gzip")
    for answer in (times, whole):
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")


async def test_head_is_get_without_a_body() -> None:
    app = App()
    paths = (await app.get("/openapi.json")).json()["paths"]
    tried = [path for path, verbs in paths.items() if "get" in verbs and "{" not in path]
    assert {"/health", "/v1/models", "/metrics", "/version"} <= set(tried)
    for path in [*tried, "/openapi.json", "/"]:
        head, get = await app.request("HEAD", path), await app.get(path)
        assert head.status == get.status == 200, path
        assert head.body == b""
        if path != "/metrics":  # it counts the requests, this one too
            assert head.headers["content-length"] == get.headers["content-length"]
    refused = await app.request("HEAD", CHAT)
    assert (refused.status, refused.headers["allow"], refused.body) == (405, "POST", b"")
    assert (await app.post("/v1/models", {})).headers["allow"] == "GET, HEAD"


async def test_head_over_a_socket() -> None:
    async with running() as server:
        reader, _ = await server.send(
            "/v1/models", None, method="HEAD", headers="Connection: close\r\n"
        )
        assert await status_of(reader) == 200
        rest = await reader.read()
        assert b"content-length" in rest.lower()
        assert b"demo" not in rest


async def test_head_needs_the_key() -> None:
    app = App(api_key=("k",))
    assert (await app.request("HEAD", "/v1/models")).status == 401
    assert (await app.request("HEAD", "/health")).status == 200


SECRET = "my diagnosis"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": USER, "temperature": SECRET}, "400 code=invalid_request param=temperature"),
    ({"messages": [{"role": "user", "content": [{"type": SECRET}]}]}, "400 code=invalid_request"),
    ({"messages": USER, SECRET: 1}, "400 code=invalid_request param=*"),
    ({"messages": USER, "logit_bias": {SECRET: 1}}, "400 code=invalid_request"),
    ({"messages": USER, "model": SECRET}, "404 code=model_not_found param=model"),
    ({"messages": USER, "guided_regex": ""}, "400 code=invalid_request param=guided_regex"),
]


@pytest.mark.parametrize(("body", "expected"), REFUSED, ids=lambda v: str(v)[-40:])
async def test_the_access_log_has_code_and_place(
    body: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(disable_access_log=False)
    with caplog.at_level(logging.INFO, "sensorium.access"):
        await app.post(CHAT, body)
    [line] = [record.getMessage() for record in caplog.records]
    status, _, words = expected.partition(" ")
    assert f" {status} " in line
    assert line.endswith(words) or words in line
    assert SECRET not in line
    assert "diagnosis" not in line


async def test_an_error_amid_a_stream_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    def ends(call: object) -> None:
        raise EngineDeadError("The engine is gone.")

    app = App(FakeFrontend(between=ends), disable_access_log=False)
    with caplog.at_level(logging.INFO, "sensorium.access"):
        answer = await app.post(CHAT, {"messages": USER, "stream": True})
    assert answer.status == 200
    [line] = [r.getMessage() for r in caplog.records if r.name == "sensorium.access"]
    assert line.endswith(" code=engine_unavailable")


async def test_other_refusals_are_told_too(caplog: pytest.LogCaptureFixture) -> None:
    app = App(disable_access_log=False, api_key=("k",), max_body_bytes=100)
    with caplog.at_level(logging.INFO, "sensorium.access"):
        await app.post(CHAT, {})
        await app.post(CHAT, {"a": "b" * 200}, {"Authorization": "Bearer k"})
        await app.get("/v1/secret-path", {"Authorization": "Bearer k"})
        await app.get("/health")
    codes = [record.getMessage().partition(" code=")[2] for record in caplog.records]
    assert codes == ["invalid_api_key", "body_too_large", "not_found", ""]


@pytest.mark.parametrize(
    ("param", "shown"),
    [
        (None, None),
        ("messages[0].content[1].image_url", "messages[0].content[1].image_url"),
        ("tools[0].function.parameters.properties.ssn", "tools[0].function.parameters.*.*"),
        ("response_format.json_schema.schema", "response_format.json_schema.schema"),
        ("logit_bias[four]", "*"),
        ("my words", "*"),
        ("temperature\nfake", "*"),
        (".".join(["json"] * 50), ".".join(["json"] * 8 + ["*"])),
    ],
)
def test_places_are_shown_in_names_of_the_api(param: str | None, shown: str | None) -> None:
    assert redacted_param(param) == shown
