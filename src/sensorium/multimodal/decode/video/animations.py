"""Animated WebP and PNG files as videos, through Pillow.

FFmpeg does not read the one, and both lie frame over frame.

How many frames there are and how long each is shown is read from the chunks of the file before
anything is decoded. A frame needs all those before it, so everything up to the last wanted one is
decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sensorium.errors import MediaTooLargeError, MediaUndecodableError, RequestError
from sensorium.multimodal.decode import image
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.items import Video
from sensorium.multimodal.processor import VideoFacts

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 1 << 20
_APNG_TICKS = 100
"""Per second, where an APNG file says 0."""
_FRAME_CONTROL = struct.Struct(">4x4I2H")
"""Fields of an APNG frame: width, height, x, y; delay as a fraction of a second."""


@dataclass(frozen=True, slots=True)
class Animation:
    """Facts in the chunks of a file.

    ``seconds`` that each frame is shown, the size, and how many pictures stand before the first
    frame (an APNG may begin with one for programs that show no animations).
    """

    seconds: tuple[float, ...]
    width: int
    height: int
    num_before: int = 0

    @property
    def fps(self) -> float | None:
        """Frames per second on average."""
        total = sum(self.seconds)
        return len(self.seconds) / total if total > 0 else None


def read(data: bytes) -> Animation | None:
    """Return the facts of an animated WebP or PNG file; None for others, still images included."""
    try:
        if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and data[20] & 2:
            return _read_webp(data)
        if data[:8] == _PNG:
            return _read_apng(data)
    except (struct.error, IndexError):
        raise _damaged() from None
    return None


def decode(
    data: bytes,
    animation: Animation,
    sample: Callable[[VideoFacts], np.ndarray],
    check: Callable[[int, int, int, int], None],
) -> Video:
    """Decode the sampled frames over white.

    ``check(num_decoded, num_sampled, height, width)`` raises MediaTooLargeError. Raises
    MediaUndecodableError as well.
    """
    facts = VideoFacts(len(animation.seconds), animation.fps)
    indices = [int(i) for i in sample(facts)]
    check(max(indices) + 1, len(indices), animation.height, animation.width)
    try:
        frames = _frames(data, animation, indices)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything for damaged files
        check_shortage(error)
        raise _damaged() from None
    return Video(frames, tuple(indices), facts.num_frames, facts.fps)


def _frames(data: bytes, animation: Animation, indices: list[int]) -> np.ndarray:
    rows = np.empty((len(indices), animation.height, animation.width, 3), np.uint8)
    with Image.open(io.BytesIO(data), formats=("WEBP", "PNG")) as file:
        if file.size != (animation.width, animation.height):
            raise _damaged()
        before = -1
        for row, index in enumerate(indices):
            if index == before:
                rows[row] = rows[row - 1]
                continue
            # Each in turn: what a frame lies over is known from the one before it.
            for number in range(before + 1, index + 1):
                file.seek(number + animation.num_before)
                file.load()
            rows[row] = image.to_rgb(file, image.ImageOptions())
            before = index
    return rows


def _read_webp(data: bytes) -> Animation:
    """RFC 9649, 2.7: ``VP8X`` has the size, each ``ANMF`` a frame with its milliseconds."""
    number = int.from_bytes
    seconds = tuple(
        number(data[start + 12 : start + 15], "little") / 1000
        for name, start in _chunks(data, 12, "<4sI", padded=True)
        if name == b"ANMF"
    )
    size = number(data[24:27], "little") + 1, number(data[27:30], "little") + 1
    return _animation(seconds, *size)


def _read_apng(data: bytes) -> Animation | None:
    """PNG, third edition, 11.3.6: each ``fcTL`` begins a frame.

    The first may come after the still image.
    """
    seconds: list[float] = []
    num_before, is_animated = 0, False
    for name, start in _chunks(data, 8, ">I4s", padded=False):
        if name == b"acTL":
            is_animated = True
        elif name == b"IDAT" and not is_animated:
            return None
        elif name == b"IDAT" and not seconds:
            num_before = 1
        elif name == b"fcTL":
            *_, number, ticks = _FRAME_CONTROL.unpack_from(data, start)
            seconds.append(number / (ticks or _APNG_TICKS))
    if not is_animated:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return _animation(tuple(seconds), width, height, num_before)


def _animation(
    seconds: tuple[float, ...], width: int, height: int, num_before: int = 0
) -> Animation:
    if not seconds or not width or not height:
        raise _damaged()
    return Animation(seconds, width, height, num_before)


def _chunks(data: bytes, at: int, form: str, *, padded: bool) -> Iterator[tuple[bytes, int]]:
    """Yield name and start of the content of each chunk, up to where the file is damaged."""
    header = struct.Struct(form)
    is_riff = form.startswith("<")
    for _ in range(_MAX_CHUNKS):
        if at + header.size > len(data):
            return
        first, second = header.unpack_from(data, at)
        name, length = (first, second) if is_riff else (second, first)
        yield name, at + header.size
        at += header.size + length + (length % 2 if padded else 4)
    raise MediaTooLargeError(f"The animation has more than {_MAX_CHUNKS} chunks; cut it.")


def _damaged() -> MediaUndecodableError:
    return MediaUndecodableError("The animation is damaged or truncated and cannot be decoded.")
