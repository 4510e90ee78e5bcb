"""Hosts that do not keep to HTTP, or keep to it in ways that cost.

The fetcher's own tests are in test_fetcher.py.
"""

import asyncio
import contextlib
import gc
import gzip
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import (
    MediaFetchError,
    MediaFetchTimeoutError,
    MediaRefusedError,
    MediaTooLargeError,
    OverloadedError,
)
from sensorium.multimodal.fetch import client as http
from sensorium.multimodal.fetch import resolver
from sensorium.multimodal.fetch.budget import ByteBudget
from sensorium.multimodal.fetch.guard import Guard
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import (
    BytesFetcher,
    FakeResolver,
    MediaServer,
    raw_server,
)

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def make(workers: ThreadWorkers) -> Iterator:
    made: list[BytesFetcher] = []

    def build(*, names: FakeResolver | None = None, **config) -> BytesFetcher:
        made.append(BytesFetcher(workers, names, **config))
        return made[-1]

    yield build
    for fetcher in made:
        fetcher.close()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: -1\r\n\r\nx",
        OK + b"Content-Length: +1\r\n\r\nx",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
        OK + b"Content-Length: 99999999999999999999999\r\n\r\nx",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort",
        OK + b"".join(b"A%d: b\r\n" % i for i in range(20_000)) + b"\r\nx",
        OK + b"A\x00B: c\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nx",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 " + b"2" * 100_000,
        b"\r\n" * 100_000,
    ],
)
async def test_damaged_answers(make, answer: bytes) -> None:
    async with raw_server(answer) as server:
        fetcher = make(media_fetch_retries=0, max_media_bytes=1000)
        with pytest.raises((MediaFetchError, MediaTooLargeError)) as caught:
            await fetcher.fetch(f"http://127.0.0.1:{server.port}/", "image")
    assert "127" not in caught.value.message
    assert str(server.port) not in caught.value.message


@pytest.mark.parametrize(
    "piece",
    [
        b"A: b\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1;x",
    ],
)
async def test_answers_without_an_end(make, piece: bytes) -> None:
    """Headers, interim answers, trailers and extensions that go on for ever."""
    first, again = (piece, b"A: b\r\n") if piece.startswith(OK) else (OK, piece)
    if piece.startswith(b"HTTP/1.1 100"):
        first = piece

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(first)
            while True:
                writer.write(again * 1000)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    fetcher = make(media_fetch_retries=0, image_fetch_timeout=0.2)
    with pytest.raises((MediaFetchError, MediaFetchTimeoutError)):
        await fetcher.fetch(f"http://127.0.0.1:{port}/", "image")
    listener.close()


async def test_what_follows_a_body_is_not_the_next_answer(make) -> None:
    """The length is too short: what comes behind must not be taken for the answer to another
    request.
    """
    trick = OK + b"Content-Length: 3\r\n\r\nabc" + OK + b"Content-Length: 4\r\n\r\nevil"
    async with raw_server(trick, keep_open=True) as server, raw_server(keep_open=True) as slow:
        fetcher = make(image_fetch_timeout=60.0)
        holds = asyncio.create_task(fetcher.fetch(f"http://127.0.0.1:{slow.port}/", "image"))
        while not slow.writers:  # the session, and with it the connections, stay open meanwhile
            await asyncio.sleep(0)
        for _ in range(3):
            assert await fetcher.fetch(f"http://127.0.0.1:{server.port}/", "image") == b"abc"
        holds.cancel()
        await asyncio.gather(holds, return_exceptions=True)


async def test_a_host_that_resets_connections_leaves_no_error_in_the_log(
    workers: ThreadWorkers,
) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    guard = Guard(frozenset({"127.0.0.1"}))
    client = http.HttpClient(MediaConfig(media_fetch_retries=0), guard, workers)
    with ByteBudget(1000).share() as share:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"Content-Length: 9\r\n\r\nabc")
            while not share.num_bytes:  # the client is in the body
                await asyncio.sleep(0)
            at_once = struct.pack("ii", 1, 0)
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writer.transport.abort()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = URL(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/")
        with pytest.raises(MediaFetchError, match="broke off"):
            await client.download(url, share, seconds=60.0)
        listener.close()
    client.close()
    await asyncio.sleep(0)
    gc.collect()
    assert problems == []


def num_bodies() -> int:
    """Bodies of answers that something still refers to."""
    gc.collect()
    return sum(type(each) is aiohttp.StreamReader for each in gc.get_objects())


async def test_downloads_over_one_connection_leave_nothing_on_it(workers: ThreadWorkers) -> None:
    guard = Guard(frozenset({"127.0.0.1"}))
    client = http.HttpClient(MediaConfig(), guard, workers)
    num_connections = 0
    with ByteBudget(1000).share() as share, ByteBudget(1000).share() as other:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_connections
            num_connections += 1
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while b"/held" not in await reader.readuntil(b"\r\n\r\n"):
                    before = share.num_bytes
                    writer.write(OK + b"Content-Length: 3\r\n\r\na")
                    while share.num_bytes == before:  # the client is in the body
                        await asyncio.sleep(0)
                    writer.write(b"bc")
                await reader.read()
            writer.close()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = URL(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/")
        # The session, and with it the connections, stay open meanwhile.
        held = asyncio.create_task(client.download(url / "held", other, seconds=60.0))
        while not num_connections:
            await asyncio.sleep(0)
        await client.download(url, share, seconds=60.0)
        after_one = num_bodies()
        for _ in range(20):
            await client.download(url, share, seconds=60.0)
        assert num_bodies() <= after_one + 1
        assert num_connections == 2
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        listener.close()
    client.close()


async def test_answers_are_read_in_a_thread_of_their_own(make, server: MediaServer) -> None:
    server.serve("/a", b"x")
    threads: list[str] = []

    class Noting(FakeResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0):
            threads.append(threading.current_thread().name)
            return await super().resolve(host, port, family)

    names = Noting({"a.example": [["127.0.0.1"]]})
    fetcher = make(names=names, allowed_media_domains=("a.example",))
    assert await fetcher.fetch(server.url("/a", "a.example"), "image") == b"x"
    assert threads == ["sensorium-downloads"]


async def test_a_large_body_in_many_pieces(make, server: MediaServer) -> None:
    body = bytes(range(251)) * 20_000

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(body), 70_000):
            await response.write(body[start : start + 70_000])
        return response

    server.handlers["/a"] = handler
    assert await make().fetch(server.url("/a"), "image") == body


# --- redirects ------------------------------------------------------------------------------------


def redirect(server: MediaServer, path: str, target: str) -> None:
    server.serve(path, b"", status=302, headers={"Location": target})


@pytest.mark.parametrize("target", ["/r", "", "#x", "?x", "//127.0.0.1:{port}/r", "./r"])
async def test_redirects_in_a_circle_end(make, server: MediaServer, target: str) -> None:
    redirect(server, "/r", target.format(port=server.port))
    with pytest.raises(MediaRefusedError, match="5 times"):
        await make().fetch(server.url("/r"), "image")
    assert len(server.paths) == 6


@pytest.mark.parametrize("num", [0, 1, 7])
async def test_the_number_of_redirects_can_be_set(make, server: MediaServer, num: int) -> None:
    for i in range(9):
        redirect(server, f"/{i}", f"/{i + 1}")
    with pytest.raises(MediaRefusedError, match=f"{num} times"):
        await make(max_media_redirects=num).fetch(server.url("/0"), "image")
    assert len(server.paths) == num + 1


@pytest.mark.parametrize(
    "target",
    [
        "HTTP://127.0.0.2/",
        "//127.0.0.1\\@127.0.0.2/",
        "//127.0.0.2",
        "//u@127.0.0.1/",
        "file:/etc/passwd",
        "FILE:///etc/passwd",
        "data:,x",
        "javascript:x",
        "http://127.0.0.1:port/",
        "http://[::1",
        "http://[::1%25lo]/",
        "http://①②⑦.⓪.⓪.②/",
        "http://127.0.0.1:{port}\\@127.0.0.2/",
    ],
)
async def test_places_that_are_not_gone_to(make, server: MediaServer, target: str) -> None:
    redirect(server, "/r", target.format(port=server.port))
    with pytest.raises((MediaRefusedError, MediaFetchError)):
        await make().fetch(server.url("/r"), "image")
    assert server.paths == ["/r"]


@pytest.mark.parametrize("target", ["http:x", "http:/x", "///127.0.0.2/x", "x/../.%2e/x", "/\\x"])
async def test_what_names_no_host_stays_at_its_own(make, server: MediaServer, target: str) -> None:
    redirect(server, "/r", target)
    with pytest.raises((MediaRefusedError, MediaFetchError)):
        await make().fetch(server.url("/r"), "image")
    assert server.paths[0] == "/r"


@pytest.mark.parametrize("target", ["http://8.8.8.8/", "//8.8.8.8/", "/x"])
def test_nothing_leads_from_https_to_http(target: str) -> None:
    secure = URL("https://example.com/a")
    if target.startswith("http:"):
        with pytest.raises(MediaRefusedError, match="https to http"):
            http.redirected(Guard(), secure, target)
    else:
        assert http.redirected(Guard(), secure, target).scheme == "https"
    plain = URL("http://example.com/")
    assert http.redirected(Guard(), plain, "https://example.com/x").scheme == "https"


# --- the second lock ------------------------------------------------------------------------------


async def test_a_socket_looks_at_its_address_itself(make, monkeypatch) -> None:
    """Whatever lets an address slip through before: no connection is made."""
    monkeypatch.setattr(Guard, "check_addresses", lambda *args: None)
    names = FakeResolver({"a.example": [["127.0.0.1"]], "b.example": [["127.0.0.1", "::1"]]})
    async with raw_server() as trap:
        fetcher = make(names=names, allowed_media_domains=())
        for host in names.answers:
            with pytest.raises(MediaRefusedError) as caught:
                await fetcher.fetch(f"http://{host}:{trap.port}/", "image")
            assert "127" not in caught.value.message
        assert trap.num_connections == 0
    assert len(names.questions) == 2  # a refusal is not tried again


def test_a_socket_is_never_given_a_name() -> None:
    for guard in (Guard(), Guard(allowed_domains=frozenset({"8.8.8.8."}))):
        with pytest.raises(resolver.ForbiddenAddressError):
            resolver.guarded_socket(guard)((2, 1, 6, "", ("8.8.8.8.", 80)))
    resolver.guarded_socket(Guard())((2, 1, 6, "", ("8.8.8.8", 80))).close()


# --- limits ---------------------------------------------------------------------------------------


async def test_a_download_is_tried_again_as_often_as_is_said(make, server: MediaServer) -> None:
    server.serve("/a", b"", status=503)
    for num in (0, 2):
        server.paths.clear()
        with pytest.raises(MediaFetchError, match="503"):
            await make(media_fetch_retries=num).fetch(server.url("/a"), "image")
        assert len(server.paths) == num + 1


async def test_unfinished_downloads_are_bounded_together(make, server: MediaServer) -> None:
    arrived, release = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(bytes(800))
        arrived.set()
        await release.wait()
        return response

    server.handlers["/held"] = handler
    server.serve("/a", bytes(800))
    fetcher = make(max_media_bytes_in_flight=1000, image_fetch_timeout=60.0)
    held = asyncio.create_task(fetcher.fetch(server.url("/held"), "image"))
    await arrived.wait()
    while fetcher.budget.num_bytes != 800:
        await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await fetcher.fetch(server.url("/a"), "image")
    release.set()
    assert len(await held) == 800
    assert len(await fetcher.fetch(server.url("/a"), "image")) == 800
    assert fetcher.budget.num_bytes == 0


async def test_unpacked_bytes_count(make, server: MediaServer, workers: ThreadWorkers) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    packed = gzip.compress(bytes(5000))
    server.handlers["/a"] = handler
    fetcher = make(max_media_bytes_in_flight=4999)
    with pytest.raises(OverloadedError):
        await fetcher.fetch(server.url("/a"), "image")
    assert fetcher.budget.num_bytes == 0
    client = http.HttpClient(MediaConfig(), Guard(frozenset({"127.0.0.1"})), workers)
    with ByteBudget(5000 + len(packed)).share() as share:
        fetched = await client.download(URL(server.url("/a")), share, seconds=60.0)
        assert fetched.data == bytes(5000)
        assert share.num_bytes == 5000  # the compressed body is no longer held
    client.close()


async def test_names_that_never_answer_hold_nobody_up(monkeypatch) -> None:
    """With all threads held, a question is refused; with one free again, it is asked."""
    release, held = threading.Event(), threading.Semaphore(0)

    def look_up(host: str, port: int, family: int) -> list:
        if host != "good.example":
            held.release()
            release.wait(60)
        return [(2, 1, 6, "", ("8.8.8.8", port))]

    monkeypatch.setattr(resolver, "_look_up", look_up)
    system = resolver.SystemResolver(2)
    assert (await system.resolve("good.example", 80))[0]["host"] == "8.8.8.8"
    dead = [asyncio.create_task(system.resolve(f"{i}.example", 80)) for i in range(2)]
    await asyncio.to_thread(lambda: [held.acquire() for _ in range(2)])
    for task in dead:
        task.cancel()  # given up; the threads are held all the same
    await asyncio.gather(*dead, return_exceptions=True)
    for _ in range(3):
        with pytest.raises(OverloadedError, match="names of hosts"):
            await system.resolve("good.example", 80)
    release.set()
    while system.num_held:
        await asyncio.sleep(0.001)
    assert await system.resolve("good.example", 80)
    await system.close()


@pytest.mark.parametrize("limit", ["max_media_connections", "max_media_connections_per_host"])
async def test_connections_are_bounded(make, server: MediaServer, limit: str) -> None:
    num_open, most = 0, 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal num_open, most
        num_open += 1
        most = max(most, num_open)
        for _ in range(20):
            await asyncio.sleep(0)
        num_open -= 1
        return web.Response(body=b"x")

    server.handlers["/a"] = handler
    fetcher = make(**{limit: 2})
    fetches = [fetcher.fetch(server.url(f"/a?{i}"), "image") for i in range(12)]
    assert await asyncio.gather(*fetches) == [b"x"] * 12
    assert most <= 2
