"""Hosts that are slow, endless, wrong about what they send, or gone.

Each download ends, at the cost of its request.
"""

from __future__ import annotations

import gzip
import socket
import threading
import zlib
from collections.abc import Callable

import pytest

from tests.reliability.asking import Answer, Offline, Service, image, place, text, until, video
from tests.reliability.listeners import Host, Internet
from tests.reliability.media import encoded, picture, picture_url, png, png_chunk

GOOD = encoded(picture())
HEAD = b"HTTP/1.1 200 OK\r\n"
MUCH = bytes(1 << 16)


def send_later(host: Host, path: str, head: bytes, body: bytes) -> str:
    """Answer with a head that arrives alone, then a body, and leave the connection open."""

    def script(connection: socket.socket) -> None:
        connection.sendall(head)
        host.closing.wait(0.05)
        connection.sendall(body)
        connection.recv(1)

    return host.act(path, script)


def silent(host: Host) -> str:
    return host.act("/silent", lambda connection: host.closing.wait() and None)


SLOW: dict[str, Callable[[Host], str]] = {
    "no answer": silent,
    "a head without end": lambda host: host.drip("/head", HEAD, b"X-More: 1\r\n"),
    "a body in drops": lambda host: host.drip("/drops", HEAD + b"\r\n", b"x"),
    "a body that promises more": lambda host: host.drip(
        "/more", HEAD + b"Content-Length: 1000000\r\n\r\n", b""
    ),
    "chunks in drops": lambda host: host.drip(
        "/chunks", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"
    ),
}


def test_slow_hosts_end_at_the_deadline_and_delay_no_other(
    served: Service, media_host: Host
) -> None:
    """Slow loris: the deadline is that of the whole download, not of each read.

    Others are served meanwhile.
    """
    parts = {name: image(make(media_host)) for name, make in SLOW.items()}
    answers: dict[str, Answer] = {}

    def ask(name: str) -> None:
        answers[name] = served.ask(parts[name])

    threads = [threading.Thread(target=ask, args=(name,)) for name in parts]
    for thread in threads:
        thread.start()
    until(lambda: {"/silent", "/head", "/drops", "/more", "/chunks"} <= set(media_host.paths))
    assert served.ask(image(picture_url()), text("What is this?")).status == 200
    for thread in threads:
        thread.join()
    assert set(answers) == set(SLOW)
    for name, answer in answers.items():
        answer.is_refusal(424, "media_fetch_timeout", place(parts[name]))
        assert "4.5 s" in answer.error["message"]


LARGE: dict[str, Callable[[Host], str]] = {
    "endless": lambda host: host.pour("/endless", HEAD + b"\r\n", MUCH),
    "endless chunks": lambda host: host.pour(
        "/endless-chunks",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        b"10000\r\n" + MUCH + b"\r\n",
    ),
    "endless and compressed": lambda host: host.pour(
        "/endless-gzip", HEAD + b"Content-Encoding: gzip\r\n\r\n", MUCH
    ),
    "a promised size": lambda host: host.send(
        "/promise", HEAD + b"Content-Length: 99999999999\r\n\r\n"
    ),
    "a gzip bomb": lambda host: host.serve(
        "/gzip", gzip.compress(bytes(10_000_000), 9), "Content-Encoding: gzip"
    ),
    "a zlib bomb": lambda host: host.serve(
        "/zlib", zlib.compress(bytes(10_000_000), 9), "Content-Encoding: deflate"
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_downloads_end_at_the_limit(served: Service, media_host: Host, name: str) -> None:
    """Bytes are counted as they come, and after they are unpacked; no header is believed."""
    part = image(LARGE[name](media_host))
    answer = served.ask(part)
    answer.is_refusal(413, "media_too_large", place(part))
    assert "--max-media-bytes" in answer.error["message"]


BROKEN: dict[str, Callable[[Host], str]] = {
    "absent": lambda host: host.url("/absent"),
    "forbidden": lambda host: host.serve("/forbidden", b"", status="403 Forbidden"),
    "an error": lambda host: host.serve("/error", b"secret trace", status="500 Error"),
    "no content": lambda host: host.serve("/none", b"", status="204 No Content"),
    "half": lambda host: host.serve("/half", GOOD, "Content-Range: x", status="206 Partial"),
    "a body cut off": lambda host: host.send(
        "/cut", HEAD + b"Content-Length: 1000000\r\n\r\n", GOOD[:100]
    ),
    "chunks cut off": lambda host: host.send(
        "/cut-chunk", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"ffff\r\nabc"
    ),
    "a wrong chunk": lambda host: host.send(
        "/wrong-chunk", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nabc\r\n0\r\n\r\n"
    ),
    "a wrong chunk after the head": lambda host: send_later(
        host, "/late-chunk", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nabc\r\n0\r\n\r\n"
    ),
    "two lengths": lambda host: host.send(
        "/two", HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"
    ),
    "a negative length": lambda host: host.send(
        "/negative", HEAD + b"Content-Length: -5\r\n\r\nabcd"
    ),
    "no HTTP": lambda host: host.send("/other", b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nothing": lambda host: host.send("/nothing"),
    "damaged gzip": lambda host: host.serve("/gzip-bad", GOOD, "Content-Encoding: gzip"),
    "half of a gzip": lambda host: host.serve(
        "/gzip-half", gzip.compress(GOOD)[:-20], "Content-Encoding: gzip"
    ),
    "an unknown encoding": lambda host: host.serve("/br", GOOD, "Content-Encoding: br"),
    "a loop to nowhere": lambda host: host.redirect("/nowhere", "http://"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_answers_are_the_hosts_fault(served: Service, media_host: Host, name: str) -> None:
    """424, after tries within the deadline; what the host sent is not repeated."""
    part = image(BROKEN[name](media_host))
    answer = served.ask(part)
    assert answer.error["code"] in ("media_fetch_failed", "media_refused"), answer.body
    assert answer.status in (424, 400)
    assert answer.error["param"] == place(part)
    answer.is_discreet()
    assert "secret" not in answer.error["message"]


def test_bytes_beyond_the_length_are_dropped(served: Service, media_host: Host) -> None:
    """A picture longer than its Content-Length is no HTTP, or a picture that is cut.

    Never the next answer.
    """
    part = image(media_host.send("/short", HEAD + b"Content-Length: 60\r\n\r\n" + GOOD))
    answer = served.ask(part)
    answer.is_discreet()
    assert answer.error["code"] in ("media_undecodable", "media_fetch_failed")


def test_redirects_end(served: Service, media_host: Host) -> None:
    """A loop of redirects is followed five times."""
    part = image(media_host.redirect("/round", "/round"))
    before = media_host.paths.count("/round")
    served.ask(part).is_refusal(400, "media_refused", place(part))
    assert media_host.paths.count("/round") - before == 6


def test_transient_failures_are_tried_again(served: Service, media_host: Host) -> None:
    """A host that is busy once costs nobody an answer."""
    answers = [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"]

    def script(connection: socket.socket) -> None:
        head = HEAD + f"Content-Length: {len(GOOD)}\r\n\r\n".encode()
        connection.sendall(answers.pop() if answers else head + GOOD)

    part = image(media_host.act("/busy-once", script))
    assert served.ask(part, text("What is this?")).status == 200
    assert media_host.paths.count("/busy-once") == 2


def test_each_item_counts_against_the_requests_limit(served: Service, media_host: Host) -> None:
    """Many downloads below the limit of one do not add up beyond that of a request."""
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(31 * 10)))
    large = [png(10, 10, pixels, png_chunk(b"prVt", bytes([i]) * (3 << 20))) for i in range(4)]
    assert served.ask(image(media_host.serve("/large", large[0]))).status == 200
    parts = [image(media_host.serve(f"/large{i}", data)) for i, data in enumerate(large)]
    answer = served.ask(*parts)
    assert answer.error["param"].startswith("messages[0].content["), answer.body
    answer.is_refusal(413, "media_too_large", answer.error["param"])
    assert "--max-request-media-bytes" in answer.error["message"]


def test_hosts_that_are_not_there(offline: Offline, internet: Internet) -> None:
    """Unknown names and closed ports are errors of the download, without the name's address."""
    part = image("http://nowhere.example/x")
    offline.ask(part).is_refusal(424, "media_fetch_failed", place(part))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    internet.names = {"gone.example": [["93.184.216.34"]]}
    internet.moved = {"93.184.216.34": port}
    part = video("http://gone.example/x")
    offline.ask(part).is_refusal(424, "media_fetch_failed", place(part))
    assert set(internet.connected) == {"93.184.216.34"}
