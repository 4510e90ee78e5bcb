"""Downloads over HTTP.

One deadline covers a whole download, its redirects and its retries. Bodies are read in pieces and
counted, whatever their headers promise. Proxies of the environment, cookies and stored credentials
are not used. Imported at the first ``http:`` or ``https:`` URL, as aiohttp is slow to import.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import (
    MediaFetchError,
    MediaRefusedError,
    SensoriumError,
)
from sensorium.multimodal.cache.digest import encoded_digest
from sensorium.multimodal.fetch.budget import Share
from sensorium.multimodal.fetch.disk_cache import DiskCache
from sensorium.multimodal.fetch.guard import Guard
from sensorium.multimodal.fetch.inflate import ENCODINGS, too_large, unzip
from sensorium.multimodal.fetch.resolver import (
    ForbiddenAddressError,
    GuardedResolver,
    SystemResolver,
    guarded_socket,
)
from sensorium.multimodal.items import Fetched
from sensorium.multimodal.workers.threads import Workers

Headers = CIMultiDict[str] | CIMultiDictProxy[str]

_PIECE_BYTES = 1 << 20
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({429, 502, 503, 504})
_FIRST_BACKOFF = 0.1
_LAST_BACKOFF = 10.0
_PLAIN = frozenset({"", "identity"})
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "sensorium"}


class _TransientError(Exception):
    """A failure that is worth another attempt; ``outcome`` is raised if none is left."""

    def __init__(self, outcome: MediaFetchError) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


class HttpClient:
    """Downloads over HTTP for a ``Fetcher``, all from one event loop.

    The client session exists while downloads run and is closed by the last of them: they share
    connections, and no connection stays open afterwards. ``resolver`` makes the resolver below the
    guard's, the system's by default; it lives as long as this object.
    """

    def __init__(
        self,
        config: MediaConfig,
        guard: Guard,
        workers: Workers,
        *,
        resolver: Callable[[], AbstractResolver] | None = None,
        cache: DiskCache | None = None,
    ) -> None:
        self._config = config
        self._guard = guard
        self._workers = workers
        self._system = SystemResolver(config.max_media_connections)
        self._resolver = GuardedResolver(guard, self._system if resolver is None else resolver())
        self._cache = cache
        self._client: aiohttp.ClientSession | None = None
        self._num_users = 0

    async def download(self, url: URL, share: Share, *, seconds: float) -> Fetched:
        """Download a URL that the guard has checked; ``share`` counts the bytes as they come.

        Raises MediaRefusedError, MediaTooLargeError, MediaFetchError, OverloadedError, and
        TimeoutError after ``seconds``.
        """
        async with asyncio.timeout(seconds), self._session() as client:
            return await self._with_retries(client, url, share)

    def close(self) -> None:
        """Stop the threads that look up names. Nothing may be loading."""
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

    async def _with_retries(self, client: aiohttp.ClientSession, url: URL, share: Share) -> Fetched:
        num_retries = 0
        while True:
            try:
                return await self._follow(client, url, share)
            except _TransientError as error:
                share.reset()
                if num_retries == self._config.media_fetch_retries:
                    raise error.outcome from None
            pause = min(_FIRST_BACKOFF * 2**num_retries, _LAST_BACKOFF)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            num_retries += 1

    async def _follow(self, client: aiohttp.ClientSession, url: URL, share: Share) -> Fetched:
        """Download ``url``, following redirects; each target is checked before it is requested."""
        for _ in range(self._guard.max_redirects + 1):
            found = await self._visit(client, url, share)
            if isinstance(found, Fetched):
                return found
            if not self._guard.allow_redirects:
                raise MediaRefusedError(
                    "The URL redirects, which is not allowed here (--no-media-url-allow-redirects, "
                    "or SENSORIUM_MEDIA_URL_ALLOW_REDIRECTS=0)."
                )
            url = redirected(self._guard, url, found.location)
        raise MediaRefusedError(
            f"The URL redirects more than {self._guard.max_redirects} times "
            "(--max-media-redirects)."
        )

    async def _visit(
        self, client: aiohttp.ClientSession, url: URL, share: Share
    ) -> Fetched | _Redirect:
        """Take one hop: from the disk cache if the URL is there, else from its host."""
        listed = self._guard.is_listed(url)
        if self._cache is not None:
            limit = self._config.max_media_bytes
            kept = await self._workers.run(self._cache.get, str(url), listed, limit)
            if kept is not None:
                share.change(len(kept.data))
                return kept
        try:
            async with client.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    return _Redirect(response.headers["Location"])
                if response.status != 200:
                    _refuse_status(response.status)
                data = await self._body(response, share)
        except SensoriumError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _outcome(error) from None
        digest = await self._workers.run(encoded_digest, data)
        fetched = Fetched(data, digest, reusable=may_reuse(response.headers))
        if self._cache is not None:
            self._cache.put(str(url), listed, fetched, seconds_to_keep(response.headers))
        return fetched

    async def _body(self, response: aiohttp.ClientResponse, share: Share) -> bytes:
        """Read the body, and unpack and join it outside the event loop."""
        limit = self._config.max_media_bytes
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in _PLAIN and encoding not in ENCODINGS:
            raise MediaFetchError("The host of the URL sent a body in an unknown encoding.")
        pieces = await _read(response, limit, share.change)
        if encoding in ENCODINGS:
            return await self._workers.run(_unpack, pieces, encoding, limit, share)
        return pieces[0] if len(pieces) == 1 else await self._workers.run(b"".join, pieces)


def redirected(guard: Guard, url: URL, location: str) -> URL:
    """Return the checked target of a redirect. Raises MediaRefusedError or MediaFetchError."""
    if "://" in location.partition("?")[0]:
        target = location
    else:
        try:
            target = str(url.join(URL(location)))
        except ValueError:
            raise MediaFetchError("The URL redirects to a place that is no URL.") from None
    checked = guard.check_url(target)
    if url.scheme == "https" and checked.scheme != "https":
        raise MediaRefusedError(
            "The URL redirects from https to http, where anyone on the way could exchange what is "
            "sent."
        )
    return checked


def may_reuse(headers: Headers) -> bool:
    """Return whether a response may serve requests that come right after it."""
    forbidden = re.search(r"no-store|no-cache", _cache_control(headers))
    return forbidden is None and "*" not in ",".join(headers.getall("Vary", []))


def seconds_to_keep(headers: Headers) -> float:
    """Return how long a response may be kept: 0 if not at all, infinity if it does not say."""
    control = _cache_control(headers)
    if not may_reuse(headers) or "private" in control:
        return 0.0
    max_age = re.search(r'(?<![\w-])max-age\s*=?\s*"?([^",\s]*)', control)
    if max_age is not None:
        return _seconds(max_age[1]) - _seconds(headers.get("Age", ""))
    if "Expires" not in headers:
        return math.inf
    try:
        return parsedate_to_datetime(headers["Expires"]).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _cache_control(headers: Headers) -> str:
    lines = headers.getall("Cache-Control", []) or headers.getall("Pragma", [])
    return ",".join(lines).lower()


def _seconds(text: str) -> float:
    """Return a number of seconds in a header; 0 for other text, which lets a response expire."""
    return float(text[:12]) if text.isascii() and text.isdigit() else 0.0


async def _read(
    response: aiohttp.ClientResponse, limit: int, count: Callable[[int], None]
) -> list[bytes]:
    """Read a body as it is sent, in pieces of about 1 MiB and at most ``limit`` bytes.

    ``count`` is called with each number of bytes before they are kept, and may raise.
    """
    if response.content_length is not None and response.content_length > limit:
        raise too_large(limit)
    pieces: list[bytes] = []
    piece = bytearray()
    size = 0
    with _failing_with_connection(response):
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            count(len(chunk))
            piece += chunk
            if len(piece) >= _PIECE_BYTES:
                pieces.append(bytes(piece))
                piece.clear()
    return [*pieces, bytes(piece)]


@contextmanager
def _failing_with_connection(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Let reads of the body in the block fail once the connection is closed before the body's end.

    aiohttp closes a connection whose body is no HTTP (a chunk without a size, say), but tells only
    reads of the head: those of the body would wait until the deadline.
    """
    content = response.content
    connection = response.connection

    def fail(_: object = None) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError())

    if connection is None or connection.protocol is None:
        yield  # the whole body is here
        return
    closed = connection.protocol.closed
    if closed is None:
        fail()
        yield
        return
    # A connection serves many downloads: none may leave a callback of its own on it.
    closed.remove_done_callback(_take_note)
    closed.add_done_callback(_take_note)
    closed.add_done_callback(fail)
    try:
        yield
    finally:
        closed.remove_done_callback(fail)


def _take_note(closed: asyncio.Future[None]) -> None:
    """Take the error of a connection that was reset, which asyncio would log as one nobody saw."""
    if not closed.cancelled():
        closed.exception()


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
    """Return the error for a failure of aiohttp, whose own text may hold addresses."""
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
