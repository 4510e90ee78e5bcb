"""Streamed requests to an OpenAI-compatible server, with the time of each chunk."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(slots=True)
class RequestRecord:
    """Record of one request. Times are seconds of ``time.perf_counter()``.

    ``chunk_times`` are those of the chunks with text. Token counts are the server's own, from its
    usage; ``has_usage`` is False when it sent none, and then ``completion_tokens`` is the number
    of chunks. ``error`` is None, or a short code: the HTTP status with the code of the error's
    body, ``connection``, ``timeout`` or ``broken_stream``. ``left``: the client disconnected on
    purpose.
    """

    start_time: float
    end_time: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    has_usage: bool = False
    error: str | None = None
    error_message: str = ""
    left: bool = False

    @property
    def completed(self) -> bool:
        """True if the answer arrived completely."""
        return self.error is None and not self.left

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from sending to the first text."""
        return self.chunk_times[0] - self.start_time if self.chunk_times else None

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first; None for fewer than two tokens."""
        if len(self.chunk_times) < 2 or self.completion_tokens < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.completion_tokens - 1)

    @property
    def inter_chunk_times(self) -> list[float]:
        """Seconds between successive chunks with text; a chunk is one token on most servers."""
        times = self.chunk_times
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @property
    def end_to_end(self) -> float:
        """Seconds from sending to the end of the stream."""
        return self.end_time - self.start_time


class BrokenStreamError(Exception):
    """A stream ended early, or contained an error."""


class StreamClient:
    """Client that sends chat requests over one connection pool; an async context manager.

    Args:
        base_url: address of the server; may end in ``/v1``.
        timeout: seconds per request.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        base_url = base_url.rstrip("/")
        self.base_url = base_url if base_url.endswith("/v1") else f"{base_url}/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> StreamClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout, headers=self._headers
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._open_session.close()

    async def first_model(self) -> str:
        """Return the first model that the server lists. Raises ConnectionError if there is none."""
        try:
            async with self._open_session.get(f"{self.base_url}/models") as response:
                body = json.loads(await response.read())
                return str(body["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(
                f"{self.base_url}/models lists no model ({type(error).__name__}): is the server "
                "up, and the API key right?"
            ) from error

    async def send(self, body: bytes, *, leave_after: int | None = None) -> RequestRecord:
        """Send a chat request with ``"stream": true`` and read the answer; errors are recorded.

        Args:
            body: JSON of the request.
            leave_after: disconnect after this many chunks with text.
        """
        record = RequestRecord(start_time=time.perf_counter())
        try:
            await self._receive(body, record, leave_after)
        except TimeoutError:
            record.error = "timeout"
        except BrokenStreamError as error:
            record.error, record.error_message = "broken_stream", str(error)
        except aiohttp.ClientPayloadError as error:
            record.error, record.error_message = "broken_stream", str(error)
        except (aiohttp.ClientError, OSError) as error:
            record.error, record.error_message = "connection", str(error)
        record.end_time = time.perf_counter()
        return record

    @property
    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("StreamClient is used outside of its context")
        return self._session

    async def _receive(self, body: bytes, record: RequestRecord, leave_after: int | None) -> None:
        url = f"{self.base_url}/chat/completions"
        async with self._open_session.post(url, data=body) as response:
            if response.status != 200:
                record.error, record.error_message = _refusal(
                    response.status, await response.read()
                )
                return
            async for data in events(response.content.iter_any()):
                if data == "[DONE]":
                    break
                _accept(_parsed(data), record, time.perf_counter())
                if leave_after is not None and len(record.chunk_times) >= leave_after:
                    record.left = True
                    response.close()
                    return
            else:
                raise BrokenStreamError("the stream ended without [DONE]")
        if not record.has_usage:
            record.completion_tokens = len(record.chunk_times)


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield the data of server-sent events from chunks of bytes."""
    rest = b""
    data: list[str] = []
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:").removeprefix(b" ").decode())
            elif not line and data:
                yield "\n".join(data)
                data = []


def _accept(chunk: dict[str, Any], record: RequestRecord, now: float) -> None:
    if chunk.get("error"):
        raise BrokenStreamError(_message_of(chunk["error"]))
    usage = chunk.get("usage")
    if usage:
        record.has_usage = True
        record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        record.completion_tokens = int(usage.get("completion_tokens") or 0)
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = int(details.get("cached_tokens") or 0)
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content"):
            record.chunk_times.append(now)
        elif choice.get("finish_reason") and not record.chunk_times:
            record.chunk_times.append(now)  # tokens without text: the end is the only time known


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise BrokenStreamError(f"an event is not JSON: {data[:80]!r}") from error
    if not isinstance(chunk, dict):
        raise BrokenStreamError(f"an event is not an object: {data[:80]!r}")
    return chunk


def _refusal(status: int, body: bytes) -> tuple[str, str]:
    """Return code and message of an error answer, such as ``503 overloaded``."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code")
        return (f"{status} {code}" if code else str(status)), _message_of(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(status), body[:200].decode(errors="replace")


def _message_of(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
