"""Items that want one URL share its download, while it runs and for a moment afterwards."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import web

from sensorium.config import MediaConfig
from sensorium.errors import MediaFetchError
from sensorium.multimodal.cache.digest import encoded_digest
from sensorium.multimodal.fetch.budget import RequestBytes
from sensorium.multimodal.fetch.fetcher import DownloadStats, Fetcher
from sensorium.multimodal.items import Fetched
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import MediaServer, media_server


class Setup:
    """A fetcher and a host whose answers wait for a gate and whose headers can be set."""

    def __init__(self, server: MediaServer, workers: ThreadWorkers, **config) -> None:
        self.now = 0.0
        self.fetches: list[int] = []
        self.server = server
        self.status = 200
        self.headers: dict[str, str] = {}
        self.arrived = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fetcher = Fetcher(
            MediaConfig(allowed_media_domains=("127.0.0.1",), **config),
            workers,
            on_fetch=lambda seconds, num_bytes: self.fetches.append(num_bytes),
            clock=lambda: self.now,
        )
        for path in ("/a", "/b", "/c"):
            server.handlers[path] = self._answer

    async def _answer(self, request: web.Request) -> web.Response:
        self.arrived.set()
        await self.gate.wait()
        body = f"body of {request.path}".encode()
        return web.Response(body=body, status=self.status, headers=self.headers)

    async def get(self, path: str = "/a", modality: str = "image") -> Fetched:
        url = self.server.url(path)
        return await self.fetcher.fetch(url, modality, RequestBytes(1 << 30))

    async def several(self, num: int) -> list[asyncio.Task[Fetched]]:
        """Start so many at once; the host has been asked when this returns, and waits."""
        self.gate.clear()
        self.arrived.clear()
        tasks = [asyncio.create_task(self.get()) for _ in range(num)]
        await self.arrived.wait()
        return tasks


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    workers = ThreadWorkers(2)
    yield workers
    workers.close()


@pytest.fixture
async def make(workers: ThreadWorkers) -> AsyncIterator:
    made: list[Setup] = []
    async with media_server() as server:

        def build(**config) -> Setup:
            config.setdefault("media_fetch_retries", 0)
            config.setdefault("image_fetch_timeout", 60.0)
            made.append(Setup(server, workers, **config))
            return made[-1]

        yield build
        for setup in made:
            setup.gate.set()
            setup.fetcher.close()


async def test_a_download_serves_requests_that_come_right_after_it(make) -> None:
    setup = make(media_url_reuse_seconds=2.0)
    first = await setup.get()
    assert (first.data, first.digest) == (b"body of /a", encoded_digest(b"body of /a"))
    setup.now = 1.99
    assert await setup.get() is first
    setup.now = 2.0
    assert await setup.get() is not first
    assert setup.server.paths == ["/a", "/a"]
    assert setup.fetches == [10, 10]
    assert setup.fetcher.stats() == DownloadStats(num_requests=3, num_fetches=2, num_reused=1)


async def test_the_time_begins_when_the_download_ends(make) -> None:
    setup = make()
    (task,) = await setup.several(1)
    setup.now = 100.0
    setup.gate.set()
    first = await task
    setup.now = 100.9
    assert await setup.get() is first


async def test_urls_and_modalities_are_kept_apart(make) -> None:
    setup = make()
    for path, modality in (("/a", "image"), ("/b", "image"), ("/a", "video")):
        for _ in range(2):
            await setup.get(path, modality)
    assert setup.server.paths == ["/a", "/b", "/a"]


@pytest.mark.parametrize("how", ["seconds", "bytes", "host"])
async def test_a_download_that_may_not_be_kept_is_shared_while_it_runs(make, how: str) -> None:
    config = {"seconds": {"media_url_reuse_seconds": 0}, "bytes": {"media_url_reuse_bytes": 7}}
    setup = make(**config.get(how, {}))
    setup.headers = {"Cache-Control": "no-store"} if how == "host" else {}
    tasks = await setup.several(5)
    setup.gate.set()
    assert len({id(fetched) for fetched in await asyncio.gather(*tasks)}) == 1
    assert len(setup.server.paths) == 1
    await setup.get()
    assert len(setup.server.paths) == 2


async def test_kept_bytes_are_bounded(make) -> None:
    setup = make(media_url_reuse_bytes=21)
    for path in ("/a", "/b", "/c"):
        await setup.get(path)
    setup.server.paths.clear()
    for path in ("/c", "/b", "/a"):
        await setup.get(path)
    assert setup.server.paths == ["/a"]
    assert setup.fetcher.num_recent_bytes == 20


async def test_kept_downloads_are_dropped_even_if_no_request_follows(make) -> None:
    setup = make(media_url_reuse_seconds=0.001)
    await setup.get()
    assert setup.fetcher.num_recent_bytes == 10
    setup.now = 1.0
    while setup.fetcher.num_recent_bytes:
        await asyncio.sleep(0.001)


async def test_a_failure_is_shared_and_forgotten(make) -> None:
    setup = make()
    setup.status = 404
    tasks = await setup.several(3)
    setup.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, MediaFetchError) for error in found)
    assert len(setup.server.paths) == 1
    setup.status = 200
    assert (await setup.get()).data == b"body of /a"
    assert setup.fetcher.stats() == DownloadStats(num_requests=4, num_fetches=1, num_failures=1)
    assert setup.fetches == [10]


async def test_cancelling_one_request_does_not_end_the_download_of_the_others(make) -> None:
    setup = make()
    tasks = await setup.several(3)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    setup.gate.set()
    assert [f.data for f in await asyncio.gather(*tasks[1:])] == [b"body of /a"] * 2
    assert len(setup.server.paths) == 1
    setup.now = 10.0
    (last,) = await setup.several(1)
    assert setup.fetcher.num_running == 1
    last.cancel()
    await asyncio.gather(last, return_exceptions=True)
    assert setup.fetcher.num_running == 0
    assert setup.fetcher.budget.num_bytes == 0


async def test_a_download_from_the_disk_cache_is_no_fetch(make, tmp_path) -> None:
    folder = str(tmp_path)
    first = make(media_download_cache=folder)
    await first.get()
    first.fetcher.close()
    setup = make(media_download_cache=folder, media_url_reuse_seconds=0)
    assert (await setup.get()).cached
    assert setup.fetches == []
    assert setup.fetcher.stats() == DownloadStats(num_requests=1, num_cached=1)


async def test_several_event_loops(make) -> None:
    setup = make(media_url_reuse_seconds=3600)
    found: list[Fetched] = []
    threads = [
        threading.Thread(target=lambda: found.append(asyncio.run(setup.get()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):  # the host answers in this loop
        await asyncio.sleep(0.001)
    assert [f.data for f in found] == [b"body of /a"] * 4
    assert await setup.get() in found
    setup.fetcher.close()
    assert setup.fetcher.num_recent_bytes == 0


async def test_files_are_read_again(workers: ThreadWorkers, tmp_path) -> None:
    config = MediaConfig(allowed_local_media_path=str(tmp_path), media_url_reuse_seconds=3600)
    fetcher = Fetcher(config, workers)
    for content in (b"old", b"new"):
        (tmp_path / "a").write_bytes(content)
        assert (await fetcher.fetch(f"{tmp_path}/a", "image", RequestBytes(9))).data == content
    fetcher.close()


async def test_hosts_may_forbid_serving_further_requests(make) -> None:
    setup = make(media_url_reuse_seconds=3600)
    for path, control in (("/a", "max-age=0"), ("/b", "no-store"), ("/c", "no-cache")):
        setup.headers = {"Cache-Control": control}
        for _ in range(3):
            await setup.get(path)
    assert setup.server.paths == ["/a", "/b", "/b", "/b", "/c", "/c", "/c"]
