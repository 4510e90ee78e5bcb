"""API keys, and the tenants that share no media and caches."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from sensorium.errors import AuthenticationError
from sensorium.server.access_log import record_error
from sensorium.server.context import tenant_of_key
from sensorium.server.errors import error_response, is_anthropic

OPEN_PATHS = frozenset({"/health", "/ping"})


class ApiKeys:
    """The accepted keys, kept as digests.

    The digest of a presented key is compared with each of them in constant time, so the time of a
    comparison reveals nothing.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: bytes) -> bool:
        """Return true for an accepted key; all are compared, whatever the outcome."""
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class ApiKeyGuard:
    """ASGI middleware that answers 401 to requests without a valid ``Authorization: Bearer`` key.

    On the paths of Anthropic's API the key may be in ``X-Api-Key``. It also sets the tenant of a
    request.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        # A scope that has a tenant already was made in this process, for a line of a batch.
        if scope["type"] != "http" or not self._keys or "tenant" in scope["state"]:
            await self._app(scope, receive, send)
            return
        key = _presented(scope)
        if key is None and is_anthropic(scope):
            key = _header(scope, b"x-api-key")
        if key is not None and self._keys.accepts(key):
            scope["state"]["tenant"] = tenant_of_key(key)
        elif scope["path"] not in self._open_paths:
            message = (
                "This server needs an API key: send 'Authorization: Bearer KEY'."
                if key is None
                else "The API key is not valid for this server."
            )
            error = AuthenticationError(message)
            record_error(scope, error)
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _presented(scope: Scope) -> bytes | None:
    """Return the key of the first Authorization header."""
    scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _header(scope: Scope, wanted: bytes) -> bytes | None:
    """Return the value of the first header of a name."""
    return next((value for name, value in scope["headers"] if name == wanted), None)
