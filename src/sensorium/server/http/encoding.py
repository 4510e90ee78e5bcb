"""Compressed bodies of requests, unpacked within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from sensorium.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    MediaFetchError,
    MediaTooLargeError,
    UnsupportedEncodingError,
)
from sensorium.multimodal.fetch.inflate import ENCODINGS, unzip

MOST_TIMES = 100
"""How many times its own size a compressed body may become: text becomes some ten times smaller, and a client that
sends little must not be able to fill the memory."""
_ALWAYS_ALLOWED = 1 << 20

MOST_AT_ONCE = 4
"""Compressed bodies that are unpacked and read at once: many small ones together must not fill the memory, either."""


@asynccontextmanager
async def plain_body(
    request: Request, body: bytes, most: int, unpacking: asyncio.Semaphore
) -> AsyncIterator[bytes]:
    """Give the body as it was before its Content-Encoding, ``most`` bytes at the most, to be read within the block.

    ``unpacking`` has ``MOST_AT_ONCE`` places, for which compressed bodies wait. Raises UnsupportedEncodingError,
    InvalidRequestError for a damaged body, and BodyTooLargeError.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        yield body
        return
    if encoding not in ENCODINGS:
        raise UnsupportedEncodingError(
            f"Content-Encoding {encoding[:100]!r} is not read here: send the body as it is, or as gzip or deflate.",
        )
    limit = min(most, max(_ALWAYS_ALLOWED, MOST_TIMES * len(body)))
    async with unpacking:
        yield await asyncio.to_thread(_unpacked, body, encoding, limit)


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    try:
        return unzip([body], encoding, limit)
    except MediaTooLargeError as error:
        raise BodyTooLargeError(
            f"The body has {len(body)} bytes and becomes more than {limit}, the limit here (--max-body-bytes, and "
            f"{MOST_TIMES} times what was sent). Send it uncompressed, or in several requests."
        ) from error
    except MediaFetchError as error:
        raise InvalidRequestError(
            f"The body is not whole, or not {encoding}, as its Content-Encoding says."
        ) from error
