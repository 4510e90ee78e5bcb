"""URLs and paths to bytes: ``data:``, ``file:`` and local paths, ``http:`` and ``https:``."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import MediaFetchTimeoutError
from sensorium.multimodal.cache.digest import encoded_digest
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.fetch.budget import ByteBudget, DownloadProgress, RequestBytes, Share
from sensorium.multimodal.fetch.data_url import parse_data_url
from sensorium.multimodal.fetch.disk_cache import DiskCache
from sensorium.multimodal.fetch.guard import Guard
from sensorium.multimodal.items import Fetched, FetchKind
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.multimodal.workers.threads import Workers

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from sensorium.multimodal.fetch.client import HttpClient

Key = tuple[FetchKind, str]


@dataclass(frozen=True, slots=True)
class DownloadStats:
    """Counters of downloads and files read since the start; ``data:`` URLs are not counted.

    Attributes:
        num_requests: Items that wanted a URL or path. Those that are in no other counter waited for
            the fetch of another.
        num_fetches: Files that were read, or sent by their hosts.
        num_cached: Downloads that the disk cache had.
        num_reused: Items served by a download that had just ended.
        num_failures: Fetches that failed.
    """

    num_requests: int = 0
    num_fetches: int = 0
    num_cached: int = 0
    num_reused: int = 0
    num_failures: int = 0


class Fetcher:
    """Reads media within the limits of a ``MediaConfig``, once for all that want a URL together.

    Requests share a fetch while it runs. Cancelling one does not end it for the others; a failure
    reaches all of them and is then forgotten. What came over the network serves further requests
    for ``media_url_reuse_seconds``, so that sharing does not depend on how fast a host answers.
    Usable from several event loops, each of which has fetches of its own.
    """

    def __init__(
        self,
        config: MediaConfig,
        workers: Workers,
        *,
        resolver: Callable[[], AbstractResolver] | None = None,
        package_files: bool = False,
        on_fetch: Callable[[float, int], None] = lambda seconds, num_bytes: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the guard and the disk cache of a configuration.

        Args:
            config: Limits, timeouts and folders.
            workers: Threads that read files, decode base64 and hash.
            resolver: Makes the resolver of host names below the guard's; the system's by default.
            package_files: See ``Guard``.
            on_fetch: Called after each fetch with its seconds and bytes.
            clock: Seconds, for ``media_url_reuse_seconds``.

        Raises:
            ConfigError: A host or a folder of the configuration cannot be used.
        """
        self.guard = Guard.of(config, package_files=package_files)
        self.budget = ByteBudget(config.max_media_bytes_in_flight)
        self._config = config
        self._workers = workers
        self._resolver = resolver
        self._on_fetch = on_fetch
        self._disk_cache = DiskCache(config) if config.media_download_cache else None
        self._network = LoopThread("downloads")
        self._http: HttpClient | None = None
        self._single_flight: SingleFlight[Fetched] = SingleFlight()
        self._recent = RecentDownloads(
            config.media_url_reuse_seconds, config.media_url_reuse_bytes, clock
        )
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        # Of running fetches; each lives as long as a request waits for it.
        self._progress: WeakValueDictionary[
            tuple[asyncio.AbstractEventLoop, Key], DownloadProgress
        ] = WeakValueDictionary()

    async def fetch(self, url: str, modality: FetchKind, request: RequestBytes) -> Fetched:
        """Return the bytes behind a URL or path. ``request`` counts those that come meanwhile.

        Raises MediaRefusedError, MediaTooLargeError, MediaFetchError (the host's status in the
        message), MediaFetchTimeoutError, OverloadedError, or MediaUndecodableError for bad base64.
        """
        if is_data_url(url):
            return await self._workers.run(self._read_data_url, url)
        key = (modality, url)
        self._count("num_requests")
        recent = self._recent.get(key)
        if recent is not None:
            self._count("num_reused")
            return recent
        place = (asyncio.get_running_loop(), key)
        with self._lock:
            progress = self._progress.get(place)
            if progress is None:
                progress = self._progress[place] = DownloadProgress()
        async with request.waiting(progress):
            return await self._single_flight.run(key, lambda: self._fetch(key, progress))

    def stats(self) -> DownloadStats:
        """Return a snapshot of the counters."""
        with self._lock:
            return DownloadStats(**self._counts)

    @property
    def num_running(self) -> int:
        """Number of fetches that run now."""
        return self._single_flight.num_running

    @property
    def num_recent_bytes(self) -> int:
        """Bytes of finished downloads that are kept for further requests."""
        return self._recent.num_bytes

    def close(self) -> None:
        """End downloads, their threads and the writing of the disk cache."""
        self._recent.clear()
        self._network.close()
        if self._http is not None:
            self._http.close()
            self._http = None
        if self._disk_cache is not None:
            self._disk_cache.close()

    def _read_data_url(self, url: str) -> Fetched:
        return _fetched(parse_data_url(url, self._config.max_media_bytes))

    def _read_file(self, path: str) -> Fetched:
        return _fetched(self.guard.read_local(path, self._config.max_media_bytes))

    async def _fetch(self, key: Key, progress: DownloadProgress) -> Fetched:
        modality, url = key
        started = time.perf_counter()
        try:
            if is_local(url):
                fetched = await self._workers.run(self._read_file, url)
            else:
                with self.budget.share(progress.update) as share:
                    fetched = await self._download(self.guard.check_url(url), modality, share)
        except Exception:
            self._count("num_failures")
            raise
        if fetched.cached:
            self._count("num_cached")
        else:
            self._count("num_fetches")
            self._on_fetch(time.perf_counter() - started, len(fetched.data))
        if fetched.reusable:
            self._recent.put(key, fetched)
        return fetched

    async def _download(self, url: URL, modality: FetchKind, share: Share) -> Fetched:
        seconds = self._config.fetch_timeout(modality)
        try:
            return await self._network.run(self._run_client(url, share, seconds))
        except TimeoutError:
            raise MediaFetchTimeoutError(
                f"The host of the URL did not deliver the {modality} within {seconds:g} s "
                f"(--{modality}-fetch-timeout)."
            ) from None

    async def _run_client(self, url: URL, share: Share, seconds: float) -> Fetched:
        """Download within the network's thread, to which the client belongs."""
        if self._http is None:
            from sensorium.multimodal.fetch.client import HttpClient

            self._http = HttpClient(
                self._config,
                self.guard,
                self._workers,
                resolver=self._resolver,
                cache=self._disk_cache,
            )
        return await self._http.download(url, share, seconds=seconds)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


class RecentDownloads:
    """Downloads of the last seconds, of bounded size, oldest first out. Thread-safe."""

    def __init__(self, seconds: float, capacity_bytes: int, clock: Callable[[], float]) -> None:
        self.num_bytes = 0
        self._seconds = seconds
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, tuple[float, Fetched]] = OrderedDict()

    def get(self, key: Key) -> Fetched | None:
        """Return a download that has not expired."""
        with self._lock:
            self._drop_expired()
            entry = self._entries.get(key)
            return None if entry is None else entry[1]

    def put(self, key: Key, fetched: Fetched) -> None:
        """Keep a download that has just ended; a timer drops it even if no request follows."""
        size = len(fetched.data)
        with self._lock:
            self._drop_expired()
            if key in self._entries:
                self._drop(key)
            if not self._seconds or size > self._capacity_bytes:
                return
            while self.num_bytes + size > self._capacity_bytes:
                self._drop(next(iter(self._entries)))
            self._entries[key] = (self._clock() + self._seconds, fetched)
            self.num_bytes += size
        asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def clear(self) -> None:
        """Forget all downloads."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

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
        _, fetched = self._entries.pop(key)
        self.num_bytes -= len(fetched.data)


def is_data_url(url: str) -> bool:
    """Return whether a URL holds its data itself."""
    return url[:5].lower() == "data:"


def is_local(url: str) -> bool:
    """Return whether a URL other than a ``data:`` URL names a file of this machine."""
    return url[:5].lower() == "file:" or "://" not in url[:32]


def _fetched(data: bytes) -> Fetched:
    return Fetched(data, encoded_digest(data))
