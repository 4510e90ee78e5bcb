"""Frames sampled of a long clip, beside decoding the clip whole.

    python video.py
    python video.py --seconds 60 --size 640x360 --num-frames 16 --runs 3

Encodes a clip of its own into a temporary folder (H.264 with the encoder's usual distance between
key frames), then in turn takes frames of it as a request does (``multimodal.decode.video.loading``)
and decodes all of it with the same library and as many threads. Written as JSON: every time, the
medians and their ratio. The exit status is 1 when the ratio is above ``--largest-ratio``, or when a
sampled frame differs from the one of that number in the whole clip.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from sensorium.bench.machine import describe_machine
from sensorium.config import MediaConfig
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.decode.video import video_file
from sensorium.multimodal.items import Clip

RESULTS = Path(__file__).parent / "results"
KEY_DISTANCE = 250
"""Most frames from one key frame to the next: libx264's own default."""


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


def take_frames(data: bytes, num_frames: int) -> tuple[float, Clip]:
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
        stream.codec_context.thread_count = num_threads()
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
    return time.perf_counter() - started, found


def num_threads() -> int:
    """As many as a request's decoder has."""
    return min(video_file.MAX_THREADS, len(os.sched_getaffinity(0)))


def measure(data: bytes, num_frames: int, num_runs: int) -> dict[str, Any]:
    """Times of both, in turn."""
    sampled, whole, equal, indices = [], [], True, ()
    for _ in range(num_runs):
        seconds, clip = take_frames(data, num_frames)
        sampled.append(seconds)
        indices = clip.indices
        seconds, frames = decode_whole(data, frozenset(indices))
        whole.append(seconds)
        pairs = zip(indices, clip.frames, strict=True)
        equal = equal and all(np.array_equal(frames[number], frame) for number, frame in pairs)
    ratio = statistics.median(sampled) / statistics.median(whole)
    return {
        "indices": list(indices),
        "frames_are_equal": equal,
        "sampled_seconds": sampled,
        "whole_seconds": whole,
        "median_sampled_seconds": statistics.median(sampled),
        "median_whole_seconds": statistics.median(whole),
        "ratio": ratio,
    }


def read_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) % 2 == int(height) % 2 == 0):
        raise argparse.ArgumentTypeError(f"must look like 1920x1080, both even, got {text!r}")
    return int(width), int(height)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="length of the clip")
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--size", type=read_size, default=(1920, 1080))
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--largest-ratio", type=float, default=0.15)
    parser.add_argument("--output", type=Path, help="default: results/video-DATE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    width, height = options.size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        make_clip(path, options.seconds, options.fps, width, height)
        data = path.read_bytes()
    found = measure(data, options.num_frames, options.runs)
    date = datetime.datetime.now(datetime.UTC)
    result = {
        "benchmark": "video",
        "date": date.isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "clip": {
            "seconds": options.seconds,
            "fps": options.fps,
            "width": width,
            "height": height,
            "codec": "h264",
            "key_distance": KEY_DISTANCE,
            "bytes": len(data),
        },
        "num_frames": options.num_frames,
        "num_threads": num_threads(),
        "av": av.__version__,
        **found,
        "largest_ratio": options.largest_ratio,
    }
    output = options.output or RESULTS / f"video-{date:%Y-%m-%d}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{options.num_frames} frames {found['median_sampled_seconds']:.2f} s, the whole clip "
        f"{found['median_whole_seconds']:.2f} s: {found['ratio']:.3f} (at most {options.largest_ratio})"
    )
    return 0 if found["frames_are_equal"] and found["ratio"] <= options.largest_ratio else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
