"""Downloads that requests share: those that want a URL while it is fetched, and those that come a moment later."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from sensorium.config import MediaConfig
from sensorium.multimodal.cache.digest import encoded_digest
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.fetch.budget import DownloadProgress, RequestBytes, Share
from sensorium.multimodal.fetch.fetcher import Fetcher
from sensorium.multimodal.items import Modality
from sensorium.multimodal.workers.threads import Workers

Key = tuple[Modality, str]


@dataclass(frozen=True, slots=True)
class Download:
    """An encoded file and its content digest."""

    data: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class DownloadStats:
    """Since the start: what was asked for, and how it was answered. What remains waited for the fetch of another.

    ``num_fetches`` counts files that were read or sent by their hosts, ``num_cached`` those that the download cache
    had, ``num_reused`` those that had come a moment before, ``num_failures`` fetches that failed.
    """

    num_requests: int = 0
    num_fetches: int = 0
    num_cached: int = 0
    num_reused: int = 0
    num_failures: int = 0


class Downloads:
    """Fetches what is behind a URL or path once for all who want it at about the same time. ``data:`` URLs excepted.

    Requests share a fetch while it runs; one who leaves does not end it for the others, and a failure reaches those who
    wait and is then forgotten. What came over the network serves further requests for ``media_url_reuse_seconds``, so
    that "at once" does not depend on how fast a host answers. ``on_fetch`` is told of each real fetch: seconds and
    bytes. ``clock`` gives seconds. Usable from several event loops, each of which has fetches of its own.
    """

    def __init__(
        self,
        config: MediaConfig,
        fetcher: Fetcher,
        workers: Workers,
        *,
        on_fetch: Callable[[float, int], None] = lambda seconds, num_bytes: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetcher = fetcher
        self._workers = workers
        self._on_fetch = on_fetch
        self._flights: SingleFlight[Download] = SingleFlight()
        self._recent = _Recent(config.media_url_reuse_seconds, config.media_url_reuse_bytes, clock)
        self._lock = threading.Lock()
        # Of what is being fetched; each lives as long as somebody waits for it.
        self._arrivals: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, Key], DownloadProgress]
        self._arrivals = WeakValueDictionary()
        self._counts = {"requests": 0, "fetches": 0, "cached": 0, "reused": 0, "failures": 0}

    async def get(self, url: str, modality: Modality, request: RequestBytes) -> Download:
        """The file behind a URL or path, with its digest, for ``request``, whose limit counts what has come so far.

        Raises as ``Fetcher.download`` does, and MediaTooLargeError past the request's limit.
        """
        key = (modality, url)
        self._count("requests")
        recent = self._recent.get(key)
        if recent is not None:
            self._count("reused")
            return recent
        place = (asyncio.get_running_loop(), key)
        with self._lock:
            arrival = self._arrivals.get(place)
            if arrival is None:
                arrival = self._arrivals[place] = DownloadProgress()
        async with request.waiting(arrival):
            return await self._flights.run(key, lambda: self._fetch(key, arrival))

    def stats(self) -> DownloadStats:
        """A snapshot of the counters."""
        with self._lock:
            return DownloadStats(**{f"num_{name}": n for name, n in self._counts.items()})

    def close(self) -> None:
        """Forget what was kept, and close the fetcher."""
        self._recent.clear()
        self._fetcher.close()

    async def _fetch(self, key: Key, arrival: DownloadProgress) -> Download:
        with self._fetcher.budget.share(arrival.update) as share:
            return await self._fetch_into(share, key)

    async def _fetch_into(self, share: Share, key: Key) -> Download:
        modality, url = key
        started = time.perf_counter()
        try:
            fetched = await self._fetcher.download(url, modality, share)
        except Exception:
            self._count("failures")
            raise
        if fetched.cached:
            self._count("cached")
        else:
            self._count("fetches")
            self._on_fetch(time.perf_counter() - started, len(fetched.data))
        digest = await self._workers.run(encoded_digest, fetched.data)
        download = Download(fetched.data, digest)
        if fetched.reusable:
            self._recent.put(key, download)
        return download

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


class _Recent:
    """Downloads of the last ``seconds``, at most ``capacity_bytes`` of them, oldest first out. Thread-safe."""

    def __init__(self, seconds: float, capacity_bytes: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, tuple[float, Download]] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: Key) -> Download | None:
        with self._lock:
            self._drop_expired()
            entry = self._entries.get(key)
            return None if entry is None else entry[1]

    def put(self, key: Key, download: Download) -> None:
        """Keep what has just come, and see to it that it goes in time even if nobody asks any more."""
        size = len(download.data)
        with self._lock:
            self._drop_expired()
            if key in self._entries:
                self._drop(key)
            if not self._seconds or size > self._capacity_bytes:
                return
            while self._num_bytes + size > self._capacity_bytes:
                self._drop(next(iter(self._entries)))
            self._entries[key] = (self._clock() + self._seconds, download)
            self._num_bytes += size
        asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._num_bytes = 0

    def _expire(self) -> None:
        with self._lock:
            self._drop_expired()

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._entries:
            key, (end, _) = next(iter(self._entries.items()))
            if now < end:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        _, download = self._entries.pop(key)
        self._num_bytes -= len(download.data)
