import asyncio
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from sensorium.config import MediaConfig
from sensorium.errors import MediaFetchError
from sensorium.multimodal.cache.digest import encoded_digest
from sensorium.multimodal.fetch.budget import ByteBudget, RequestBytes, Share
from sensorium.multimodal.fetch.downloads import Download, Downloads, DownloadStats
from sensorium.multimodal.fetch.fetcher import Fetched, Fetcher
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import media_server


class FakeFetcher:
    """Gives each URL as its own content, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.reusable = True
        self.cached = False
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.num_cancelled = 0
        self.is_closed = False
        self.budget = ByteBudget(1 << 30)

    async def download(self, url: str, modality: str, share: Share) -> Fetched:
        self.asked.append((url, modality))
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return Fetched(url.encode(), self.cached, self.reusable)

    def close(self) -> None:
        self.is_closed = True


class Setup:
    def __init__(self, workers: ThreadWorkers, **config) -> None:
        self.now = 0.0
        self.fetcher = FakeFetcher()
        self.fetches: list[int] = []
        self.downloads = Downloads(
            MediaConfig(**config),
            self.fetcher,
            workers,
            on_fetch=lambda seconds, num_bytes: self.fetches.append(num_bytes),
            clock=lambda: self.now,
        )

    async def get(self, url: str = "http://a", modality: str = "image") -> Download:
        return await self.downloads.get(url, modality, RequestBytes(1 << 30))


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    workers = ThreadWorkers(2)
    yield workers
    workers.close()


@pytest.fixture
def make(workers: ThreadWorkers):
    return lambda **config: Setup(workers, **config)


async def test_a_download_serves_those_who_come_a_moment_later(make) -> None:
    setup = make(media_url_reuse_seconds=2.0)
    first = await setup.get()
    assert (first.data, first.digest) == (b"http://a", encoded_digest(b"http://a"))
    setup.now = 1.99
    assert await setup.get() is first
    setup.now = 2.0
    assert await setup.get() is not first
    assert len(setup.fetcher.asked) == 2
    assert setup.fetches == [8, 8]
    assert setup.downloads.stats() == DownloadStats(
        num_requests=3, num_fetches=2, num_reused=1, num_cached=0, num_failures=0
    )


async def test_the_time_begins_when_the_download_ends(make) -> None:
    setup = make()
    setup.fetcher.gate = asyncio.Event()
    task = asyncio.create_task(setup.get())
    await asyncio.sleep(0)
    setup.now = 100.0
    setup.fetcher.gate.set()
    first = await task
    setup.now = 100.9
    assert await setup.get() is first


async def test_urls_and_modalities_are_apart(make) -> None:
    setup = make()
    for url, modality in (("http://a", "image"), ("http://b", "image"), ("http://a", "video")):
        for _ in range(2):
            await setup.get(url, modality)
    assert len(setup.fetcher.asked) == 3


@pytest.mark.parametrize("how", ["seconds", "bytes", "host"])
async def test_nothing_is_kept_where_that_is_not_wanted(make, how: str) -> None:
    config = {"seconds": {"media_url_reuse_seconds": 0}, "bytes": {"media_url_reuse_bytes": 7}}
    setup = make(**config.get(how, {}))
    setup.fetcher.reusable = how != "host"
    setup.fetcher.gate = asyncio.Event()
    tasks = [asyncio.create_task(setup.get()) for _ in range(5)]
    await asyncio.sleep(0)
    setup.fetcher.gate.set()
    assert len({id(download) for download in await asyncio.gather(*tasks)}) == 1
    assert len(setup.fetcher.asked) == 1
    await setup.get()
    assert len(setup.fetcher.asked) == 2


async def test_what_is_kept_is_bounded(make) -> None:
    setup = make(media_url_reuse_bytes=17)
    for url in ("http://a", "http://b", "http://c"):
        await setup.get(url)
    setup.fetcher.asked.clear()
    for url in ("http://c", "http://b", "http://a"):
        await setup.get(url)
    assert setup.fetcher.asked == [("http://a", "image")]
    assert setup.downloads._recent._num_bytes == 16


async def test_what_is_kept_goes_even_if_nobody_asks(make) -> None:
    setup = make(media_url_reuse_seconds=0.001)
    await setup.get()
    assert setup.downloads._recent._num_bytes == 8
    setup.now = 1.0
    while setup.downloads._recent._entries:
        await asyncio.sleep(0.001)
    assert setup.downloads._recent._num_bytes == 0


async def test_a_failure_is_shared_and_forgotten(make) -> None:
    setup = make()
    setup.fetcher.error = MediaFetchError("no")
    setup.fetcher.gate = asyncio.Event()
    tasks = [asyncio.create_task(setup.get()) for _ in range(3)]
    await asyncio.sleep(0)
    setup.fetcher.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, MediaFetchError) for error in found)
    assert len(setup.fetcher.asked) == 1
    setup.fetcher.error = None
    assert (await setup.get()).data == b"http://a"
    stats = setup.downloads.stats()
    assert (stats.num_fetches, stats.num_failures) == (1, 1)
    assert setup.fetches == [8]


async def test_one_who_leaves_does_not_end_it_for_the_others(make) -> None:
    setup = make()
    setup.fetcher.gate = asyncio.Event()
    tasks = [asyncio.create_task(setup.get()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    setup.fetcher.gate.set()
    assert [d.data for d in await asyncio.gather(*tasks[1:])] == [b"http://a"] * 2
    assert (len(setup.fetcher.asked), setup.fetcher.num_cancelled) == (1, 0)
    setup.fetcher.gate.clear()
    last = asyncio.create_task(setup.get("http://b"))
    await asyncio.sleep(0)
    last.cancel()
    await asyncio.gather(last, return_exceptions=True)
    assert setup.fetcher.num_cancelled == 1
    assert setup.downloads._flights.num_running == 0


async def test_what_the_cache_had_is_no_fetch(make) -> None:
    setup = make()
    setup.fetcher.cached = True
    await setup.get()
    assert setup.fetches == []
    stats = setup.downloads.stats()
    assert (stats.num_requests, stats.num_fetches, stats.num_cached) == (1, 0, 1)


def test_several_event_loops(make) -> None:
    setup = make(media_url_reuse_seconds=3600)
    found: list[Download] = []
    threads = [
        threading.Thread(target=lambda: found.append(asyncio.run(setup.get()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [d.data for d in found] == [b"http://a"] * 4
    assert asyncio.run(setup.get()) in found
    setup.downloads.close()
    assert setup.fetcher.is_closed
    assert not setup.downloads._recent._entries


async def test_files_are_read_again(workers: ThreadWorkers, tmp_path) -> None:
    config = MediaConfig(allowed_local_media_path=str(tmp_path), media_url_reuse_seconds=3600)
    downloads = Downloads(config, Fetcher(config, workers), workers)
    for content in (b"old", b"new"):
        (tmp_path / "a").write_bytes(content)
        assert (await downloads.get(f"{tmp_path}/a", "image", RequestBytes(9))).data == content
    downloads.close()


async def test_hosts_decide_over_a_moment_later(workers: ThreadWorkers) -> None:
    config = MediaConfig(allowed_media_domains=("127.0.0.1",), media_url_reuse_seconds=3600)
    downloads = Downloads(config, Fetcher(config, workers), workers)
    async with media_server() as server:
        for path, control in (("/a", "max-age=0"), ("/b", "no-store"), ("/c", "no-cache")):

            async def handler(request: web.Request, control: str = control) -> web.Response:
                return web.Response(body=b"x", headers={"Cache-Control": control})

            server.handlers[path] = handler
            for _ in range(3):
                await downloads.get(server.url(path), "image", RequestBytes(1 << 30))
        assert server.paths == ["/a", "/b", "/b", "/b", "/c", "/c", "/c"]
    downloads.close()
