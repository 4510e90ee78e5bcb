"""Server-sent events: one ``data:`` line per chunk, with ``[DONE]`` at the end or with names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sensorium.errors import SensoriumError
from sensorium.server.access_log import record_error
from sensorium.server.errors import ClientDisconnectedError, error_body, log_unexpected
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.payload import encode

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
Chunks = AsyncGenerator[Sequence[dict[str, Any]], None]


class EventStream(Response):
    """Response that streams the chunks of a generator; those of one step are written together.

    The status line is sent with the first chunk, so an error before it is answered with its own
    status; a later one becomes an ``error`` event. The generator is closed when the client
    disconnects.
    """

    end = b"data: [DONE]\n\n"

    def __init__(
        self, chunks: Chunks, headers: Callable[[], Mapping[str, str]] | None = None
    ) -> None:
        """``headers`` is called before the first chunk is sent, and returns further headers."""
        super().__init__()
        self._chunks = chunks
        self._more_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream."""
        self._started = False
        try:
            await unless_disconnected(receive, self._write(scope, send))
        except ClientDisconnectedError:
            if not self._started:
                raise
            scope["state"]["disconnected"] = True

    def encoded(self, event: dict[str, Any]) -> bytes:
        """Return an event as it is sent."""
        return b"data: %b\n\n" % encode(event)

    def failure(self, error: BaseException) -> Sequence[dict[str, Any]]:
        """Return the last events of a stream that fails after it began."""
        return [{"error": error_body(error)}]

    async def _write(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._chunks) as steps:
            try:
                async for step in steps:
                    await self._send_events(send, step)
            except Exception as error:
                if not self._started:
                    raise
                log_unexpected(error, scope)
                if isinstance(error, SensoriumError):
                    record_error(scope, error)
                await self._send_events(send, self.failure(error))
        await self._start(send)
        await send({"type": "http.response.body", "body": self.end, "more_body": False})

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            more = self._more_headers() if self._more_headers is not None else {}
            headers = [*_HEADERS, *((k.lower().encode(), v.encode()) for k, v in more.items())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_events(self, send: Send, chunks: Iterable[dict[str, Any]]) -> None:
        body = b"".join(map(self.encoded, chunks))
        if body:
            await self._start(send)
            await send({"type": "http.response.body", "body": body, "more_body": True})


class TypedEventStream(EventStream):
    """Stream whose events are named by their ``type``, and which ends without a mark.

    ``failed`` returns the last events of a stream that fails after it began.
    """

    end = b""

    def __init__(
        self,
        chunks: Chunks,
        headers: Callable[[], Mapping[str, str]] | None = None,
        *,
        failed: Callable[[BaseException], Sequence[dict[str, Any]]],
    ) -> None:
        super().__init__(chunks, headers)
        self._failed = failed

    def encoded(self, event: dict[str, Any]) -> bytes:
        """Return an event with its name."""
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode(event))

    def failure(self, error: BaseException) -> Sequence[dict[str, Any]]:
        """Return what ``failed`` returns."""
        return self._failed(error)
