"""HTTP/1.1 of uvicorn, with its own errors in the same form as all others."""

from __future__ import annotations

import sys

import h11
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from sensorium.server.errors import plain_error

MAX_HEADER_BYTES = 64 * 1024


def headers_too_large() -> Response:
    """Return the answer to headers over the limit."""
    message = f"The headers are larger than {MAX_HEADER_BYTES} bytes, the limit."
    return plain_error(431, "headers_too_large", message, {"connection": "close"})


class StrictH11Protocol(H11Protocol):
    """Protocol that answers 431 to headers over ``MAX_HEADER_BYTES`` and 400 to invalid HTTP.

    It then closes the connection.
    """

    def send_400_response(self, msg: str) -> None:
        """Refuse the request that is being read. Called while its exception is handled."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == 431:
            response = headers_too_large()
        else:
            message = "This is not valid HTTP."
            response = plain_error(400, "invalid_request", message, {"connection": "close"})
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            event = h11.Response(status_code=response.status_code, headers=response.raw_headers)
            for part in (event, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()
