"""URLs and paths to bytes: ``data:``, ``file:`` and local paths, ``http:`` and ``https:``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sensorium.config import MediaConfig
from sensorium.errors import MediaFetchTimeoutError
from sensorium.multimodal.dataurl import parse_data_url
from sensorium.multimodal.guard import Guard
from sensorium.multimodal.items import Modality
from sensorium.multimodal.workers import Workers

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from sensorium.multimodal.http import HttpClient


class Fetcher:
    """Reads media within the limits of a ``MediaConfig``. Usable from several event loops.

    ``resolver`` makes the resolver of host names underneath the guard's; by default the system's.
    """

    def __init__(
        self,
        config: MediaConfig,
        workers: Workers,
        *,
        resolver: Callable[[], AbstractResolver] | None = None,
    ) -> None:
        self.guard = Guard.of(config)
        self._config = config
        self._workers = workers
        self._resolver = resolver
        self._http: HttpClient | None = None

    async def fetch(self, url: str, modality: Modality) -> bytes:
        """The bytes behind a URL or path.

        Raises MediaRefusedError, MediaTooLargeError, MediaFetchError (the upstream status in the message) or
        MediaFetchTimeoutError.
        """
        scheme = url[:8].lower()
        limit = self._config.max_media_bytes
        if scheme.startswith("data:"):
            return await self._workers.run(parse_data_url, url, limit)
        if scheme.startswith("file:") or "://" not in url[:32]:
            return await self._workers.run(self.guard.read_local, url, limit)
        checked = self.guard.check_url(url)
        if self._http is None:
            self._http = await self._workers.run(self._new_http_client)
        seconds = self._config.fetch_timeout(modality)
        try:
            return await self._http.download(checked, seconds=seconds, max_bytes=limit)
        except TimeoutError:
            raise MediaFetchTimeoutError(
                f"The host of the URL did not deliver the {modality} within {seconds:g} s "
                f"(--{modality}-fetch-timeout)."
            ) from None

    def _new_http_client(self) -> HttpClient:
        """Import the client, away from the event loop."""
        from sensorium.multimodal.http import HttpClient

        return HttpClient(self.guard, self._workers, self._resolver)
