"""Keys, paths, methods, headers: what comes around the body of a request, over real sockets."""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import socket
from urllib.parse import urlsplit

import pytest

from sensorium.server.http.auth import ApiKeys
from tests.reliability.asking import CHAT, SECRETS, Service

BODY = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
MOST_HEADER_BYTES = 64 * 1024


def raw(served: Service, head: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and the rest of the answer to bytes as they are.

    0 when the connection was closed without one.
    """
    parts = urlsplit(served.server.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), 30) as connection:
        connection.sendall(head.encode("latin-1") + body)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    first, _, rest = received.partition(b"\r\n")
    return (int(first.split(b" ")[1]) if first else 0), rest


def asked(served: Service, line: str, *headers: str, body: bytes = BODY) -> tuple[int, bytes]:
    lines = [
        f"{line} HTTP/1.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    ]
    return raw(served, "\r\n".join(lines) + "\r\n\r\n", body)


PATHS = [
    *("//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat/completions?x=/health"),
    *("/health/../v1/chat/completions", "/health/%2e%2e/v1/chat/completions", "/health;/v1/chat/completions"),
    *("/health%2f..%2fv1%2fchat%2fcompletions", "/%76%31/chat/completions", "/v1/chat/completions%00/health"),
    *("/v1/chat/completions#/health", "/V1/CHAT/COMPLETIONS", "/ping/v1/chat/completions", "/v1\\chat\\completions"),
    *("http://localhost/v1/chat/completions", "http://x/health/../v1/chat/completions", "/./v1/chat/completions"),
    *("/health//v1/chat/completions", "/v1/chat/completions\t", "*", "/.", "/health/v1/models"),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_spelling_of_a_path_leads_around_the_key(served: Service, path: str) -> None:
    for method in ("POST", "GET"):
        status, rest = asked(served, f"{method} {path}", "Host: x")
        assert status in (400, 401), rest
        assert b"choices" not in rest


@pytest.mark.parametrize(
    "method", ["post", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "X" * 100]
)
def test_no_method_leads_around_the_key(served: Service, method: str) -> None:
    for path in (CHAT, "/v1/models", "/metrics"):
        status, rest = asked(served, f"{method} {path}", "Host: x")
        assert status in (400, 401, 405), rest
        assert b"choices" not in rest


@pytest.mark.parametrize(
    "host",
    [
        "x/health?", "x/health#", "x\\@/health", "/health", "127.0.0.1/health?x=", "[::1", "x:99999", "x y", "", "\xff",
        "health", "localhost/v1/../health", "x" * 1000,
    ],
)  # fmt: skip
def test_no_host_header_leads_around_the_key(served: Service, host: str) -> None:
    """The path that is checked is the one of the request line; no part of it is taken from Host."""
    status, rest = asked(served, f"POST {CHAT}", f"Host: {host}")
    assert status in (400, 401), rest
    status, rest = asked(served, "GET /v1/models", f"Host: {host}", body=b"")
    assert status in (400, 401), rest
    key = f"Authorization: Bearer {served.keys[0]}"
    status, rest = asked(served, "GET /v1/models", f"Host: {host}", key, body=b"")
    assert status in (200, 400), rest


@pytest.mark.parametrize(
    "headers",
    [
        ["Authorization: Bearer wrong", "Authorization: Bearer {key}"],
        ["Authorization: {key}"],
        ["Authorization: Basic {key}"],
        ["Authorization: Bearer {key}x"],
        ["Authorization: Bearer {key},{key}"],
        ["X-Api-Key: {key}"],
        ["Proxy-Authorization: Bearer {key}"],
        ["Cookie: Authorization=Bearer {key}"],
        ["X-Original-URL: /health", "X-Rewrite-URL: /health"],
        ["X-Forwarded-Prefix: /health", "X-Forwarded-Host: /health", "X-HTTP-Method-Override: GET"],
        ["Authorization: Bearer " + "k" * 60_000],
    ],
)
def test_other_headers_are_no_key(served: Service, headers: list[str]) -> None:
    own = [header.replace("{key}", served.keys[0]) for header in headers]
    status, rest = asked(served, f"POST {CHAT}", "Host: x", *own)
    assert status == 401, rest
    assert served.keys[0].encode() not in rest


def test_the_comparison_of_keys_takes_the_same_time_whatever_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Digests of one length are compared, each with each of the keys, by the function that takes
    constant time.
    """
    compared: list[tuple[bytes, bytes]] = []
    same = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return same(one, other)

    monkeypatch.setattr("sensorium.server.http.auth.hmac.compare_digest", noted)
    keys = ApiKeys(["first", "second", "third"])
    for presented, right in ((b"first", True), (b"f", False), (b"third", True), (b"", False)):
        compared.clear()
        assert keys.accepts(presented) is right
        assert len(compared) == 3, "an early match must not end the comparison"
        assert {len(value) for pair in compared for value in pair} == {32}
        assert presented not in {value for pair in compared for value in pair}


@pytest.mark.parametrize(
    "headers",
    [
        ["X-Big: " + "a" * (MOST_HEADER_BYTES + 6000)],
        [f"X-{number}: {'a' * 1000}" for number in range(80)],
        ["Cookie: " + "a=b; " * 20_000],
        ["X" * (MOST_HEADER_BYTES + 6000) + ": a"],
        ["Host: " + "x" * (MOST_HEADER_BYTES + 6000)],
    ],
    ids=["long", "many", "cookies", "name", "host"],
)
def test_headers_over_the_limit(served: Service, headers: list[str]) -> None:
    if not headers[0].startswith("Host"):
        headers = ["Host: x", *headers]
    status, rest = asked(served, "GET /health", *headers, body=b"")
    assert (status, b"headers_too_large" in rest) == (431, True), rest[:300]


def test_a_request_line_over_the_limit(served: Service) -> None:
    status, _ = asked(
        served, "GET /health?" + "a" * (MOST_HEADER_BYTES + 6000), "Host: x", body=b""
    )
    assert status == 431


def test_a_body_over_the_limit(served: Service) -> None:
    """Refused by its declared length, before any of it is read, and while it comes when it has
    none.
    """
    key = f"Authorization: Bearer {served.keys[0]}"
    head = [
        f"POST {CHAT} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        key,
        "Connection: close",
    ]
    declared = "\r\n".join([*head, f"Content-Length: {1 << 40}"]) + "\r\n\r\n"
    status, rest = raw(served, declared)
    assert (status, b"body_too_large" in rest) == (413, True), rest
    assert not SECRETS.search(rest.partition(b"\r\n\r\n")[2].decode())
    status, rest = endless_chunks(served, "\r\n".join([*head, "Transfer-Encoding: chunked"]))
    assert (status, b"body_too_large" in rest) == (413, True), rest


def endless_chunks(served: Service, head: str) -> tuple[int, bytes]:
    """Status and answer to a request whose body has no end and no declared length, as long as it
    is taken.
    """
    parts = urlsplit(served.server.url)
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    received = b""
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), 30) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1024):
                connection.sendall(chunk)
                if select.select([connection], [], [], 0)[0]:
                    break
        with contextlib.suppress(ConnectionError):  # what was sent and not read ends the connection
            while piece := connection.recv(65536):
                received += piece
    return int(received.split(b" ", 2)[1] if received else 0), received


@pytest.mark.parametrize(
    "framing",
    [
        ["Content-Length: 5", "Content-Length: 500"],
        ["Content-Length: -1"],
        ["Content-Length: 1e3"],
        ["Content-Length: " + "9" * 30],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
    ],
    ids=lambda framing: framing[0][:30],
)
def test_two_ways_to_read_where_a_request_ends_are_refused(
    served: Service, framing: list[str]
) -> None:
    """Else what one reader takes for a body another takes for a second request, with no key."""
    second = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", "Connection: close", *framing]
    status, rest = raw(served, "\r\n".join(lines) + "\r\n\r\n", b"0\r\n\r\n" + second + BODY)
    assert status in (400, 401, 413, 501), rest
    assert b"choices" not in rest
