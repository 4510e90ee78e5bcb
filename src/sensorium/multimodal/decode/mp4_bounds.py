"""Checks of the sizes in MP4 and QuickTime headers, before FFmpeg allocates them.

Some tables give a number of samples and one size for all: a file of a few bytes then promises
millions, for each of which FFmpeg makes an entry when it opens the file. (ISO 14496-12: ``stsz`` in
8.7.3, ``trun`` in 8.8.8.)
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator

from sensorium.errors import MediaTooLargeError, MediaUndecodableError

MAX_SAMPLES = 1 << 25
"""Most samples of one size: over eleven minutes of audio at 48 000 samples per second."""
MOST_PER_BYTE = 16
"""QuickTime counts compressed audio by its decoded samples, as of one byte each."""
MAX_RUN_SAMPLES = 1 << 22
"""Most samples of all fragments together."""

MAX_BOXES = 1 << 16
"""Those of the file that are looked at one by one."""

_HEADER = 8
_TABLE = struct.Struct(">I4x4xII")
"""Head of both tables: length, name, version and flags, two numbers."""
_COMPRESSED = re.compile(rb"cmov.{4}dcomzlib", re.DOTALL)


def check_boxes(data: bytes) -> None:
    """Check the sizes that the tables of an MP4 file promise.

    Raises MediaUndecodableError for far more samples than the file has bytes, and
    MediaTooLargeError for tables that would take too much memory.
    """
    if _COMPRESSED.search(data):
        raise MediaUndecodableError(
            "The file has a compressed header, which no current program writes; convert it, "
            "for example with FFmpeg."
        )
    num_samples, num_run_samples, num_bytes = 0, 0, 0
    for start, end in _outside_of_media(data):
        num_run_samples += sum(count for count, _ in _tables(data, b"trun", start, end))
        for size, count in _tables(data, b"stsz", start, end):
            if size:
                num_samples += count
                num_bytes += size * count
    if num_bytes > MOST_PER_BYTE * len(data):
        raise MediaUndecodableError(
            "The file is damaged or truncated: its tables have far more samples than there are "
            "bytes."
        )
    if num_samples > MAX_SAMPLES or num_run_samples > MAX_RUN_SAMPLES:
        raise MediaTooLargeError(
            f"The file has {num_samples + num_run_samples} samples; at most {MAX_SAMPLES} of one "
            f"size and {MAX_RUN_SAMPLES} in fragments are read. Cut it."
        )


def _tables(data: bytes, name: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The first two numbers of each table of this name."""
    at = data.find(name, start + 4, end)
    while at >= 0:
        if at - 4 + _TABLE.size <= len(data):
            length, first, second = _TABLE.unpack_from(data, at - 4)
            if 2 * _HEADER <= length <= len(data):  # else numbers that look like the name
                yield first, second
        at = data.find(name, at + 1, end)


def _outside_of_media(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each box of the file that is no ``mdat``.

    The rest from where there are no boxes, or many.
    """
    at = 0
    for number in itertools.count(1):
        if at + _HEADER > len(data):
            return
        (length,) = struct.unpack_from(">I", data, at)
        if length == 1 and at + 2 * _HEADER <= len(data):
            (length,) = struct.unpack_from(">Q", data, at + _HEADER)
        if length < _HEADER or number == MAX_BOXES:
            length = len(data) - at
        end = min(at + length, len(data))
        if data[at + 4 : at + _HEADER] != b"mdat" or number == MAX_BOXES:
            yield at, end
        at = end
