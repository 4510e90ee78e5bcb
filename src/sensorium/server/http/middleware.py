"""Middleware around all routes: request ids, the access log, the limit on bodies, HEAD."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sensorium.errors import BodyTooLargeError, SensoriumError
from sensorium.metrics.prometheus import ServerMetrics
from sensorium.server.access_log import error_of, record_error
from sensorium.server.context import ServingContext
from sensorium.server.errors import CLIENT_CLOSED, error_response, log_unexpected
from sensorium.server.http.http11 import MAX_HEADER_BYTES, headers_too_large
from sensorium.tracing import asked_model, caller_span

if TYPE_CHECKING:
    from sensorium.server.models.served import ServedModel

access = logging.getLogger("sensorium.access")

HELD_MODEL = "held_model"
"""Key of a request's state: the model that it holds until its answer is complete."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACE_PARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class RequestTracking:
    """Outermost ASGI middleware: ids, counts and log of requests; 500 for unexpected exceptions."""

    def __init__(self, app: ASGIApp, context: ServingContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request from its first byte to its last."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = _request_id(scope)
        scope["root_path"] = self._context.config.root_path
        started_at = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", state["request_id"].encode()),
                ]
            await send(message)

        app = self._app if _header_bytes(scope) <= MAX_HEADER_BYTES else headers_too_large()
        self._context.num_in_flight += 1
        token = caller_span.set(_caller_span(scope))
        asked = asked_model.set(None)  # the request will say
        try:
            await app(scope, receive, send_with_id)
        except Exception as error:
            log_unexpected(error, scope)
            if isinstance(error, SensoriumError):
                record_error(scope, error)
            if status:
                raise
            await error_response(error)(scope, receive, send_with_id)
        finally:
            asked_model.reset(asked)
            caller_span.reset(token)
            self._context.num_in_flight -= 1
            held: ServedModel | None = state.get(HELD_MODEL)
            if held is not None:
                held.release()
            metrics = self._context.metrics if held is None else held.metrics
            self._report(scope, status, time.monotonic() - started_at, metrics)

    def _report(self, scope: Scope, status: int, seconds: float, metrics: ServerMetrics) -> None:
        """Report the end of a request to the metrics and the log."""
        if not status or scope["state"].get("disconnected"):
            status = CLIENT_CLOSED
        route = getattr(scope.get("route"), "path", None)
        metrics.http_request(route, scope["method"], status, seconds)
        if not self._context.config.disable_access_log:
            _log(scope, status, seconds)


class HeadAsGet:
    """ASGI middleware that answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass HEAD on as GET; restore the method in the scope afterwards."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        scope["method"] = "GET"
        scope.setdefault("state", {})["head"] = True
        try:
            await self._app(scope, receive, send_head)
        finally:
            scope["method"] = "HEAD"


class BodyLimit:
    """ASGI middleware that refuses a body over ``max_bytes`` as soon as its size is known.

    ``uploads``: bytes of the bodies posted to paths that stream them to disk.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, uploads: Mapping[str, int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counted ``receive``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = self._uploads.get(scope["path"]) if scope["method"] == "POST" else None
        most = self._max_bytes if upload is None else upload
        error = self._too_large() if upload is None else _upload_too_large(most)
        if _declared_length(scope) > most:
            record_error(scope, error)
            await error_response(error)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise error
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"The body is larger than {self._max_bytes} bytes, the limit (--max-body-bytes)."
        )


def _upload_too_large(most: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The upload is larger than {most} bytes, the limit with its form (--max-file-bytes)."
    )


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-Id where it is valid, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return uuid.uuid4().hex


def _caller_span(scope: Scope) -> str | None:
    """Return the caller's span of W3C's ``traceparent`` header; None without a valid one."""
    for name, value in scope["headers"]:
        if name == b"traceparent" and _TRACE_PARENT.fullmatch(value):
            return str(value.decode())
    return None


def _header_bytes(scope: Scope) -> int:
    """Return the size of request line and headers; h11 bounds only what comes in pieces."""
    line = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    return line + sum(len(name) + len(value) for name, value in scope["headers"])


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return 0


def _log(scope: Scope, status: int, seconds: float) -> None:
    path = scope.get("raw_path") or scope["path"].encode()
    access.info(
        "%s %s %d %.1f ms id=%s%s",
        scope["method"],
        path.decode("ascii", "backslashreplace"),
        status,
        seconds * 1000,
        scope["state"]["request_id"],
        error_of(scope),
    )
