"""The kind of a file by its first bytes: an image, a video, audio, or a PDF."""

from __future__ import annotations

from typing import Literal

from sensorium.multimodal.decode.document import is_pdf
from sensorium.multimodal.items import Modality

FileKind = Modality | Literal["pdf"]

KNOWN = "a PDF, an image, a video or audio"

_STARTS: tuple[tuple[bytes, FileKind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF87a", "image"),
    (b"GIF89a", "image"),
    (b"BM", "image"),
    (b"II*\0", "image"),
    (b"MM\0*", "image"),
    (b"fLaC", "audio"),
    (b"ID3", "audio"),
    (b"FORM", "audio"),
    (b"\x1aE\xdf\xa3", "video"),
    (b"OggS", "audio"),
)
_RIFF: dict[bytes, FileKind] = {b"WEBP": "image", b"WAVE": "audio", b"AVI ": "video"}
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc")
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"F4A ")
_AUDIO_NAMES = (".m4a", ".weba", ".oga", ".opus", ".aac", ".mka")
_VIDEO_NAMES = (".ogv",)
_MPEG_SYNC = 0xFFE0
_PORTABLE = b"P1 P2 P3 P4 P5 P6".split()


def kind_of(data: bytes, filename: str = "") -> FileKind | None:
    """Return the kind of a file; None if it is none of those.

    The name decides only where a container may hold a video as well as audio alone.
    """
    name = filename.lower()
    kind = _by_bytes(data)
    if kind == "video" and name.endswith(_AUDIO_NAMES):
        return "audio"
    if kind == "audio" and name.endswith(_VIDEO_NAMES):
        return "video"
    return kind


def _by_bytes(data: bytes) -> FileKind | None:
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12])
    if data[4:8] == b"ftyp":
        return _of_brand(data[8:12])
    for start, kind in _STARTS:
        if data.startswith(start):
            return kind
    if is_pdf(data):
        return "pdf"
    if data[:2] in _PORTABLE and data[2:3].isspace():
        return "image"
    if len(data) > 1 and int.from_bytes(data[:2], "big") & _MPEG_SYNC == _MPEG_SYNC:
        return "audio"  # a frame of MP3 or AAC without a header in front
    return None


def _of_brand(brand: bytes) -> FileKind:
    if brand in _STILL_BRANDS:
        return "image"
    return "audio" if brand in _AUDIO_BRANDS else "video"
