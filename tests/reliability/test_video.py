"""Clips of every odd kind: an answer or a clear refusal, and nothing of them stays behind."""

from __future__ import annotations

import concurrent.futures
import io
import struct
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.multimodal.clips import FORMATS, make_clip, make_sound
from tests.reliability.asking import Answer, Offline, Service, place, text, video
from tests.reliability.media import data_url, encoded, picture

QUESTION = text("What happens?")


def is_answer_or_refusal(answer: Answer, part: dict[str, object]) -> None:
    answer.is_discreet()
    if answer.status != 200:
        code = answer.error["code"]
        assert code in ("media_undecodable", "media_too_large", "invalid_request"), answer.body
        assert answer.error["param"] == place(part)


def without_duration() -> bytes:
    """Matroska as it is streamed: no length, no index."""
    return make_clip("mkv", 12, container_options={"live": "1"})


def rotated() -> bytes:
    data = make_clip("mp4", 6)
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


def of_rate(fps: int) -> bytes:
    """An AVI whose header tells a rate."""
    data = bytearray(make_clip("avi", 6))
    at = data.index(b"strh") + 8 + 20
    data[at : at + 8] = struct.pack("<II", 1, fps)
    at = data.index(b"avih") + 8
    data[at : at + 4] = struct.pack("<I", 0)
    return bytes(data)


def of_timescale(value: int) -> bytes:
    """An MP4 whose times are told in other units."""
    data = make_clip("mp4", 6)
    at = data.index(b"mdhd") + 4 + 12
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


ANSWERED: dict[str, Callable[[], bytes]] = {
    "one frame": lambda: make_clip("mp4", 1),
    "two frames": lambda: make_clip("webm", 2),
    "variable rate": lambda: make_clip("mkv", 6, stamps=[0, 1, 2, 30, 31, 90]),
    "no duration": without_duration,
    "rotated": rotated,
    "a GIF": lambda: make_clip("gif", 6),
    "a still GIF": lambda: encoded(picture(), "GIF"),
    "MJPEG": lambda: make_clip("mjpeg", 6),
    "broken tail": lambda: make_clip("mkv", 12)[:-600],
}


@pytest.mark.parametrize("name", ANSWERED)
def test_odd_videos_are_answered(anywhere: Service | Offline, name: str) -> None:
    """One frame, a variable rate, no duration, a turned track, a tail that is missing."""
    assert anywhere.ask(video(data_url(ANSWERED[name](), "video/mp4")), QUESTION).status == 200


METADATA: dict[str, Callable[[], bytes]] = {
    "a rate of a thousand million": lambda: of_rate(10**9),
    "a rate of none": lambda: of_rate(0),
    "times in units of nothing": lambda: of_timescale(0),
    "times in the finest units": lambda: of_timescale(0xFFFFFFFF),
    "a year between two frames": lambda: make_clip("mkv", 2, stamps=[0, 10 * 3600 * 24 * 365]),
    "times that are all the same": lambda: make_clip("avi", 4),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_are_not_believed(anywhere: Service | Offline, name: str) -> None:
    """Rates and times of headers that cannot be: an answer or 400."""
    part = video(data_url(METADATA[name](), "video/mp4"))
    is_answer_or_refusal(anywhere.ask(part, QUESTION), part)


def empty_track() -> bytes:
    """An MP4 with a video track that has no frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "empty_moov"}) as out:
        stream: Any = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound: Any = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return file.getvalue()


REFUSED: dict[str, Callable[[], bytes]] = {
    "no bytes": lambda: b"",
    "no frames": empty_track,
    "sound only": make_sound,
    "text": lambda: b"hello",
    "a play list": lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x\n",
    "a list of files": lambda: b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a picture": lambda: encoded(picture()),
    "a header alone": lambda: make_clip("mp4", 6)[:40],
    "half": lambda: make_clip("mp4", 12)[:900],
    "zeros": lambda: b"\0\0\0\x18ftypmp42" + bytes(1000),
    "EBML and nothing": lambda: b"\x1aE\xdf\xa3" + bytes(100),
    "RIFF and nothing": lambda: b"RIFF\x10\0\0\0AVI " + bytes(100),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_video_is_refused(anywhere: Service | Offline, name: str) -> None:
    """0 frames, sound only, play lists that name files and hosts: 400 at the part."""
    part = video(data_url(REFUSED[name](), "video/mp4"))
    anywhere.ask(QUESTION, part).is_refusal(400, "media_undecodable", place(part, 1))


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_damaged_videos_are_answered_or_refused(served: Service, form: str) -> None:
    """Cut at many places, with bytes turned: an answer or 400 at the part."""
    data = make_clip(form, 8)
    random = np.random.default_rng(0)
    damaged = [data[: len(data) * part // 6] for part in range(6)] + [data[::-1]]
    for _ in range(5):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 6):
            broken[at] ^= int(random.integers(1, 256))
        damaged.append(bytes(broken))
    for candidate in damaged:
        part = video(data_url(candidate, "video/mp4"))
        is_answer_or_refusal(served.ask(part, QUESTION), part)


def test_videos_that_fail_use_nothing_up(served: Service) -> None:
    """GHSA-j682-9xp5-rrf3: slots of a decoder leaked with each clip that failed, until none was
    left. After two hundred failures, some while a decoder was open, one is answered as at first,
    with as many files open.
    """
    good = data_url(make_clip("mp4", 6), "video/mp4")
    first = served.ask(video(good), QUESTION, max_tokens=8).text
    data = make_clip("webm", 6)
    broken = [data[:200], data[: len(data) // 2], data[:40] + bytes(400), b"RIFF\0\0\0\0AVI x"]
    before = served.server.num_descriptors()

    def fail(number: int) -> str:
        candidate = broken[number % len(broken)] + number.to_bytes(4, "little")
        part = video(data_url(candidate, "video/mp4"))
        answer = served.ask(part)
        is_answer_or_refusal(answer, part)
        return "answered" if answer.status == 200 else str(answer.error["code"])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(fail, range(200)))
    assert outcomes.count("media_undecodable") >= 100
    again = data_url(make_clip("mp4", 6) + b"\0\0\0\x08free", "video/mp4")
    assert served.ask(video(again), QUESTION, max_tokens=8).text == first
    assert served.server.num_descriptors() <= before + 8  # four connections, and what they hold


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.full((2, 8, 8, 3), 256.0, np.float32),
        [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))],
        (np.zeros((2, 8, 8, 3), np.uint8), {"fps": -1}),
        (np.zeros((2, 8, 8, 3), np.uint8), {"fps": float("nan")}),
        (np.zeros((2, 8, 8, 3), np.uint8), {"total_num_frames": 1}),
        (np.zeros((2, 8, 8, 3), np.uint8), {"frames_indices": [5, 1]}),
        (np.zeros((2, 8, 8, 3), np.uint8), {"duration": 10**400}),
        (np.zeros((2, 8, 8, 3), np.uint8), {"unknown": 1}),
    ],
)
def test_arrays_that_are_no_videos(offline: Offline, frames: Any) -> None:
    """The same of ``multi_modal_data``: no frames, other shapes and types, metadata that cannot be."""
    prompt = {
        "prompt": "<|vision_start|><|video_pad|><|vision_end|>What?",
        "multi_modal_data": {"video": frames},
    }
    answer = offline.generate(prompt)
    assert answer.error["param"].startswith("prompt.multi_modal_data.video"), answer.body
    answer.is_refusal(400, "invalid_request", answer.error["param"])
