import asyncio
import gc
import gzip
import socket
import threading
import warnings
import zlib
from collections.abc import Iterator

import aiohttp.connector
import pytest
from aiohttp import web

from sensorium.errors import (
    MediaFetchError,
    MediaFetchTimeoutError,
    MediaRefusedError,
    MediaTooLargeError,
)
from sensorium.multimodal.fetch import client
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import (
    BytesFetcher,
    FakeResolver,
    MediaServer,
    media_server,
    raw_server,
)

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    while fetchers:
        fetchers.pop().close()


fetchers: list[BytesFetcher] = []


def fetcher_of(workers: ThreadWorkers, **config) -> BytesFetcher:
    fetchers.append(BytesFetcher(workers, **config))
    return fetchers[-1]


async def test_a_body_comes_back(server: MediaServer, workers: ThreadWorkers) -> None:
    body = bytes(range(256)) * 1000
    server.serve("/a", body)
    assert await fetcher_of(workers).fetch(server.url("/a"), "image") == body


async def test_what_is_sent_gives_nothing_away(server: MediaServer, workers, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    seen: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(dict(request.headers))
        return web.Response(body=b"x", headers={"Set-Cookie": "a=b"})

    server.handlers["/a"] = handler
    fetcher = fetcher_of(workers)
    for _ in range(2):
        assert await fetcher.fetch(server.url("/a"), "image") == b"x"
    assert [sorted(h) for h in seen] == [["Accept", "Accept-Encoding", "Host", "User-Agent"]] * 2
    assert seen[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 500])
async def test_the_status_of_the_host_is_named(server: MediaServer, workers, status: int) -> None:
    server.serve("/a", b"", status=status)
    with pytest.raises(MediaFetchError, match=str(status)):
        await fetcher_of(workers).fetch(server.url("/a"), "image")
    assert len(server.paths) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_transient_failures_are_tried_again(server: MediaServer, workers, status) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=b"ok", status=status if len(server.paths) < 3 else 200)

    server.handlers["/a"] = handler
    assert await fetcher_of(workers).fetch(server.url("/a"), "image") == b"ok"
    assert len(server.paths) == 3


async def test_trying_again_ends(server: MediaServer, workers: ThreadWorkers) -> None:
    server.serve("/a", b"", status=503)
    with pytest.raises(MediaFetchError, match="503"):
        await fetcher_of(workers).fetch(server.url("/a"), "image")
    assert len(server.paths) == 4


async def test_trying_again_stays_within_the_deadline(
    server: MediaServer, workers: ThreadWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_FIRST_BACKOFF", 600.0)
    server.serve("/a", b"", status=503)
    with pytest.raises(MediaFetchTimeoutError):
        await fetcher_of(workers, image_fetch_timeout=0.3).fetch(server.url("/a"), "image")
    assert len(server.paths) <= 1  # a second one would come after ten minutes


async def test_broken_connections_are_tried_again(workers: ThreadWorkers) -> None:
    async with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort") as server:
        url = f"http://127.0.0.1:{server.port}/"
        with pytest.raises(MediaFetchError, match="broke off"):
            await fetcher_of(workers).fetch(url, "image")
        assert server.num_connections == 4
    async with raw_server() as server:
        with pytest.raises(MediaFetchError):
            await fetcher_of(workers).fetch(f"http://127.0.0.1:{server.port}/", "image")
    with pytest.raises(MediaFetchError):  # nobody listens there any more
        await fetcher_of(workers).fetch(f"http://127.0.0.1:{server.port}/", "image")


@pytest.mark.parametrize(
    "answer",
    [
        b"\x89PNG\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_answers_that_are_not_http_as_it_should_be(workers, answer: bytes) -> None:
    async with raw_server(answer) as server:
        with pytest.raises((MediaFetchError, MediaRefusedError)) as caught:
            await fetcher_of(workers).fetch(f"http://127.0.0.1:{server.port}/", "image")
    assert str(server.port) not in caught.value.message
    assert "127" not in caught.value.message


async def test_a_host_that_never_answers(workers: ThreadWorkers) -> None:
    async with raw_server(keep_open=True) as server:
        fetcher = fetcher_of(workers, image_fetch_timeout=0.05)
        with pytest.raises(MediaFetchTimeoutError, match=r"0\.05 s"):
            await fetcher.fetch(f"http://127.0.0.1:{server.port}/", "image")


async def test_each_modality_has_its_deadline(workers: ThreadWorkers) -> None:
    async with raw_server(keep_open=True) as server:
        fetcher = fetcher_of(workers, image_fetch_timeout=60.0, audio_fetch_timeout=0.05)
        with pytest.raises(MediaFetchTimeoutError, match="audio"):
            await fetcher.fetch(f"http://127.0.0.1:{server.port}/", "audio")


async def test_a_host_that_drips(server: MediaServer, workers: ThreadWorkers) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.005)

    server.handlers["/slow"] = handler
    fetcher = fetcher_of(workers, image_fetch_timeout=0.1)
    with pytest.raises(MediaFetchTimeoutError):
        await fetcher.fetch(server.url("/slow"), "image")


async def test_an_endless_body(server: MediaServer, workers: ThreadWorkers) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    server.handlers["/endless"] = handler
    with pytest.raises(MediaTooLargeError, match="100000"):
        await fetcher_of(workers, max_media_bytes=100_000).fetch(server.url("/endless"), "image")


async def test_a_promised_size_is_refused_before_it_comes(workers: ThreadWorkers) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\n"
    async with raw_server(answer, keep_open=True) as server:
        fetcher = fetcher_of(workers, max_media_bytes=1_000_000)
        with pytest.raises(MediaTooLargeError):
            await fetcher.fetch(f"http://127.0.0.1:{server.port}/", "image")


async def test_the_limit_itself_is_allowed(server: MediaServer, workers: ThreadWorkers) -> None:
    server.serve("/a", bytes(1000))
    assert await fetcher_of(workers, max_media_bytes=1000).fetch(server.url("/a"), "image")
    with pytest.raises(MediaTooLargeError):
        await fetcher_of(workers, max_media_bytes=999).fetch(server.url("/a"), "image")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_bodies_are_bounded(server: MediaServer, workers, encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    headers = {"Content-Encoding": encoding}
    server.serve("/good", pack(b"picture"), headers=headers)
    server.serve("/bomb", pack(bytes(10_000_000)), headers=headers)
    server.serve("/short", pack(b"picture" * 99)[:-9], headers=headers)
    server.serve("/bad", b"no such thing", headers=headers)
    fetcher = fetcher_of(workers, max_media_bytes=1_000_000)
    assert await fetcher.fetch(server.url("/good"), "image") == b"picture"
    with pytest.raises(MediaTooLargeError):
        await fetcher.fetch(server.url("/bomb"), "image")
    for path in ("/short", "/bad"):
        with pytest.raises(MediaFetchError):
            await fetcher.fetch(server.url(path), "image")


def redirect(server: MediaServer, path: str, target: str, status: int = 302) -> None:
    server.serve(path, b"", status=status, headers={"Location": target})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(server: MediaServer, workers, status: int) -> None:
    server.serve("/x/end", b"end")
    redirect(server, "/1", server.url("/x/2"), status)
    redirect(server, "/x/2", "end", status)
    assert await fetcher_of(workers).fetch(server.url("/1"), "image") == b"end"


async def test_at_most_five_redirects(server: MediaServer, workers: ThreadWorkers) -> None:
    for i in range(9):
        redirect(server, f"/{i}", f"/{i + 1}")
    server.serve("/9", b"end")
    assert await fetcher_of(workers).fetch(server.url("/4"), "image") == b"end"
    server.paths.clear()
    with pytest.raises(MediaRefusedError, match="5 times"):
        await fetcher_of(workers).fetch(server.url("/0"), "image")
    assert server.paths == [f"/{i}" for i in range(6)]


async def test_redirects_can_be_forbidden(server: MediaServer, workers: ThreadWorkers) -> None:
    redirect(server, "/1", "/2")
    server.serve("/2", b"end")
    fetcher = fetcher_of(workers, media_url_allow_redirects=False)
    with pytest.raises(MediaRefusedError, match="--no-media-url-allow-redirects"):
        await fetcher.fetch(server.url("/1"), "image")
    assert server.paths == ["/1"]


async def test_every_hop_is_checked(server: MediaServer, workers: ThreadWorkers) -> None:
    async with raw_server() as trap:
        for target in (
            f"http://localhost:{trap.port}/",
            f"//localhost:{trap.port}/",
            f"http://[::1]:{trap.port}/",
            f"http://127.1:{trap.port}/",
            f"http://2130706433:{trap.port}/",
            f"http://u:p@127.0.0.1:{trap.port}/",
            f"http://127.0.0.1:{trap.port}\\@localhost/",
            f"ftp://127.0.0.1:{trap.port}/",
            "file:///etc/passwd",
            "data:text/plain,x",
        ):
            redirect(server, "/r", target)
            with pytest.raises(MediaRefusedError) as caught:
                await fetcher_of(workers).fetch(server.url("/r"), "image")
            assert "localhost" not in caught.value.message
        assert trap.num_connections == 0


SPELLINGS = (
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "017700000001",
    "0177.0.0.1",
    "0",
    "0.0.0.0",
    "127.0.0.1.",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "ⓛocalhost",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[0:0:0:0:0:0:0:1]",
    "[::1%25lo]",
    "user@127.0.0.1",
    "example.com@127.0.0.1",
    "127.0.0.1\\@example.com",
    "example.com\\@127.0.0.1",
    "local\u00adhost",
    "ℓocalhost",
    "00000127.0.0.1",
    "127.0.0.1%00.example.com",
    "127.0.0.1%2eexample.com",
    "[::ffff:127.0.0.1%25lo]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::80ff:fffe]",
    "[fe80::5efe:127.0.0.1]",
    "127.0.0.1.nip.example",
    "rebound.example",
    "mixed.example",
)


@pytest.mark.parametrize("host", SPELLINGS)
async def test_no_spelling_of_a_private_address_is_connected_to(workers, host: str) -> None:
    local = [["127.0.0.1"]]
    answers = {
        "localhost": local,
        "localhost.": local,
        "rebound.example": local,
        "127.0.0.1.nip.example": local,
        "mixed.example": [["127.0.0.1", "8.8.8.8"]],
    }
    fetcher = fetcher_of(workers, allowed_media_domains=(), resolver=FakeResolver(answers))
    async with raw_server() as trap:
        with pytest.raises(MediaRefusedError) as caught:
            await fetcher.fetch(f"http://{host}:{trap.port}/x", "image")
        assert trap.num_connections == 0
    assert "127" not in caught.value.message


async def test_the_connection_goes_to_the_address_that_was_checked(workers, monkeypatch) -> None:
    """The second question would be answered by a private address.

    There is one question per attempt.
    """
    connected: list[str] = []

    async def start_connection(addr_infos, **_):
        connected.extend(info[4][0] for info in addr_infos)
        raise OSError("unreachable")

    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", start_connection)
    resolver = FakeResolver({"rebind.example": [["8.8.8.8"], ["127.0.0.1"]]})
    fetcher = fetcher_of(workers, allowed_media_domains=(), resolver=resolver)
    with pytest.raises(MediaRefusedError):  # at the second attempt
        await fetcher.fetch("http://rebind.example/x", "image")
    assert connected == ["8.8.8.8"]
    assert resolver.questions == ["rebind.example", "rebind.example"]


async def test_a_listed_host_may_be_private(server: MediaServer, workers: ThreadWorkers) -> None:
    server.serve("/a", b"x")
    resolver = FakeResolver({"intern.example": [["127.0.0.1"]]})
    fetcher = fetcher_of(workers, allowed_media_domains=("intern.example",), resolver=resolver)
    assert await fetcher.fetch(server.url("/a", "INTERN.example"), "image") == b"x"
    with pytest.raises(MediaRefusedError):
        await fetcher.fetch(server.url("/a"), "image")


async def test_an_unknown_host(workers: ThreadWorkers) -> None:
    fetcher = fetcher_of(workers, allowed_media_domains=(), resolver=FakeResolver({}))
    with pytest.raises(MediaFetchError, match="cannot be found"):
        await fetcher.fetch("http://missing.example/x", "image")


async def test_a_host_without_tls(server: MediaServer, workers: ThreadWorkers) -> None:
    with pytest.raises(MediaFetchError):
        await fetcher_of(workers).fetch(f"https://127.0.0.1:{server.port}/x", "image")


async def test_a_name_that_does_not_answer_holds_up_no_other(
    server: MediaServer, workers: ThreadWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve("/a", b"x")
    release = threading.Event()
    system = socket.getaddrinfo

    def look_up(host: str, *args: object, **options: object) -> list:
        if host.startswith("tarpit"):
            assert release.wait(60)
        return system("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    stuck = [f"tarpit{i}.example" for i in range(40)]
    fetcher = fetcher_of(
        workers, allowed_media_domains=("quick.example", *stuck), image_fetch_timeout=60.0
    )
    tasks = [asyncio.create_task(fetcher.fetch(f"http://{name}/", "image")) for name in stuck]
    await asyncio.sleep(0)
    assert await fetcher.fetch(server.url("/a", "quick.example"), "image") == b"x"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    release.set()


async def test_local_files_and_data_urls(workers: ThreadWorkers, tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"file")
    fetcher = fetcher_of(workers, allowed_local_media_path=str(tmp_path))
    assert await fetcher.fetch(f"file://{tmp_path}/a", "image") == b"file"
    assert await fetcher.fetch(f"{tmp_path}/a", "image") == b"file"
    assert await fetcher.fetch("data:;base64,ZGF0YQ==", "image") == b"data"
    for url in ("http:/127.0.0.1/", "http:127.0.0.1", "javascript:x", "", "http"):
        with pytest.raises(MediaRefusedError):
            await fetcher.fetch(url, "image")


async def test_a_cancelled_download_closes_its_connection(workers: ThreadWorkers) -> None:
    async with raw_server(keep_open=True) as server:
        fetcher = fetcher_of(workers)
        task = asyncio.create_task(fetcher.fetch(f"http://127.0.0.1:{server.port}/", "image"))
        while not server.writers:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.gone.wait()  # the server sees the connection close
        fetcher.close()


def test_several_event_loops_and_no_session_left_open(workers: ThreadWorkers) -> None:
    fetcher = fetcher_of(workers)

    async def run() -> list[bytes]:
        async with media_server() as server:
            server.serve("/a", b"x")
            fetches = [fetcher.fetch(server.url("/a"), "image") for _ in range(5)]
            return await asyncio.gather(*fetches)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert asyncio.run(run()) == [b"x"] * 5
        fetcher.close()
        gc.collect()
