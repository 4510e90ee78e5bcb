"""From exceptions to HTTP answers: one function, and the handlers that call it.

The body is always ``{"error": {"message", "type", "param", "code"}}``. An exception that nobody
expected is logged with the request's id and answered without a word about the inside.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from sensorium.errors import AuthenticationError, SensoriumError, UnavailableError
from sensorium.server.payload import JsonResponse

logger = logging.getLogger("sensorium.server")

CLIENT_CLOSED = 499


class ClientDisconnectedError(Exception):
    """The client closed its connection before the answer was complete."""


def error_body(error: BaseException) -> dict[str, Any]:
    """What ``error`` is for the client: the value of the ``error`` member."""
    if isinstance(error, SensoriumError) and error.status != 500:
        return error.to_dict()
    return SensoriumError(
        "The server failed to answer this request; its log has the cause, under X-Request-Id."
    ).to_dict()


def error_response(error: BaseException) -> Response:
    """The HTTP answer to ``error``."""
    if isinstance(error, ClientDisconnectedError | ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)
    if not isinstance(error, SensoriumError):
        return JsonResponse({"error": error_body(error)}, status_code=500)
    headers = {}
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return JsonResponse({"error": error_body(error)}, status_code=error.status, headers=headers)


def log_unexpected(error: BaseException, scope: Scope) -> None:
    """Write the trace of an exception that is no SensoriumError, with the id of its request."""
    if isinstance(error, SensoriumError) and error.status != 500:
        return
    request_id = scope.get("state", {}).get("request_id", "-")
    logger.error("request %s failed", request_id, exc_info=error)


def install_error_handlers(app: FastAPI) -> None:
    """Register the answers to all exceptions that a route may raise."""

    async def known(request: Request, error: Exception) -> Response:
        log_unexpected(error, request.scope)
        return error_response(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _http_error(request, error, list(app.openapi()["paths"]))

    async def gone(request: Request, error: Exception) -> Response:
        request.scope["state"]["disconnected"] = True
        return error_response(error)

    app.add_exception_handler(SensoriumError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(ClientDisconnectedError, gone)


def plain_error(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """An error of HTTP itself, in the same shape as the others."""
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JsonResponse({"error": body}, status_code=status, headers=headers)


def _http_error(request: Request, error: HTTPException, paths: list[str]) -> Response:
    path = request.scope["path"]
    if error.status_code == 404:
        near = difflib.get_close_matches(path, paths, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return plain_error(404, "not_found", f"There is nothing at {path[:200]!r}.{hint}")
    if error.status_code == 405:
        headers = dict(error.headers or {})
        allowed = headers.get("Allow", headers.get("allow", "other methods"))
        message = f"{path!r} does not accept {request.method}; use {allowed}."
        return plain_error(405, "method_not_allowed", message, headers)
    return plain_error(error.status_code, "invalid_request", str(error.detail), error.headers)
