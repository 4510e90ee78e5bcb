"""Compressed bodies of downloads and requests: gzip and deflate, unpacked in bounded steps.

Not left to aiohttp, which takes a truncated gzip body for a whole one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

from sensorium.errors import MediaFetchError, MediaTooLargeError

ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})
"""Values of ``Content-Encoding`` that can be unpacked."""

MAX_MEMBERS = 1024
_STEP_IN = 1 << 16
_STEP_OUT = 1 << 20
_GZIP_MARK = 0x1F


def unzip(
    pieces: Iterable[bytes],
    encoding: str,
    limit: int,
    count: Callable[[int], None] = lambda num_bytes: None,
) -> bytes:
    """Unpack a body of one of ``ENCODINGS`` that came in ``pieces``.

    Further gzip members belong to the body; other bytes after its end are ignored. At most one step
    of 1 MiB is unpacked beyond ``limit`` bytes. ``count`` is called with each number of bytes that
    was unpacked, and may raise. Raises MediaTooLargeError, or MediaFetchError for a damaged or
    truncated body.
    """
    plain: list[bytes] = []
    size = num_members = 0
    inflater: zlib._Decompress | None = None
    for data in _steps(pieces):
        while data:
            if inflater is None:
                if num_members and data[0] != _GZIP_MARK:
                    return b"".join(plain)
                num_members += 1
                inflater = _begin_member(num_members, bytes(data[:2]), encoding)
            for part in _inflate(inflater, data):
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                count(len(part))
                plain.append(part)
            data = b""
            if inflater.eof:
                data, inflater = inflater.unused_data, None
    if inflater is not None or not num_members:
        raise MediaFetchError("The host of the URL sent a truncated compressed body.")
    return b"".join(plain)


def _steps(pieces: Iterable[bytes]) -> Iterator[bytes | memoryview]:
    """Cut pieces into steps: zlib copies what is left of its input at each call."""
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _STEP_IN):
            yield view[start : start + _STEP_IN]


def _begin_member(number: int, start: bytes, encoding: str) -> zlib._Decompress:
    """Make the decompressor of a member that begins with the bytes ``start``."""
    if number > MAX_MEMBERS:
        raise MediaFetchError(
            f"The host of the URL sent a compressed body in more than {MAX_MEMBERS} parts."
        )
    if start[0] == _GZIP_MARK:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    # "deflate" means zlib's form by the standard, and none in many servers.
    has_header = len(start) == 2 and start[0] & 15 == 8 and int.from_bytes(start) % 31 == 0
    is_zlib = has_header or encoding != "deflate"
    return zlib.decompressobj(wbits=zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def _inflate(inflater: zlib._Decompress, data: bytes | memoryview) -> Iterator[bytes]:
    """Unpack ``data`` up to the end of the member, in steps."""
    while True:
        try:
            part = inflater.decompress(data, _STEP_OUT)
        except zlib.error:
            raise MediaFetchError("The host of the URL sent a damaged compressed body.") from None
        yield part
        data = inflater.unconsumed_tail
        if inflater.eof or (not data and len(part) < _STEP_OUT):
            return


def too_large(limit: int) -> MediaTooLargeError:
    """Return the error for a download of more than ``limit`` bytes."""
    return MediaTooLargeError(
        f"The download has more than {limit} bytes, the limit (--max-media-bytes)."
    )
