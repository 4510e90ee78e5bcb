"""Pictures, sounds and clips, good and bad, as encoded bytes."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import soundfile
from PIL import Image

RATE = 16000


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A picture of coarse noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def picture_url(seed: int = 0, width: int = 64, height: int = 48) -> str:
    return data_url(encoded(picture(width, height, seed)))


def png_chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG of these chunks between header and end, whatever they hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = (png_chunk(b"IHDR", header), *chunks, png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gif(width: int, height: int, num_frames: int = 1) -> bytes:
    """An animation of this size, of frames of one pixel."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + frame * num_frames + b";"


def endless_clip() -> str:
    """An animation of a megabyte, of as many frames as may be decoded, which would take a minute
    or so.
    """
    return data_url(gif(1400, 1400, 40_000), "image/gif")


def tone(seconds: float = 0.5, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def sound(
    samples: np.ndarray | None = None,
    rate: int = RATE,
    form: str = "WAV",
    subtype: str | None = None,
) -> bytes:
    """A sound file of samples (n,) or (n, channels)."""
    file = io.BytesIO()
    soundfile.write(file, tone() if samples is None else samples, rate, subtype, format=form)
    return file.getvalue()


def sound_url(*arguments: Any, kind: str = "audio/wav", **options: Any) -> str:
    return data_url(sound(*arguments, **options), kind)
