"""Compressed bodies of downloads: gzip and deflate, unpacked in steps so that no more than a limit exists."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

from sensorium.errors import MediaFetchError, MediaTooLargeError

ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})
"""Values of ``Content-Encoding`` that can be unpacked."""

MAX_MEMBERS = 1024
_STEP_IN = 1 << 16
_STEP_OUT = 1 << 20
_GZIP, _ZLIB, _RAW = zlib.MAX_WBITS | 16, zlib.MAX_WBITS, -zlib.MAX_WBITS
_GZIP_MARK = 0x1F


def unzip(
    pieces: Iterable[bytes],
    encoding: str,
    limit: int,
    count: Callable[[int], None] = lambda num_bytes: None,
) -> bytes:
    """Unpack a body that came in ``pieces``; what follows its end is ignored, but further gzip members belong to it.

    ``encoding`` is one of ``ENCODINGS``. At most ``limit`` bytes and one step more are unpacked; ``count`` is told of
    those that came into being, and may raise. Raises MediaTooLargeError, or MediaFetchError for a damaged or
    truncated body.
    """
    body = _Body(encoding, limit, count)
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _STEP_IN):
            body.feed(view[start : start + _STEP_IN])
    return body.finish()


class _Body:
    """What has been unpacked so far."""

    def __init__(self, encoding: str, limit: int, count: Callable[[int], None]) -> None:
        self._encoding = encoding
        self._limit = limit
        self._count = count
        self._plain: list[bytes] = []
        self._size = 0
        self._inflater: zlib._Decompress | None = None
        self._num_members = 0
        self._ended = False

    def feed(self, data: memoryview | bytes) -> None:
        """Unpack the next bytes of the body."""
        while len(data) and not self._ended:
            if self._inflater is None:
                self._begin(data)
            if self._inflater is not None:
                data = self._inflate(self._inflater, data)

    def finish(self) -> bytes:
        """The whole body. Raises MediaFetchError when its end is missing."""
        if self._inflater is not None or not self._num_members:
            raise MediaFetchError("The host of the URL sent a truncated compressed body.")
        return b"".join(self._plain)

    def _begin(self, data: memoryview | bytes) -> None:
        """Begin the first member or one more; what comes behind the last one is padding."""
        if self._num_members and data[0] != _GZIP_MARK:
            self._ended = True
            return
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise MediaFetchError(
                f"The host of the URL sent a compressed body in more than {MAX_MEMBERS} parts."
            )
        self._inflater = zlib.decompressobj(wbits=self._form(bytes(data[:2])))

    def _form(self, start: bytes) -> int:
        """Which of the three forms begins so; deflate means zlib's by the standard and none in many servers."""
        if start[0] == _GZIP_MARK:
            return _GZIP
        has_header = len(start) == 2 and start[0] & 15 == 8 and int.from_bytes(start) % 31 == 0
        return _ZLIB if has_header or self._encoding != "deflate" else _RAW

    def _inflate(self, inflater: zlib._Decompress, data: memoryview | bytes) -> bytes:
        """Unpack ``data``; returns what follows the end of the member."""
        while True:
            most = min(_STEP_OUT, self._limit + 1 - self._size)
            try:
                plain = inflater.decompress(data, most)
            except zlib.error:
                raise MediaFetchError(
                    "The host of the URL sent a damaged compressed body."
                ) from None
            self._plain.append(plain)
            self._size += len(plain)
            if self._size > self._limit:
                raise too_large(self._limit)
            self._count(len(plain))
            if inflater.eof:
                self._inflater = None
                return inflater.unused_data
            data = inflater.unconsumed_tail
            if not data and len(plain) < most:
                return b""


def too_large(limit: int) -> MediaTooLargeError:
    """The error for a download of more than ``limit`` bytes."""
    return MediaTooLargeError(
        f"The download has more than {limit} bytes, the limit (--max-media-bytes)."
    )
