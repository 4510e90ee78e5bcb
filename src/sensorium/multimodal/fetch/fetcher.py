"""URLs and paths to bytes: ``data:``, ``file:`` and local paths, ``http:`` and ``https:``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import MediaFetchTimeoutError
from sensorium.multimodal.fetch.budget import ByteBudget, Share
from sensorium.multimodal.fetch.data_url import parse_data_url
from sensorium.multimodal.fetch.disk_store import DiskStore
from sensorium.multimodal.fetch.guard import Guard
from sensorium.multimodal.items import Modality
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.multimodal.workers.threads import Workers

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from sensorium.multimodal.fetch.client import Answer, HttpClient


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes, and where they came from.

    ``cached``: from the download cache, not sent anew. ``reusable``: may be given to those who ask a moment later; a
    file never is, as it may be another by then.
    """

    data: bytes
    cached: bool = False
    reusable: bool = False


class Fetcher:
    """Reads media within the limits of a ``MediaConfig``. Usable from several event loops.

    ``resolver`` makes the resolver of host names underneath the guard's; by default the system's. Raises ConfigError
    for a host or a folder of the configuration that cannot be used. ``budget`` counts the bytes of all downloads.
    ``package_files``: as ``Guard`` has it.
    """

    def __init__(
        self,
        config: MediaConfig,
        workers: Workers,
        *,
        resolver: Callable[[], AbstractResolver] | None = None,
        package_files: bool = False,
    ) -> None:
        self.guard = Guard.of(config, package_files=package_files)
        self.budget = ByteBudget(config.max_media_bytes_in_flight)
        self._config = config
        self._workers = workers
        self._resolver = resolver
        self._store = _store_of(config)
        self._network = LoopThread("downloads")
        self._http: HttpClient | None = None

    async def fetch(self, url: str, modality: Modality) -> bytes:
        """The bytes behind a URL or path. Raises as ``download`` does, and MediaUndecodableError for bad base64."""
        if url[:5].lower() == "data:":
            return await self._workers.run(parse_data_url, url, self._config.max_media_bytes)
        with self.budget.share() as share:
            return (await self.download(url, modality, share)).data

    async def download(self, url: str, modality: Modality, share: Share) -> Fetched:
        """What is behind a URL or path, ``data:`` excepted. Bytes that come from hosts are in ``share`` then.

        Raises MediaRefusedError, MediaTooLargeError, MediaFetchError (the upstream status in the message),
        MediaFetchTimeoutError or OverloadedError.
        """
        if is_local(url):
            limit = self._config.max_media_bytes
            return Fetched(await self._workers.run(self.guard.read_local, url, limit))
        checked = self.guard.check_url(url)
        seconds = self._config.fetch_timeout(modality)
        try:
            answer = await self._network.run(self._ask(checked, share, seconds))
        except TimeoutError:
            raise MediaFetchTimeoutError(
                f"The host of the URL did not deliver the {modality} within {seconds:g} s "
                f"(--{modality}-fetch-timeout)."
            ) from None
        return Fetched(answer.body, answer.cached, answer.reusable)

    def close(self) -> None:
        """End downloads, their threads and the writing of the cache."""
        self._network.close()
        if self._http is not None:
            self._http.close()
            self._http = None
        if self._store is not None:
            self._store.close()

    async def _ask(self, url: URL, share: Share, seconds: float) -> Answer:
        """A download; runs in the network's thread, and the client belongs to that."""
        if self._http is None:
            self._http = self._new_http_client()
        return await self._http.download(url, share, seconds=seconds)

    def _new_http_client(self) -> HttpClient:
        """Import the client and make it."""
        from sensorium.multimodal.fetch.client import HttpClient
        from sensorium.multimodal.fetch.http_cache import HttpCache

        return HttpClient(
            self._config,
            self.guard,
            self._workers,
            resolver=self._resolver,
            cache=None if self._store is None else HttpCache(self._store),
        )


def is_local(url: str) -> bool:
    """Whether ``url``, ``data:`` excepted, names a file of this machine."""
    return url[:5].lower() == "file:" or "://" not in url[:32]


def _store_of(config: MediaConfig) -> DiskStore | None:
    if not config.media_download_cache:
        return None
    return DiskStore(config.media_download_cache, int(config.media_download_cache_gb * (1 << 30)))
