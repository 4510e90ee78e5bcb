"""Downloads over HTTP.

One deadline covers a whole download, its redirects and its retries. Bodies are read in pieces and counted, whatever
their headers promise. Proxies of the environment, cookies and stored credentials are not used. Imported at the first
``http:`` or ``https:`` URL: the client library takes longer to import than all else here.
"""

from __future__ import annotations

import asyncio
import random
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sensorium.errors import (
    MediaFetchError,
    MediaRefusedError,
    MediaTooLargeError,
    RequestError,
)
from sensorium.multimodal.guard import MAX_REDIRECTS, Guard
from sensorium.multimodal.workers import Workers

MAX_CONNECTIONS = 64
_CHUNK_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({429, 502, 503, 504})
_FIRST_BACKOFF = 0.1
_MAX_ATTEMPTS = 4
_PLAIN = frozenset({"", "identity"})
_ZIPPED = frozenset({"gzip", "x-gzip", "deflate"})
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "sensorium"}


class GuardedResolver(AbstractResolver):
    """The resolver of the HTTP client: the addresses that it returns have passed the guard."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        self._guard = guard
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve once and check every address. Raises MediaRefusedError, or OSError when there is no such host."""
        found = await self._resolver.resolve(host, port, family)
        self._guard.check_addresses(host, [entry["host"] for entry in found])
        return found

    async def close(self) -> None:
        """Close the resolver underneath."""
        await self._resolver.close()


class _TransientError(Exception):
    """Worth another attempt; ``outcome`` is what the caller is told if there is none left."""

    def __init__(self, outcome: MediaFetchError) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


@dataclass(slots=True)
class _Session:
    client: aiohttp.ClientSession
    num_users: int = 0


class HttpClient:
    """Downloads over HTTP for a ``Fetcher``. Usable from several event loops.

    A client session exists per loop while downloads run there, and is closed by the last of them: connections are
    shared by what is fetched together, and nothing stays open behind. ``resolver`` makes the resolver underneath the
    guard's; by default the system's.
    """

    def __init__(
        self,
        guard: Guard,
        workers: Workers,
        resolver: Callable[[], AbstractResolver] | None = None,
    ) -> None:
        self._guard = guard
        self._workers = workers
        self._resolver = resolver or aiohttp.ThreadedResolver
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}

    async def download(self, url: URL, *, seconds: float, max_bytes: int) -> bytes:
        """The body behind a URL that the guard has checked, whole within ``seconds``.

        Raises MediaRefusedError, MediaTooLargeError or MediaFetchError, and TimeoutError.
        """
        async with asyncio.timeout(seconds), self._session() as client:
            return await self._with_retries(client, url, max_bytes)

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            session = self._sessions[loop] = _Session(self._new_client())
        session.num_users += 1
        try:
            yield session.client
        finally:
            session.num_users -= 1
            if not session.num_users:
                del self._sessions[loop]
                await session.client.close()

    def _new_client(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=GuardedResolver(self._guard, self._resolver()),
            use_dns_cache=False,
            limit=MAX_CONNECTIONS,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            trust_env=False,
            auto_decompress=False,
            headers=_HEADERS,
        )

    async def _with_retries(self, client: aiohttp.ClientSession, url: URL, limit: int) -> bytes:
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return await self._follow(client, url, limit)
            except _TransientError as error:
                if attempt == _MAX_ATTEMPTS - 1:
                    raise error.outcome from None
            await asyncio.sleep(_FIRST_BACKOFF * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    async def _follow(self, client: aiohttp.ClientSession, url: URL, limit: int) -> bytes:
        """Download ``url``, following redirects; every hop is checked before anything is sent to it."""
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._request(client, url, limit)
            if isinstance(answer, bytes):
                return answer
            if not self._guard.allow_redirects:
                raise MediaRefusedError("The URL redirects, which this server does not allow.")
            url = self._redirected(url, answer.location)
        raise MediaRefusedError(f"The URL redirects more than {MAX_REDIRECTS} times.")

    def _redirected(self, url: URL, location: str) -> URL:
        if "://" in location.partition("?")[0]:
            return self._guard.check_url(location)
        try:
            target = url.join(URL(location))
        except ValueError:
            raise MediaFetchError("The URL redirects to a place that is no URL.") from None
        return self._guard.check_url(str(target))

    async def _request(
        self, client: aiohttp.ClientSession, url: URL, limit: int
    ) -> bytes | _Redirect:
        try:
            async with client.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    return _Redirect(response.headers["Location"])
                if response.status != 200:
                    _refuse_status(response.status)
                encoding = response.headers.get("Content-Encoding", "").strip().lower()
                if encoding not in _PLAIN and encoding not in _ZIPPED:
                    raise MediaFetchError("The host of the URL sent a body in an unknown encoding.")
                body = await _read_body(response, limit)
        except RequestError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _outcome(error) from None
        if encoding in _ZIPPED:
            return await self._workers.run(unzip, body, limit)
        return bytes(body)


def _outcome(error: Exception) -> Exception:
    """What a failure of the client means. Its own text may hold addresses and is not passed on."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        unknown = MediaFetchError("The host of the URL cannot be found.")
        return _TransientError(unknown) if error.errno == socket.EAI_AGAIN else unknown
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


async def _read_body(response: aiohttp.ClientResponse, limit: int) -> bytearray:
    """The body as it was sent, at most ``limit`` bytes of it."""
    if response.content_length is not None and response.content_length > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        body += chunk
    return body


def unzip(body: bytes | bytearray, limit: int) -> bytes:
    """Unpack a gzip or zlib body; never more than ``limit`` bytes of it exist.

    Raises MediaTooLargeError, or MediaFetchError for a damaged or truncated body.
    """
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise MediaFetchError("The host of the URL sent a damaged compressed body.") from None
    if len(plain) > limit:
        raise _too_large(limit)
    if not inflater.eof:
        raise MediaFetchError("The host of the URL sent a truncated compressed body.")
    return plain


def _too_large(limit: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"The download has more than {limit} bytes, the limit (--max-media-bytes)."
    )
