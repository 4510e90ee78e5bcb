"""Downloads over HTTP.

One deadline covers a whole download, its redirects and its retries. Bodies are read in pieces and counted, whatever
their headers promise. Proxies of the environment, cookies and stored credentials are not used. Imported at the first
``http:`` or ``https:`` URL: the client library takes longer to import than all else here.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import (
    MediaFetchError,
    MediaRefusedError,
    SensoriumError,
)
from sensorium.multimodal.fetch.budget import Share
from sensorium.multimodal.fetch.guard import Guard
from sensorium.multimodal.fetch.http_cache import HttpCache, Stored, may_reuse
from sensorium.multimodal.fetch.inflate import ENCODINGS, too_large, unzip
from sensorium.multimodal.fetch.resolver import (
    ForbiddenAddressError,
    GuardedResolver,
    SystemResolver,
    guarded_socket,
)
from sensorium.multimodal.workers.threads import Workers

_PIECE_BYTES = 1 << 20
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({429, 502, 503, 504})
_FIRST_BACKOFF = 0.1
_LAST_BACKOFF = 10.0
_PLAIN = frozenset({"", "identity"})
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "sensorium"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a download brought.

    ``cached``: the body was in the cache, and its host, if it was asked at all, said that it is still the same.
    ``reusable``: its host does not forbid giving it to those who ask a moment later.
    """

    body: bytes
    cached: bool
    reusable: bool


class _TransientError(Exception):
    """Worth another attempt; ``outcome`` is what the caller is told if there is none left."""

    def __init__(self, outcome: MediaFetchError) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


@dataclass(frozen=True, slots=True)
class _Errand:
    """What the steps of one download share."""

    client: aiohttp.ClientSession
    share: Share


class HttpClient:
    """Downloads over HTTP for a ``Fetcher``, all from one event loop.

    The client session exists while downloads run and is closed by the last of them: connections are shared by what is
    fetched together, and nothing stays open behind. ``resolver`` makes the resolver underneath the guard's, which lives
    as long as this object; by default the system's.
    """

    def __init__(
        self,
        config: MediaConfig,
        guard: Guard,
        workers: Workers,
        *,
        resolver: Callable[[], AbstractResolver] | None = None,
        cache: HttpCache | None = None,
    ) -> None:
        self._config = config
        self._guard = guard
        self._workers = workers
        self._system = SystemResolver(config.max_media_connections)
        self._resolver = GuardedResolver(guard, self._system if resolver is None else resolver())
        self._cache = cache
        self._client: aiohttp.ClientSession | None = None
        self._num_users = 0

    async def download(self, url: URL, share: Share, *, seconds: float) -> Answer:
        """What is behind a URL that the guard has checked, whole within ``seconds``; its bytes are in ``share``.

        Raises MediaRefusedError, MediaTooLargeError, MediaFetchError or OverloadedError, and TimeoutError.
        """
        async with asyncio.timeout(seconds), self._session() as client:
            return await self._with_retries(_Errand(client, share), url)

    def close(self) -> None:
        """Free the threads that look up names. Nothing may be loading."""
        self._system.stop()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        if self._client is None:
            self._client = self._new_client()
        client = self._client
        self._num_users += 1
        try:
            yield client
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._client = None
                await client.close()

    def _new_client(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            socket_factory=guarded_socket(self._guard),
            use_dns_cache=False,
            limit=self._config.max_media_connections,
            limit_per_host=self._config.max_media_connections_per_host,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            trust_env=False,
            auto_decompress=False,
            headers=_HEADERS,
        )

    async def _with_retries(self, errand: _Errand, url: URL) -> Answer:
        num_retries = 0
        while True:
            try:
                return await self._follow(errand, url)
            except _TransientError as error:
                errand.share.give_back()
                if num_retries == self._config.media_fetch_retries:
                    raise error.outcome from None
            pause = min(_FIRST_BACKOFF * 2**num_retries, _LAST_BACKOFF)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            num_retries += 1

    async def _follow(self, errand: _Errand, url: URL) -> Answer:
        """Download ``url``, following redirects; every hop is checked before anything is sent to it."""
        for _ in range(self._guard.max_redirects + 1):
            answer = await self._visit(errand, url)
            if isinstance(answer, Answer):
                return answer
            if not self._guard.allow_redirects:
                raise MediaRefusedError(
                    "The URL redirects, which is not allowed here (--no-media-url-allow-redirects, or "
                    "SENSORIUM_MEDIA_URL_ALLOW_REDIRECTS=0)."
                )
            url = self._redirected(url, answer.location)
        raise MediaRefusedError(
            f"The URL redirects more than {self._guard.max_redirects} times (--max-media-redirects)."
        )

    def _redirected(self, url: URL, location: str) -> URL:
        if "://" in location.partition("?")[0]:
            target = location
        else:
            try:
                target = str(url.join(URL(location)))
            except ValueError:
                raise MediaFetchError("The URL redirects to a place that is no URL.") from None
        checked = self._guard.check_url(target)
        if url.scheme == "https" and checked.scheme != "https":
            raise MediaRefusedError(
                "The URL redirects from https to http, where anyone on the way could exchange what is sent."
            )
        return checked

    async def _visit(self, errand: _Errand, url: URL) -> Answer | _Redirect:
        """One hop: from the cache while what is there is fresh, else from the host."""
        if self._cache is None:
            return await self._request(errand, url, None)
        listed = self._guard.is_listed(url)
        stored = await self._workers.run(
            self._cache.get, str(url), listed, self._config.max_media_bytes
        )
        if stored is not None:
            errand.share.change(len(stored.body))
        if stored is not None and stored.is_fresh:
            return Answer(stored.body, cached=True, reusable=True)
        return await self._request(errand, url, stored)

    async def _request(
        self, errand: _Errand, url: URL, stored: Stored | None
    ) -> Answer | _Redirect:
        conditions = stored.conditions if stored is not None else {}
        asked = time.time()
        try:
            async with errand.client.get(
                url, allow_redirects=False, headers=conditions
            ) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    return _Redirect(response.headers["Location"])
                if response.status == 304 and stored is not None and self._cache is not None:
                    self._cache.renew(stored, response.headers, asked)
                    return Answer(stored.body, cached=True, reusable=may_reuse(response.headers))
                if response.status != 200:
                    _refuse_status(response.status)
                errand.share.give_back()
                body = await self._body(response, errand.share)
        except SensoriumError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _outcome(error) from None
        if self._cache is not None:
            listed = self._guard.is_listed(url)
            self._cache.put(str(url), listed, response.headers, body, asked)
        return Answer(body, cached=False, reusable=may_reuse(response.headers))

    async def _body(self, response: aiohttp.ClientResponse, share: Share) -> bytes:
        """The body, unpacked if need be; it is put together outside the event loop."""
        limit = self._config.max_media_bytes
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in _PLAIN and encoding not in ENCODINGS:
            raise MediaFetchError("The host of the URL sent a body in an unknown encoding.")
        pieces = await _read(response, limit, share.change)
        if encoding in ENCODINGS:
            return await self._workers.run(_unpack, pieces, encoding, limit, share)
        return pieces[0] if len(pieces) == 1 else await self._workers.run(b"".join, pieces)


async def _read(
    response: aiohttp.ClientResponse, limit: int, take: Callable[[int], None]
) -> list[bytes]:
    """The body as it is sent, in pieces of about 1 MiB; never more than ``limit`` bytes of it.

    ``take`` is told of bytes before they are kept.
    """
    if response.content_length is not None and response.content_length > limit:
        raise too_large(limit)
    pieces: list[bytes] = []
    piece = bytearray()
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        take(len(chunk))
        piece += chunk
        if len(piece) >= _PIECE_BYTES:
            pieces.append(bytes(piece))
            piece.clear()
    return [*pieces, bytes(piece)]


def _unpack(pieces: list[bytes], encoding: str, limit: int, share: Share) -> bytes:
    """Unpack a body in place of its pieces."""

    def consume() -> Iterator[bytes]:
        pieces.reverse()
        while pieces:
            piece = pieces.pop()
            yield piece
            share.change(-len(piece))

    return unzip(consume(), encoding, limit, share.change)


def _outcome(error: Exception) -> Exception:
    """What a failure of the client means. Its own text may hold addresses and is not passed on."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        unknown = MediaFetchError("The host of the URL cannot be found.")
        return _TransientError(unknown) if error.errno == socket.EAI_AGAIN else unknown
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(
        error.os_error, ForbiddenAddressError
    ):
        return MediaRefusedError("The host of the URL has an address that is not allowed.")
    if isinstance(error, aiohttp.ClientSSLError):
        return MediaFetchError("The host of the URL has no valid TLS certificate.")
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError):
        return _TransientError(
            MediaFetchError("The connection to the host of the URL failed or broke off.")
        )
    return MediaFetchError("The host of the URL sent an answer that is not HTTP.")


def _refuse_status(status: int) -> NoReturn:
    error = MediaFetchError(f"The host of the URL answered with status {status}.")
    if status in _TRANSIENT:
        raise _TransientError(error)
    raise error
