"""Where in a file the numbers and the pieces are that its decoder believes, for each kind of file.

A walker reads a file as far as it makes sense and notes what it passes; it never fails, because the
file may be damaged already.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Number:
    """An unsigned integer of ``size`` bytes at ``at``."""

    at: int
    size: int
    little: bool = False

    def read(self, data: bytes) -> int:
        """Its value."""
        part = data[self.at : self.at + self.size]
        return int.from_bytes(part, "little" if self.little else "big")

    def write(self, data: bytes, value: int) -> bytes:
        """The file with another value there, cut to its size."""
        part = (value % (1 << 8 * self.size)).to_bytes(
            self.size, "little" if self.little else "big"
        )
        return data[: self.at] + part + data[self.at + self.size :]


@dataclass(slots=True)
class Structure:
    """Numbers, pieces (start and end) and a last touch that makes checksums right again."""

    numbers: list[Number] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    seal: Callable[[bytes], bytes] | None = None

    def add(
        self, start: int, end: int, sizes: int, *, little: bool = False, most: int = 64
    ) -> None:
        """Note the numbers of ``sizes`` bytes each that lie between two places, at most so many."""
        for at in range(start, min(end, start + most * sizes) - sizes + 1, sizes):
            self.numbers.append(Number(at, sizes, little))


def structure_of(data: bytes) -> Structure:
    """What is known of a file, by its first bytes; nothing for a kind that has no walker."""
    found = Structure()
    for begins, walk in _WALKERS:
        if begins(data):
            walk(data, found)
            break
    return found


# --- PNG ------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"


def _png_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield at, end
        at = end


def _walk_png(data: bytes, found: Structure) -> None:
    for start, end in _png_chunks(data):
        found.pieces.append((start, end))
        found.add(start, start + 4, 4)
        name = data[start + 4 : start + 8]
        if name == b"IHDR":
            found.add(start + 8, start + 16, 4)
            found.add(start + 16, start + 21, 1)
        elif name != b"IDAT":
            found.add(start + 8, end - 4, 4, most=8)
    found.seal = _seal_png


def _seal_png(data: bytes) -> bytes:
    whole = bytearray(data)
    for start, end in _png_chunks(data):
        whole[end - 4 : end] = struct.pack(">I", zlib.crc32(data[start + 4 : end - 4]))
    return bytes(whole)


# --- JPEG, GIF, BMP, TIFF -------------------------------------------------------------------------


def _walk_jpeg(data: bytes, found: Structure) -> None:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        found.pieces.append((at, end))
        found.add(at + 2, at + 4, 2)
        found.add(at + 1, at + 2, 1)
        if 0xC0 <= marker <= 0xCF and marker != 0xC4:  # a frame: precision, height, width, parts
            found.add(at + 4, at + 5, 1)
            found.add(at + 5, at + 9, 2)
            found.add(at + 9, end, 1)
        elif marker == 0xE1:  # EXIF: a TIFF file within
            _walk_tiff(data, found, at + 10)
        elif marker in (0xC4, 0xDB, 0xDD, 0xDA, 0xEE):
            found.add(at + 4, end, 1, most=24)
        if marker == 0xDA:
            following = data.find(b"\xff\xc4", end)
            following = following if following >= 0 else data.find(b"\xff\xda", end)
            if following < 0:
                return
            end = following
        at = end


def _walk_gif(data: bytes, found: Structure) -> None:
    found.add(6, 10, 2, little=True)
    found.add(10, 13, 1)
    at = 13 + _gif_colours(data, 10)
    while at < len(data):
        start, kind = at, data[at]
        if kind == 0x21:
            at += 2
        elif kind == 0x2C:
            found.add(at + 1, at + 9, 2, little=True)
            found.add(at + 9, at + 10, 1)
            at += 10 + _gif_colours(data, at + 9)
            found.add(at, at + 1, 1)  # the size of codes
            at += 1
        else:
            return
        while at < len(data) and data[at]:
            found.add(at, at + 1, 1)
            if kind == 0x21:
                found.add(at + 1, at + 1 + data[at], 1, most=8)
            at += 1 + data[at]
        at += 1
        found.pieces.append((start, at))


def _gif_colours(data: bytes, at: int) -> int:
    flags = data[at] if at < len(data) else 0
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0


def _walk_bmp(data: bytes, found: Structure) -> None:
    found.add(2, 54, 4, little=True)
    found.add(26, 30, 2, little=True)
    found.pieces += [(14, 54), (54, len(data))]


def _walk_tiff(data: bytes, found: Structure, base: int = 0) -> None:
    little = data[base : base + 2] == b"II"
    seen: set[int] = set()
    pointer = Number(base + 4, 4, little)
    while pointer.read(data) not in seen:
        found.numbers.append(pointer)
        seen.add(pointer.read(data))
        if not pointer.read(data):
            return
        start = base + pointer.read(data)
        count = Number(start, 2, little)
        found.numbers.append(count)
        entries = min(count.read(data), 64)
        if start + 2 + 12 * entries > len(data):
            return
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            found.add(at, at + 4, 2, little=little)
            found.add(at + 4, at + 12, 4, little=little)
            found.pieces.append((at, at + 12))
        pointer = Number(start + 2 + 12 * entries, 4, little)


# --- RIFF and IFF (WAV, WebP, AVI, AIFF) ----------------------------------------------------------

_LISTS = (b"RIFF", b"LIST", b"FORM", b"RF64", b"RIFX", b"ANMF")


def _walk_riff(data: bytes, found: Structure) -> None:
    little = data[:4] != b"FORM"
    _riff_chunks(data, 0, len(data), little, found, 0)


def _riff_chunks(
    data: bytes, at: int, end: int, little: bool, found: Structure, depth: int
) -> None:
    while at + 8 <= end and len(found.pieces) < 400:
        name, size = data[at : at + 4], Number(at + 4, 4, little)
        stop = min(at + 8 + size.read(data), end)
        found.numbers.append(size)
        found.pieces.append((at, stop))
        body = at + 8
        if name in _LISTS and depth < 6:
            inner = body + (16 if name == b"ANMF" else 4)
            _riff_chunks(data, inner, stop, little, found, depth + 1)
        elif name not in (b"data", b"SSND", b"idx1", b"00dc", b"00db", b"01wb"):
            found.add(body, stop, 4, little=little, most=20)
            found.add(body, stop, 2, little=little, most=20)
        at = stop + (stop - at) % 2


# --- boxes (MP4, MOV, AVIF) -----------------------------------------------------------------------

_BOXES_OF_BOXES = frozenset(
    b"moov trak mdia minf stbl edts moof traf mvex dinf udta iprp ipco meta stsd avc1".split()
)
_SKIPPED = {b"meta": 4, b"stsd": 8, b"avc1": 78}


def _walk_boxes(data: bytes, found: Structure) -> None:
    _boxes(data, 0, len(data), found, 0)


def _boxes(data: bytes, at: int, end: int, found: Structure, depth: int) -> None:
    while at + 8 <= end and len(found.pieces) < 400:
        size, name = Number(at, 4), data[at + 4 : at + 8]
        found.numbers.append(size)
        stop = min(at + max(size.read(data), 8), end)
        found.pieces.append((at, stop))
        if name in _BOXES_OF_BOXES and depth < 10:
            _boxes(data, at + 8 + _SKIPPED.get(name, 0), stop, found, depth + 1)
        elif name != b"mdat":
            found.add(at + 8, stop, 4)
            found.add(at + 8, stop, 1, most=12)
        at = stop


# --- EBML (WebM, MKV) -----------------------------------------------------------------------------

_MASTERS = {
    int(text, 16)
    for text in "1A45DFA3 18538067 1654AE6B AE E0 E1 1F43B675 A0 1C53BB6B BB B7 114D9B74 4DBB "
    "1549A966".split()
}


def _walk_ebml(data: bytes, found: Structure) -> None:
    _elements(data, 0, len(data), found, 0)


def _elements(data: bytes, at: int, end: int, found: Structure, depth: int) -> None:
    while at < end and len(found.pieces) < 400:
        start = at
        name, at = _variable(data, at, marked=True)
        size_at = at
        size, at = _variable(data, at, marked=False)
        if at <= size_at or at > end:
            return
        found.numbers.append(Number(size_at, at - size_at))
        unknown = size == (1 << 7 * (at - size_at)) - 1
        stop = end if unknown else min(at + size, end)
        found.pieces.append((start, stop))
        if name in _MASTERS and depth < 8:
            _elements(data, at, stop, found, depth + 1)
        elif stop - at <= 8:
            found.numbers.append(Number(at, stop - at))
        else:
            found.add(at, stop, 1, most=6)
        at = stop


def _variable(data: bytes, at: int, *, marked: bool) -> tuple[int, int]:
    """A number whose first byte's leading zeros tell its length, and where it ends."""
    if at >= len(data) or not data[at]:
        return 0, at
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return (value if marked else value & ((1 << 7 * length) - 1)), at + length


# --- Ogg, FLAC, safetensors -----------------------------------------------------------------------


def _walk_ogg(data: bytes, found: Structure) -> None:
    for start, end in _ogg_pages(data):
        found.pieces.append((start, end))
        found.add(start + 4, start + 6, 1)
        found.add(start + 6, start + 14, 8, little=True)
        found.add(start + 14, start + 22, 4, little=True)
        found.add(start + 26, start + 27 + data[start + 26], 1, most=6)
        found.add(start + 28, end, 4, little=True, most=12)
    found.seal = _seal_ogg


def _ogg_pages(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        table = data[at + 27 : at + 27 + data[at + 26]]
        end = at + 27 + len(table) + sum(table)
        if end > len(data):
            return
        yield at, end
        at = end


def _ogg_remainders() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if value >> 31 else 0)
        table.append(value)
    return table


_REMAINDERS = _ogg_remainders()


def _seal_ogg(data: bytes) -> bytes:
    whole = bytearray(data)
    for start, end in _ogg_pages(data):
        whole[start + 22 : start + 26] = bytes(4)
        check = 0
        for byte in whole[start:end]:
            check = (check << 8 & 0xFFFFFFFF) ^ _REMAINDERS[check >> 24 ^ byte]
        whole[start + 22 : start + 26] = struct.pack("<I", check)
    return bytes(whole)


def _walk_flac(data: bytes, found: Structure) -> None:
    at = 4
    while at + 4 <= len(data):
        end = at + 4 + int.from_bytes(data[at + 1 : at + 4], "big")
        found.pieces.append((at, end))
        found.add(at, at + 4, 1)
        found.add(at + 4, end, 2, most=17)
        if data[at] & 0x80:
            break
        at = end


def _walk_safetensors(data: bytes, found: Structure) -> None:
    found.add(0, 8, 8, little=True)
    end = 8 + int.from_bytes(data[:8], "little")
    found.pieces += [(0, 8), (8, end), (end, len(data))]


def _walk_words(data: bytes, found: Structure) -> None:
    """Files with a header of plain numbers: the first hundred bytes are all of interest."""
    end = min(len(data), 104)
    found.add(4, end, 4)
    found.add(4, end, 4, little=True)


# --- GGUF -----------------------------------------------------------------------------------------


def _walk_gguf(data: bytes, found: Structure) -> None:
    """Versions, counts, lengths, types and offsets; values and tensors are the pieces."""
    found.add(4, 8, 4, little=True)
    found.add(8, 24, 8, little=True)
    num_tensors, num_values = (int.from_bytes(data[at : at + 8], "little") for at in (8, 16))
    at = 24
    for _ in range(min(num_values, 256)):
        start = at
        at = _gguf_string(data, at, found)
        kind = int.from_bytes(data[at : at + 4], "little")
        found.add(at, at + 4, 4, little=True)
        at += 4
        if kind == 8:
            at = _gguf_string(data, at, found)
        elif kind == 9:
            element, count = data[at], int.from_bytes(data[at + 4 : at + 12], "little")
            found.add(at, at + 4, 4, little=True)
            found.add(at + 4, at + 12, 8, little=True)
            at += 12
            for index in range(count if element == 8 and count < 1 << 16 else 0):
                at = _gguf_string(data, at, found if index < 2 else Structure())
            at += 0 if element == 8 else count * _GGUF_SIZES.get(element, 0)
        else:
            size = _GGUF_SIZES.get(kind, 0)
            found.add(at, at + size, max(size, 1), little=True)
            at += size
        found.pieces.append((start, min(at, len(data))))
        if at + 8 > len(data):
            return
    for _ in range(min(num_tensors, 256)):
        start = at
        at = _gguf_string(data, at, found)
        dims = int.from_bytes(data[at : at + 4], "little")
        found.add(at, at + 4, 4, little=True)
        at += 4
        found.add(at, at + 8 * dims, 8, little=True, most=4)
        at += 8 * dims
        found.add(at, at + 4, 4, little=True)
        found.add(at + 4, at + 12, 8, little=True)
        at += 12
        if at + 8 > len(data):
            return
        found.pieces.append((start, at))


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_string(data: bytes, at: int, found: Structure) -> int:
    """Note the length of a string; return its end."""
    if at + 8 > len(data):
        return len(data)
    found.add(at, at + 8, 8, little=True)
    return min(len(data), at + 8 + int.from_bytes(data[at : at + 8], "little"))


_WALKERS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes, Structure], None]], ...] = (
    (lambda d: d.startswith(_PNG), _walk_png),
    (lambda d: d.startswith(b"\xff\xd8"), _walk_jpeg),
    (lambda d: d.startswith((b"GIF87a", b"GIF89a")), _walk_gif),
    (lambda d: d.startswith(b"BM"), _walk_bmp),
    (lambda d: d.startswith((b"II*\0", b"MM\0*")), _walk_tiff),
    (lambda d: d.startswith((b"RIFF", b"FORM", b"RF64")), _walk_riff),
    (lambda d: d[4:8] in (b"ftyp", b"moov", b"mdat"), _walk_boxes),
    (lambda d: d.startswith(b"\x1aE\xdf\xa3"), _walk_ebml),
    (lambda d: d.startswith(b"OggS"), _walk_ogg),
    (lambda d: d.startswith(b"fLaC"), _walk_flac),
    (lambda d: d.startswith(b"GGUF") and len(d) > 32, _walk_gguf),
    (lambda d: d[8:9] == b"{", _walk_safetensors),
    (lambda d: True, _walk_words),
)
