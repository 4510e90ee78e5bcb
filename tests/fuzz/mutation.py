"""Damage: small changes to a file that leave most of it in order, so that a decoder gets far
before it stumbles.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence

from tests.fuzz.images import png_chunk
from tests.fuzz.structures import structure_of

INTERESTING = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 1023, 4096, 32767, 32768, 65535, 65536),
    *((1 << 24) - 1, (1 << 28) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32),
    *((1 << 53), (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
MOST_BYTES = 1 << 18
"""A damaged file is cut there."""

Mutator = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def mutate(
    data: bytes, rng: random.Random, others: Sequence[bytes] = (), num: int | None = None
) -> bytes:
    """``data`` after ``num`` changes (one to four when not given).

    ``others``: files to take pieces from.
    """
    for _ in range(num or rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(_CHOICE)(data, rng, others)[:MOST_BYTES]
    seal = structure_of(data).seal
    return seal(data) if seal is not None and rng.random() < 0.8 else data


# --- bytes ----------------------------------------------------------------------------------------


def _span(data: bytes, rng: random.Random, most: int = 64) -> tuple[int, int]:
    """A stretch of the file, mostly a short one, more often near its beginning, where the
    headers are.
    """
    start = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        start = min(start, rng.randrange(200))
    length = rng.randrange(1, most + 1) if rng.random() < 0.8 else rng.randrange(1, len(data) + 2)
    return start, min(start + length, len(data))


def flip_bits(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One to eight bits turned."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8)) if whole else 0):
        start, _ = _span(data, rng)
        whole[min(start, len(whole) - 1)] ^= 1 << rng.randrange(8)
    return bytes(whole)


def truncate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The end is missing, or all but a few bytes of it are there."""
    if rng.random() < 0.3:
        return data[: -rng.randrange(1, 16)]
    return data[: rng.randrange(len(data) + 1)]


def remove(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A stretch is missing."""
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def insert(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Bytes of noise, or many equal ones, in between."""
    start, end = _span(data, rng)
    length = max(end - start, 1)
    some = rng.randbytes(length) if rng.random() < 0.6 else rng.choice((b"\0", b"\xff")) * length
    return data[:start] + some + data[start:]


def overwrite(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A stretch of noise, or of equal bytes."""
    start, end = _span(data, rng)
    length = end - start
    some = rng.randbytes(length) if rng.random() < 0.6 else rng.choice((b"\0", b"\xff")) * length
    return data[:start] + some + data[end:]


def repeat(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A stretch comes several times."""
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 2, 16, 300)) + data[end:]


def splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The beginning of one file and the end of another, or a stretch of another in between."""
    other = rng.choice(others) if others else data
    start, end = _span(other, rng, 512)
    if rng.random() < 0.4:
        return data[: _span(data, rng)[0]] + other[start:]
    at, after = _span(data, rng)
    return data[:at] + other[start:end] + data[after:]


def put_integer(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """An interesting integer anywhere, in one of the usual sizes and orders."""
    size = rng.choice((1, 2, 4, 4, 8))
    value = rng.choice(INTERESTING) % (1 << 8 * size)
    at = _span(data, rng)[0]
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


# --- structure ------------------------------------------------------------------------------------


def change_number(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A length, size, offset or count of a header becomes another."""
    numbers = structure_of(data).numbers
    if not numbers:
        return put_integer(data, rng, others)
    number = rng.choice(numbers)
    value = number.read(data)
    near = (value + rng.choice((-2, -1, 1, 2)), value * 2, value // 2, -value, value << 8)
    same = rng.choice(numbers).read(data)
    return number.write(data, rng.choice((rng.choice(INTERESTING), rng.choice(near), same)))


def move_piece(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A chunk, box or block is missing, comes twice, comes elsewhere, or comes from another file."""
    pieces = structure_of(data).pieces
    if not pieces:
        return splice(data, rng, others)
    start, end = rng.choice(pieces)
    piece = data[start:end]
    way = rng.randrange(5)
    if way == 0:
        return data[:start] + data[end:]
    if way == 1:
        return data[:end] + piece * rng.choice((1, 1, 3, 100)) + data[end:]
    if way == 2:
        at = rng.choice(pieces)[0]
        return data[:at] + piece + data[at:]
    if way == 3:
        without = data[:start] + data[end:]
        at = min(rng.choice(pieces)[0], len(without))
        return without[:at] + piece + without[at:]
    other = rng.choice(others) if others else data
    theirs = structure_of(other).pieces or [(0, len(other))]
    first, last = rng.choice(theirs)
    return data[:start] + other[first:last] + data[rng.choice((start, end)) :]


def repack(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Damage below the compression: a PNG's scan lines; a text header's numbers.

    Others: a number of the header.
    """
    at = data.find(b"IDAT")
    if data.startswith(b"\x89PNG") and at > 4:
        end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
        inside = _inflated(data[at + 4 : end])
        inside = rng.choice(_PLAIN)(inside, rng, others)[:MOST_BYTES]
        return data[: at - 4] + png_chunk(b"IDAT", zlib.compress(inside, 1)) + data[end + 4 :]
    if re.match(rb"P[1-7]\s", data):
        found = list(re.finditer(rb"\d+", data[2:40]))
        if found:
            start, end = rng.choice(found).span()
            number = str(rng.choice((*INTERESTING, -1, 10**40))).encode()
            return data[: 2 + start] + number + data[2 + end :]
    return change_number(data, rng, others)


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MOST_BYTES)
    except zlib.error:
        return data


_PLAIN: tuple[Mutator, ...] = (
    *(flip_bits, truncate, remove, insert, overwrite, repeat, splice, put_integer),
)
_AWARE: tuple[Mutator, ...] = (change_number, change_number, move_piece, repack)
_CHOICE = _PLAIN + _AWARE * 3
