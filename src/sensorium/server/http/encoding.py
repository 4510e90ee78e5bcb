"""Decompression of request bodies within limits."""

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
"""Largest ratio of a body to its compressed form. Text shrinks about tenfold; a client that sends
little must not be able to fill the memory."""
_ALWAYS_ALLOWED = 1 << 20

MOST_AT_ONCE = 4
"""Compressed bodies that are decompressed and decoded at once; bounds the memory of many."""


@asynccontextmanager
async def plain_body(
    request: Request, body: bytes, most: int, unpacking: asyncio.Semaphore
) -> AsyncIterator[bytes]:
    """Give the decompressed body, of at most ``most`` bytes, to be decoded within the block.

    ``unpacking`` has ``MOST_AT_ONCE`` places, for which compressed bodies wait. Raises
    UnsupportedEncodingError, InvalidRequestError for a damaged body, and BodyTooLargeError.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        yield body
        return
    if encoding not in ENCODINGS:
        raise UnsupportedEncodingError(
            f"Content-Encoding {encoding[:100]!r} is not supported; send the body uncompressed, or "
            "as gzip or deflate.",
        )
    limit = min(most, max(_ALWAYS_ALLOWED, MOST_TIMES * len(body)))
    async with unpacking:
        yield await asyncio.to_thread(decompress, body, encoding, limit)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Return the decompressed body. Raises BodyTooLargeError or InvalidRequestError."""
    try:
        return unzip([body], encoding, limit)
    except MediaTooLargeError as error:
        raise BodyTooLargeError(
            f"The body has {len(body)} bytes and decompresses to more than {limit}, the limit "
            f"(--max-body-bytes, and {MOST_TIMES} times what was sent). Send it uncompressed, or "
            "in several requests."
        ) from error
    except MediaFetchError as error:
        raise InvalidRequestError(
            f"The body is incomplete or damaged: it cannot be decompressed as {encoding}, its "
            "Content-Encoding."
        ) from error
