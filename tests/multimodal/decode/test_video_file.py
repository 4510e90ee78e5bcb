"""Encoded videos: the right frames, upright, of every format, decoding no more than they need,
whatever is damaged.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, MediaUndecodableError, RequestError
from sensorium.multimodal.decode.video import container
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.items import Video
from tests.multimodal.clips import (
    FORMATS,
    HEIGHT,
    WIDTH,
    frame_of,
    make_clip,
    make_sound,
    numbers_of,
)


def decode(data: bytes, num_frames: int | None = None, fps: float | None = None, **config) -> Video:
    options = VideoOptions.parse({"num_frames": num_frames, "fps": fps})
    return video.decode(data, options, MediaConfig(**config), None)


def evenly(total: int, num: int) -> list[int]:
    return [i * total // num for i in range(num)]


@pytest.fixture(scope="module", params=sorted(FORMATS))
def encoded(request: pytest.FixtureRequest) -> bytes:
    return make_clip(request.param, 40)


@pytest.mark.parametrize("num", [1, 2, 7, 33, 40])
def test_every_format_gives_the_frames_asked_for(encoded: bytes, num: int) -> None:
    clip = decode(encoded, num)
    assert list(clip.indices) == evenly(40, num)
    assert numbers_of(clip.frames) == evenly(40, num)
    assert clip.frames.shape == (num, HEIGHT, WIDTH, 3)
    assert clip.frames.dtype == np.uint8
    assert (clip.num_source_frames, clip.fps) == (40, pytest.approx(10.0))


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_program_streams_give_the_frames_asked_for(
    monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """They come in the rates of television only."""
    monkeypatch.setitem(FORMATS, "mpg", ("mpeg", codec, {"g": "12", "bf": "2"}))
    data = make_clip("mpg", 40, fps=25)
    for num in (1, 7, 40):
        clip = decode(data, num)
        assert numbers_of(clip.frames) == evenly(40, num)
        assert (clip.num_source_frames, clip.fps) == (40, pytest.approx(25.0))


def test_a_transport_stream_of_a_disc_has_longer_packets() -> None:
    data = make_clip("ts", 40, container_options={"mpegts_m2ts_mode": "1"})
    assert data[4:5] == data[196:197] == b"G"
    assert numbers_of(decode(data, 7).frames) == evenly(40, 7)


def test_frames_equal_those_of_decoding_everything(encoded: bytes) -> None:
    """What is skipped on the way to a frame must not be missed by it."""
    with av.open(io.BytesIO(encoded)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = decode(encoded, 9)
    for index, frame in zip(clip.indices, clip.frames, strict=True):
        np.testing.assert_array_equal(frame, whole[index])


def test_by_rate_and_by_default(encoded: bytes) -> None:
    assert numbers_of(decode(encoded, fps=2.5).frames) == evenly(40, 10)
    assert numbers_of(decode(encoded, fps=5, num_frames=6).frames) == evenly(40, 6)
    assert decode(encoded, -1).indices == tuple(range(40))
    assert len(decode(encoded).frames) == 32
    assert len(decode(encoded, 100).frames) == 40


def test_only_what_is_needed_is_decoded() -> None:
    """The limit on decoded frames tells how many there are.

    Within 12 of each wanted one there is a key frame.
    """
    data = make_clip("mp4", 600)
    with pytest.raises(MediaTooLargeError, match=r"--max-video-frames") as caught:
        decode(data, 8, max_video_frames=7)
    assert int(caught.value.message.split()[0]) <= 8 * 12
    clip = decode(data, 8, max_video_frames=8 * 12)
    assert numbers_of(clip.frames) == evenly(600, 8)
    with pytest.raises(MediaTooLargeError, match="600 frames of the video"):
        decode(data, -1, max_video_frames=599)


def test_one_key_frame_is_enough() -> None:
    data = make_clip("mkv", 60, options={"g": "1000"})
    assert numbers_of(decode(data, 5).frames) == evenly(60, 5)


def test_counts_in_headers_are_not_believed() -> None:
    data = bytearray(make_clip("avi", 40))
    count, wrong = struct.pack("<I", 40), struct.pack("<I", 123456)
    header = data.index(b"movi")
    changed = bytes(data[:header]).replace(count, wrong) + bytes(data[header:])
    assert changed != bytes(data)
    clip = decode(changed, 7)
    assert numbers_of(clip.frames) == evenly(40, 7)
    assert clip.num_source_frames == 40


@pytest.mark.parametrize("form", ["mp4", "mkv", "webm"])
def test_variable_rate(form: str) -> None:
    stamps = [0, 1, 2, 3, 10, 11, 12, 40, 41, 42, 43, 44, 60, 61, 79]
    data = make_clip(form, len(stamps), stamps=stamps)
    clip = decode(data, 5)
    assert numbers_of(clip.frames) == evenly(15, 5)
    assert clip.fps == pytest.approx(14 / 7.9, rel=0.1)


def test_frames_before_the_beginning_are_left_out() -> None:
    """An edit list says to begin at the sixth frame, which needs those before it to be decoded."""
    source, file = make_clip("mp4", 30, options={"bf": "0", "g": "100"}), io.BytesIO()
    with av.open(io.BytesIO(source)) as old, av.open(file, "w", format="mp4") as new:
        stream: Any = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = 5 * int(1 / stream.time_base / 10)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                new.mux(packet)
    clip = decode(file.getvalue(), -1)
    assert numbers_of(clip.frames) == list(range(5, 30))
    assert clip.num_source_frames == 25


MATRICES: dict[str, tuple[tuple[int, int, int, int], Any]] = {
    "as it is": ((1, 0, 0, 1), lambda f: f),
    "a quarter to the right": ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
    "half": ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    "a quarter to the left": ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda f: f[::-1]),
    "transposed": ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda f: np.rot90(f.swapaxes(0, 1), 2)),
}


@pytest.mark.parametrize("name", sorted(MATRICES))
def test_rotation(name: str) -> None:
    (a, b, c, d), turn = MATRICES[name]
    data = make_clip("mp4", 3)
    at = data.index(b"tkhd") + 4 + 40  # where the matrix of a track lies (ISO 14496-12, 8.3.2)
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    clip = decode(data[:at] + matrix + data[at + 36 :], 3)
    for found, plain in zip(clip.frames, decode(data, 3).frames, strict=True):
        np.testing.assert_array_equal(found, turn(plain))


def test_transparent_pixels_are_white() -> None:
    """Each frame of the animation is cleared before the next: what shows under it is white."""
    frames = []
    for column in (2, 12):
        frame = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
        frame.paste((0, 0, 255, 255), (column, 4, column + 6, 10))
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], disposal=2, duration=100)
    clip = decode(file.getvalue(), 2)
    for column, frame in zip((2, 12), clip.frames, strict=True):
        expected = np.full((16, 24, 3), 255, np.uint8)
        expected[4:10, column : column + 6] = (0, 0, 255)
        np.testing.assert_array_equal(frame, expected)


# --- limits ---------------------------------------------------------------------------------------


def test_pixels_are_limited() -> None:
    data = make_clip("mp4", 20)
    pixels = 4 * HEIGHT * WIDTH
    assert len(decode(data, 4, max_video_pixels=pixels).frames) == 4
    with pytest.raises(MediaTooLargeError, match=r"4 frames of 80 x 48 .*--max-video-pixels"):
        decode(data, 4, max_video_pixels=pixels - 1)


def test_pixels_of_a_frame_are_limited() -> None:
    data = make_clip("mp4", 3)
    assert len(decode(data, 3, max_image_pixels=HEIGHT * WIDTH).frames) == 3
    with pytest.raises(MediaTooLargeError, match=r"frame .* 80 x 48 .*--max-image-pixels"):
        decode(data, 3, max_image_pixels=HEIGHT * WIDTH - 1)


def blank_gif(width: int, height: int, num_frames: int) -> bytes:
    """A few bytes for each frame, of which one pixel is set."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + frame * num_frames + b";"


def test_a_few_bytes_of_huge_frames() -> None:
    assert decode(blank_gif(30, 20, 3), 3).frames.shape == (3, 20, 30, 3)
    with pytest.raises(MediaTooLargeError, match=r"65535 x 65535 .*--max-image-pixels"):
        decode(blank_gif(65535, 65535, 2), 1)


def test_large_frames_count_as_several() -> None:
    """2400 x 1800 pixels are 2.07 times as many as a frame that counts as one."""
    data = blank_gif(2400, 1800, 8)
    assert len(decode(data, -1, max_video_frames=17).frames) == 8
    with pytest.raises(MediaTooLargeError, match=r"of this size .*--max-video-frames"):
        decode(data, -1, max_video_frames=16)


def test_times_that_descend_are_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame can be entered, but has a time before all that are stored before it."""
    num = 20_000
    keys = [(number, num - number) for number in range(num)]
    index = container.FrameIndex("avi", num, [*range(num)][::-1], [*range(1, num + 1)], keys, 10.0)
    monkeypatch.setattr(container, "MAX_ENTRIES", 3)
    assert container.packet_ranges(index, [0]) == [(num - 1, num - 1)]
    late = dataclasses.replace(index, pts=[-1] * num)
    looked_at: list[int] = []

    class Keys(list[tuple[int, int]]):
        def __getitem__(self, place: Any) -> Any:
            looked_at.append(place)
            return super().__getitem__(place)

    late = dataclasses.replace(late, keys=Keys(keys))
    assert container.packet_ranges(late, [0]) == [(0, num - 1)]
    assert len(looked_at) < 25, "those of the bisection, and three"


def test_more_frames_than_may_be_decoded_are_not_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(container, "packet_ranges", lambda *_: pytest.fail("looked up"))
    with pytest.raises(MediaTooLargeError, match="20 frames of the video"):
        decode(make_clip("mp4", 20), -1, max_video_frames=19)


def test_sampled_frames_are_limited() -> None:
    config: dict[str, Any] = {"limit_mm_per_prompt": {"video": {"count": 1, "num_frames": 6}}}
    data = make_clip("mp4", 20)
    assert len(decode(data, **config).frames) == 6
    assert len(decode(data, 9, **config).frames) == 6
    assert len(decode(data, -1, **config).frames) == 6
    assert len(decode(data, fps=10, **config).frames) == 6
    assert len(decode(data, 3, **config).frames) == 3


# --- what is no video, or damaged -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"", "empty"),
        (b"hello, this is no video", "not a video in a known format"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not a video in a known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video in a known format"),
        (b"GIF89a", "damaged"),
        (b"\x1aE\xdf\xa3" + bytes(100), "damaged"),
        (b"RIFF\x10\0\0\0AVI " + bytes(100), "damaged"),
        (b"\0\0\0\x18ftypmp42" + bytes(100), "damaged"),
    ],
)
def test_what_is_no_video(data: bytes, pattern: str) -> None:
    with pytest.raises(MediaUndecodableError, match=pattern) as caught:
        decode(data, 4)
    assert "passwd" not in caught.value.message


def test_a_file_without_pictures() -> None:
    with pytest.raises(MediaUndecodableError, match="no video track"):
        decode(make_sound(), 4)


def test_a_codec_that_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "ffvhuff", ("avi", "ffvhuff", {}))
    with pytest.raises(MediaUndecodableError, match="codec that is not decoded"):
        decode(make_clip("ffvhuff", 3), 2)


@pytest.mark.parametrize("form", ["mp4", "mkv", "avi", "avi of h264", "webm", "gif"])
def test_a_tail_that_is_missing(form: str) -> None:
    pieces = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
    whole = make_clip(form, 40, **(pieces if form == "mp4" else {}))
    assert numbers_of(decode(whole, 5).frames) == evenly(40, 5)
    data = whole[: int(len(whole) * 0.6)]
    clip = decode(data, 5)
    assert 15 <= clip.num_source_frames <= 32
    assert list(clip.indices) == evenly(clip.num_source_frames, 5)
    assert numbers_of(clip.frames[:4]) == list(clip.indices)[:4]


def test_a_file_without_its_index() -> None:
    """This kind of file ends with what is needed to read it."""
    whole = make_clip("mp4", 40)
    with pytest.raises(MediaUndecodableError, match="damaged or truncated"):
        decode(whole[: int(len(whole) * 0.6)], 5)


@pytest.mark.parametrize("form", ["mp4", "mkv", "avi of h264", "webm", "gif"])
def test_damage_is_an_error_or_a_clip(form: str) -> None:
    whole = make_clip(form, 24)
    rng = np.random.default_rng(0)
    num_clips = 0
    for _ in range(25):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 40)):
            data[at] = rng.integers(256)
        with suppress(RequestError):
            clip = decode(bytes(data), 5)
            num_clips += 1
            assert len(clip.frames) == len(clip.indices) <= 5
            assert list(clip.indices) == sorted(clip.indices)
            assert clip.indices[-1] < clip.num_source_frames
    assert num_clips > 0


def test_a_hole_is_filled_with_its_neighbour() -> None:
    """Frames in the middle are overwritten: those asked for that are gone are taken from beside it."""
    data = bytearray(make_clip("mjpeg", 20))
    starts = [i for i in range(len(data) - 3) if data[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 20
    for number in (7, 8, 9):
        data[starts[number] : starts[number] + 400] = bytes(400)
    clip = decode(bytes(data), -1)
    assert len(clip.indices) == 20
    assert set(clip.indices[7:10]) <= {6, 10}
    assert numbers_of(clip.frames) == list(clip.indices)


def test_frames_under_other_timestamps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a decoder gives frames times that their packets did not have, all are decoded in
    their order.
    """
    data = make_clip("mp4", 40)
    index_frames = container.index_frames

    def shifted(*arguments: Any) -> container.FrameIndex:
        index = index_frames(*arguments)
        return dataclasses.replace(index, pts=[pts + 1 for pts in index.pts])

    monkeypatch.setattr(container, "index_frames", shifted)
    assert numbers_of(decode(data, 7).frames) == evenly(40, 7)


def test_many_at_once() -> None:
    data = make_clip("mp4", 60)
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(lambda _: decode(data, 6), range(12)))
    assert {clip.frames.tobytes() for clip in clips} == {clips[0].frames.tobytes()}


def test_a_size_that_changes_on_the_way() -> None:
    """Later frames are brought to the size of the first."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        stream: Any = out.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        for number in range(4):
            size = (HEIGHT, WIDTH) if number < 2 else (2 * HEIGHT, 2 * WIDTH)
            codec = av.CodecContext.create("mjpeg", "w")
            codec.height, codec.width, codec.pix_fmt = *size, "yuvj420p"
            codec.time_base = Fraction(1, 10)
            picture = Image.fromarray(frame_of(number)).resize(size[::-1], Image.Resampling.NEAREST)
            for packet in codec.encode(av.VideoFrame.from_image(picture)):
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = Fraction(1, 10), stream
                out.mux(packet)
    clip = decode(file.getvalue(), -1)
    assert clip.frames.shape == (4, HEIGHT, WIDTH, 3)
    assert numbers_of(clip.frames) == [0, 1, 2, 3]
