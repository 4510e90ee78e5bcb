"""Frames sampled of a long video, beside decoding the video whole.

Encodes a video of its own into a temporary folder (H.264 with the encoder's usual distance between
key frames), then in turn takes frames of it as a request does and decodes all of it with the same
library and as many threads.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.harness import Found, Row, Size, flag
from sensorium.config import MediaConfig
from sensorium.multimodal.decode.shortage import decoder_threads
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.items import Video

KEY_DISTANCE = 250
"""Most frames from one key frame to the next: libx264's own default."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which video, how many frames, and the target."""

    video_seconds: int = flag(600, "length of the video", quick=20)
    fps: int = flag(30)
    video_size: Size = flag(Size(1920, 1080), "both even", quick=Size(640, 360))
    num_frames: int = flag(16, quick=4)
    runs: int = flag(3, quick=1)
    largest_video_ratio: float = flag(0.15, quick=1.0)


def measure(settings: Settings, folder: Path) -> Found:
    """Encode the video, take frames and decode it whole in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "video.mp4"
        make_clip(path, settings.video_seconds, settings.fps, *settings.video_size)
        data = path.read_bytes()
    sampled: list[float] = []
    whole: list[float] = []
    equal, indices = True, tuple[int, ...]()
    for _ in range(settings.runs):
        seconds, clip = take_frames(data, settings.num_frames)
        sampled.append(seconds)
        indices = clip.indices
        seconds, frames = decode_whole(data, frozenset(indices))
        whole.append(seconds)
        pairs = zip(indices, clip.frames, strict=True)
        equal = equal and all(np.array_equal(frames[number], frame) for number, frame in pairs)
    ratio = statistics.median(sampled) / statistics.median(whole)
    rows = [
        Row(f"{settings.num_frames} frames", statistics.median(sampled), "s"),
        Row("the whole video", statistics.median(whole), "s"),
        Row("ratio", ratio, most=settings.largest_video_ratio),
        Row("frames are those of the whole video", float(equal), least=1),
    ]
    found: dict[str, Any] = {
        "codec": "h264",
        "key_distance": KEY_DISTANCE,
        "bytes": len(data),
        "num_threads": decoder_threads(),
        "av": av.__version__,
        "indices": list(indices),
        "frames_are_equal": equal,
        "sampled_seconds": sampled,
        "whole_seconds": whole,
        "ratio": ratio,
    }
    return Found(found, rows)


def make_clip(path: Path, seconds: int, fps: int, width: int, height: int) -> None:
    """A clip of shapes that move over a gradient, with a cut every ten seconds."""
    rows, columns = np.indices((height, width))
    with av.open(str(path), "w", format="mp4") as out:
        stream: Any = out.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "crf": "30", "bf": "3"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = KEY_DISTANCE
        planes = np.full((height * 3 // 2, width), 128, np.uint8)  # brightness above, colours below
        for number in range(seconds * fps):
            if number % (10 * fps) == 0:
                shade = number // (10 * fps) * 37
                scene = (rows // 4 + columns // 8 + shade).astype(np.uint8)
            planes[:height] = scene
            for shape in range(4):
                top = (number * (2 + shape) + 97 * shape) % max(1, height - height // 8)
                left = (number * (5 - shape) + 211 * shape) % max(1, width - width // 8)
                planes[top : top + height // 8, left : left + width // 8] = 235 - 60 * shape
            out.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        out.mux(stream.encode(None))


def take_frames(data: bytes, num_frames: int) -> tuple[float, Video]:
    """Seconds to take frames as a request does, and the clip."""
    started = time.perf_counter()
    clip = video.decode(data, video.VideoOptions(num_frames), MediaConfig(), None)
    return time.perf_counter() - started, clip


def decode_whole(data: bytes, wanted: frozenset[int]) -> tuple[float, dict[int, np.ndarray]]:
    """Seconds to decode every frame, of which only the wanted ones are converted; these."""
    started, found = time.perf_counter(), {}
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = decoder_threads()
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
    return time.perf_counter() - started, found
