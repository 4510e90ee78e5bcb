"""Requests of a batch to a running server."""

from __future__ import annotations

from urllib.parse import urlsplit

import aiohttp
import msgspec

from sensorium.errors import ConfigError, UnavailableError
from sensorium.server.batches.calls import Reply, seconds_until
from sensorium.server.batches.urls import without_secrets

_CONNECT_SECONDS = 30.0


class RemoteCaller:
    """Sends requests to an OpenAI-compatible server; an asynchronous context manager.

    Args:
        base_url: Address of the server; may end in ``/v1``.
        api_key: Key to send.
        timeout: Seconds for one request.
    """

    def __init__(self, base_url: str, *, api_key: str | None, timeout: float) -> None:
        base_url = base_url if "//" in base_url else f"http://{base_url}"
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            given = without_secrets(base_url)
            raise ConfigError(f"--base-url must be an http(s) address, got {given!r}.")
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._seconds = timeout
        self._timeout = aiohttp.ClientTimeout(
            total=timeout, connect=min(_CONNECT_SECONDS, timeout / 2)
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RemoteCaller:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout, headers=self._headers
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def call(self, url: str, body: bytes) -> Reply:
        """See ``Caller.call``. A request that takes too long gets 408, which is final."""
        assert self._session is not None
        try:
            async with self._session.post(f"{self._base_url}{url}", data=body) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            # Without a connection the server is away; else this request takes too long each time.
            if isinstance(error, TimeoutError) and not isinstance(
                error, aiohttp.ConnectionTimeoutError
            ):
                return self._too_slow()
            raise UnavailableError(
                f"{without_secrets(self._base_url)} does not answer ({type(error).__name__})."
            ) from error
        headers = response.headers
        return Reply(
            response.status,
            headers.get("X-Request-Id", ""),
            content,
            seconds_until(headers.get("Retry-After", "")),
        )

    def _too_slow(self) -> Reply:
        message = f"The server did not answer within {self._seconds:g} s (--request-timeout)."
        error = {
            "message": message,
            "type": "server_error",
            "param": None,
            "code": "request_timeout",
        }
        return Reply(408, "", msgspec.json.encode({"error": error}), is_final=True)
