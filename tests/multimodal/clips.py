"""Small encoded videos whose frames tell their numbers."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "-1")  # this encoder prints whatever its caller wants

BITS = 10
HEIGHT, WIDTH = 48, 80
CORNER = 8
"""Edge of a red square in the upper left corner, which tells which side is up."""


def frame_of(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3): the number in white and black blocks of 16 x 16, over grey that moves
    with it.
    """
    rows, columns = np.indices((height, width))
    grey = 96 + (rows + 3 * columns + 5 * number) % 64
    frame = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    for bit in range(BITS):
        row, column = CORNER + bit // 5 * 16, bit % 5 * 16
        frame[row : row + 16, column : column + 16] = 255 if number >> bit & 1 else 0
    frame[:CORNER, :CORNER] = (255, 0, 0)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number of a decoded frame."""
    assert frame[2, 2, 0] > 150 > frame[2, 2, 2] + 50, "the red square is not where it should be"
    number = 0
    for bit in range(BITS):
        row, column = CORNER + bit // 5 * 16, bit % 5 * 16
        number |= int(frame[row + 4 : row + 12, column + 4 : column + 12].mean() > 128) << bit
    return number


def numbers_of(frames: Sequence[np.ndarray]) -> list[int]:
    return [number_of(frame) for frame in frames]


FORMATS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", {"g": "12", "bf": "2"}),
    "mov": ("mov", "libx264", {"g": "12", "x264-params": "open-gop=1"}),
    "mkv": ("matroska", "libx264", {"g": "12"}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=error:keyint=12:open-gop=1"}),
    "av1": ("mp4", "libsvtav1", {"g": "12", "preset": "10", "crf": "30"}),
    "webm": ("webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "vp8": ("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "avi": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "avi of h264": ("avi", "libx264", {"g": "12", "bf": "2"}),
    "mjpeg": ("avi", "mjpeg", {}),
    "gif": ("gif", "gif", {}),
    "ts": ("mpegts", "libx264", {"g": "12", "bf": "2"}),
    "ts of hevc": ("mpegts", "libx265", {"x265-params": "log-level=error:keyint=12"}),
    "flv": ("flv", "libx264", {"g": "12"}),
    "sorenson": ("flv", "flv", {"g": "12"}),
    "wmv": ("asf", "wmv2", {"g": "12"}),
    "ogv": ("ogg", "libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
}
PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}


def make_clip(
    form: str = "mp4",
    num_frames: int = 40,
    *,
    fps: int = 10,
    stamps: Sequence[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    options: Mapping[str, str] | None = None,
    **container: Any,
) -> bytes:
    """An encoded video of ``frame_of(0)``, ``frame_of(1)`` … ``stamps``.

    Times of the frames, in 1/``fps`` seconds.
    """
    name, codec, own = FORMATS[form]
    file = io.BytesIO()
    with av.open(file, "w", format=name, **container) as out:
        stream: Any = out.add_stream(codec, rate=fps, options={**own, **(options or {})})
        stream.height, stream.width = size
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        if codec != "libsvtav1":
            stream.bit_rate = 400_000
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frame_of(number, *size), format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    if codec == "libsvtav1":
        # Run by root, this encoder gives its caller real-time priority; servers that a test starts
        # afterwards would inherit it, and starve their clients.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return file.getvalue()


def make_sound() -> bytes:
    """An MP4 file with a sound and no video."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream: Any = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()
