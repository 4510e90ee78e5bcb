"""Requests of batches to the application of this process, without a socket."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

_BELOW_OTHERS = 1 << 32
"""Priority of batches: beyond what a request may ask for, and higher numbers run later."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: ``body`` is what came, JSON if all is well.

    ``is_final``: the request is not to be tried again, whatever the status.
    """

    status: int
    request_id: str
    body: bytes
    retry_after: float | None = None
    is_final: bool = False


def seconds_until(retry_after: str) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks to wait, a number or a date.

    None for an empty header, and for what is neither.
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class Caller(Protocol):
    """Sender of the requests of a batch."""

    async def call(self, url: str, body: bytes) -> Reply:
        """Return the answer to a POST of JSON. Raises UnavailableError when none comes."""
        ...


class AppCaller:
    """Calls an application on behalf of a tenant; ``below``: other requests come first."""

    def __init__(self, app: ASGIApp, tenant: str, *, below: bool) -> None:
        self._app = app
        self._tenant = tenant
        self._priority = _BELOW_OTHERS if below else 0

    async def call(self, url: str, body: bytes) -> Reply:
        """See ``Caller.call``. Cancelling ends the work."""
        messages: list[Message] = []
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # nobody hangs up
            raise AssertionError

        async def send(message: Message) -> None:
            messages.append(message)

        await self._app(self._scope(url, len(body)), receive, send)
        start = messages[0]
        headers = {name.decode("latin-1"): value for name, value in start["headers"]}
        return Reply(
            start["status"],
            headers.get("x-request-id", b"").decode("latin-1"),
            b"".join(message.get("body", b"") for message in messages[1:]),
            seconds_until(headers.get("retry-after", b"").decode("latin-1")),
        )

    def _scope(self, url: str, num_bytes: int) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", str(num_bytes).encode()),
            ],
            "server": ("localhost", 0),
            "client": None,
            "state": {"tenant": self._tenant, "priority": self._priority},
        }
