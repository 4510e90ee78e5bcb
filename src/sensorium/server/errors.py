"""HTTP answers to exceptions.

The body is always ``{"error": {"message", "type", "param", "code"}}``. An unexpected
exception is logged with the request's id; its answer tells nothing of the internals.
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
from starlette.types import Receive, Scope, Send

from sensorium.compat.fields import rename_for_client
from sensorium.compat.paths import instead_of
from sensorium.errors import AuthenticationError, SensoriumError, UnavailableError
from sensorium.server.access_log import LOGGED_ERROR, record_error
from sensorium.server.payload import JsonResponse

logger = logging.getLogger("sensorium.server")

CLIENT_CLOSED = 499
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}
_OTHER_CODE = "invalid_request"
_ALIKE = 0.85
"""Similarity above which a path counts as a typing error of another, as /v1/responses does not."""
CLIENT_NAMES = "client_names"
"""Key of a request's state: our fields by the names that its client used for them."""
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}
"""Types of errors in Anthropic's API, by status."""


class ClientDisconnectedError(Exception):
    """The client closed its connection before the answer was complete."""


class ErrorResponse(JsonResponse):
    """Answer with an error, in Anthropic's form on the paths of that API."""

    def __init__(
        self, error: dict[str, Any], status: int, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__({"error": error}, status, headers)
        self._error = error
        self._more_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        if not is_anthropic(scope):
            await super().__call__(scope, receive, send)
            return
        body = anthropic_body(self._error, self.status_code, scope["state"]["request_id"])
        await JsonResponse(body, self.status_code, self._more_headers)(scope, receive, send)


def is_anthropic(scope: Scope) -> bool:
    """Return true for the paths of Anthropic's API."""
    path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_body(error: Mapping[str, Any], status: int, request_id: str) -> dict[str, Any]:
    """Return the body of an error in Anthropic's form, which has our code and param as well."""
    kind = _ANTHROPIC_TYPES.get(status, _ANTHROPIC_TYPES[400 if status < 500 else 500])
    return {"type": "error", "error": {**error, "type": kind}, "request_id": request_id}


def anthropic_error(error: BaseException, request_id: str) -> dict[str, Any]:
    """Return ``error`` in Anthropic's form, as it stands in a stream."""
    status = error.status if isinstance(error, SensoriumError) else 500
    return anthropic_body(error_body(error), status, request_id)


def error_body(error: BaseException) -> dict[str, Any]:
    """Return the ``error`` member of the answer to ``error``."""
    if isinstance(error, SensoriumError) and error.status != 500:
        return error.to_dict()
    return SensoriumError(
        "The server failed to answer this request. Its log has the cause, under the id in the "
        "X-Request-Id header."
    ).to_dict()


def error_response(error: BaseException) -> Response:
    """Return the HTTP answer to ``error``."""
    if isinstance(error, ClientDisconnectedError | ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)
    if not isinstance(error, SensoriumError):
        return ErrorResponse(error_body(error), 500)
    headers = {}
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorResponse(error_body(error), error.status, headers)


def log_unexpected(error: BaseException, scope: Scope) -> None:
    """Log the traceback of an unexpected exception, with the id of its request."""
    if isinstance(error, SensoriumError) and error.status != 500:
        return
    request_id = scope.get("state", {}).get("request_id", "-")
    logger.error("request %s failed", request_id, exc_info=error)


def install_error_handlers(app: FastAPI) -> None:
    """Register the handlers of all exceptions that a route may raise."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, SensoriumError)
        rename_for_client(error, request.scope["state"].get(CLIENT_NAMES, {}))
        log_unexpected(error, request.scope)
        record_error(request.scope, error)
        return error_response(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        request.scope["state"][LOGGED_ERROR] = (
            _HTTP_CODES.get(error.status_code, _OTHER_CODE),
            None,
        )
        return _http_error(request, error, app.openapi()["paths"])

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
    """Return an error of HTTP itself, in the same form as the others."""
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return ErrorResponse(body, status, headers)


def _hint(path: str, paths: list[str]) -> str:
    """Return the end of a sentence about an unknown path: what to use instead, where known."""
    if path.rstrip("/") in paths:
        return f"; use {path.rstrip('/')!r}, without a slash at its end."
    instead = instead_of(path)
    if instead is not None:
        return f": {instead}."
    near = difflib.get_close_matches(path, paths, n=1, cutoff=_ALIKE)
    return f". Did you mean {near[0]!r}?" if near else "."


def _http_error(request: Request, error: HTTPException, paths: Mapping[str, Any]) -> Response:
    path = request.scope["path"]
    if error.status_code == 404:
        return plain_error(
            404, "not_found", f"The path {path[:200]!r} does not exist{_hint(path, list(paths))}"
        )
    if error.status_code == 405:
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        route = str(getattr(request.scope.get("route"), "path", path))
        methods = [name.upper() for name in paths.get(route, ())]  # of all routes of the path
        allowed = ", ".join(methods) or headers.get("allow", "other methods")
        if "GET" in allowed:
            allowed = allowed.replace("GET", "GET, HEAD")
        headers["allow"] = allowed
        method = "HEAD" if request.scope["state"].get("head") else request.method
        message = f"{path!r} does not accept {method}; use {allowed}."
        return plain_error(405, _HTTP_CODES[405], message, headers)
    return plain_error(error.status_code, _OTHER_CODE, str(error.detail), error.headers)
