"""Short videos of every accepted container, made when they are needed."""

from __future__ import annotations

import io
import struct
from typing import Any

import av
import numpy as np

from sensorium.multimodal.decode.video.video_frames import pack
from tests.fuzz.images import drawing, saved
from tests.multimodal.clips import frame_of, make_clip, make_sound

NUM_FRAMES = 9
SIZE = (24, 40)
_MATRIX_AT = 40
"""Bytes from the header of a track to its matrix (ISO 14496-12, 8.3.2)."""


def videos() -> dict[str, bytes]:
    """Encoded videos by name: ``mp4``, ``webm`` …"""
    plain = ("mp4", "mov", "mkv", "webm", "vp8", "avi", "avi of h264", "mjpeg", "gif")
    made = {form: make_clip(form, NUM_FRAMES, size=SIZE) for form in plain}
    stamps = [0, 1, 2, 7, 8, 20, 21, 22, 60]
    fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    return {
        **made,
        **{form: make_clip(form, 3, size=(64, 96)) for form in ("hevc", "av1")},
        "mp4 rotated": rotated(made["mp4"]),
        "mp4 variable rate": make_clip("mp4", NUM_FRAMES, size=SIZE, stamps=stamps),
        "mkv variable rate": make_clip("mkv", NUM_FRAMES, size=SIZE, stamps=stamps),
        "mp4 in fragments": make_clip("mp4", NUM_FRAMES, size=SIZE, options={}, **_with(fragments)),
        "mp4 one frame": make_clip("mp4", 1, size=SIZE),
        "mp4 with sound": with_sound(),
        "mp4 sound only": make_sound(),
        "mkv of no duration": without_duration(),
        "gif of pictures": saved(
            drawing(), "GIF", save_all=True, append_images=[drawing(seed=s) for s in (1, 2)]
        ),
        "jpegs": pack([saved(drawing(seed=s), "JPEG") for s in range(4)]),
    }


def _with(options: dict[str, str]) -> dict[str, Any]:
    return {"container_options": options}


def rotated(data: bytes) -> bytes:
    """The MP4 file with a quarter turn in its header."""
    at = data.index(b"tkhd") + 4 + _MATRIX_AT
    one = 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + len(matrix) :]


def without_duration() -> bytes:
    """A Matroska file as a camera streams it: sizes and duration unknown."""
    return make_clip("mkv", NUM_FRAMES, size=SIZE, **_with({"live": "1"}))


def with_sound() -> bytes:
    """An MP4 file with a track of pictures and one of sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        video: Any = out.add_stream("libx264", rate=10, options={"g": "4"})
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        video.codec_context.thread_count = 1
        audio: Any = out.add_stream("aac", rate=16000)
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(frame_of(number, *SIZE), format="rgb24")
            frame.pts = number
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        samples.sample_rate = 16000
        out.mux(audio.encode(samples))
        out.mux(audio.encode(None))
    return file.getvalue()
