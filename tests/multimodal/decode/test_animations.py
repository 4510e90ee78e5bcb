"""Animated WebP and PNG files: the right frames within the limits of videos, whatever is damaged."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, MediaUndecodableError, RequestError
from sensorium.multimodal.decode import image
from sensorium.multimodal.decode.video import animations
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.items import Video
from tests.multimodal.clips import HEIGHT, WIDTH, frame_of, numbers_of

FORMS = ("WEBP", "PNG")


def animated(form: str, num_frames: int = 20, duration: Any = 100, **options: Any) -> bytes:
    pictures = [Image.fromarray(frame_of(number)) for number in range(num_frames)]
    file = io.BytesIO()
    lossless = {"lossless": True, "method": 0} if form == "WEBP" else {}
    pictures[0].save(
        file,
        form,
        save_all=True,
        append_images=pictures[1:],
        duration=duration,
        **lossless,
        **options,
    )
    return file.getvalue()


def decode(data: bytes, num_frames: int | None = None, fps: float | None = None, **config) -> Video:
    options = VideoOptions.parse({"num_frames": num_frames, "fps": fps})
    return video.decode(data, options, MediaConfig(**config), None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num", [1, 2, 7, 20])
def test_the_frames_asked_for(form: str, num: int) -> None:
    clip = decode(animated(form), num)
    assert list(clip.indices) == [i * 20 // num for i in range(num)]
    assert numbers_of(clip.frames) == list(clip.indices)
    assert clip.frames.shape == (num, HEIGHT, WIDTH, 3)
    assert (clip.num_source_frames, clip.fps) == (20, pytest.approx(10.0))


def test_an_animation_is_one_however_much_stands_before_its_frames() -> None:
    """Colour profiles and texts may be long."""
    data = animated("PNG")
    text = b"tEXt" + b"Comment\0" + b"x" * 100_000
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    after_header = 8 + 25
    clip = decode(data[:after_header] + chunk + data[after_header:], 2)
    assert numbers_of(clip.frames) == [0, 10]


@pytest.mark.parametrize("form", FORMS)
def test_frames_by_rate(form: str) -> None:
    assert numbers_of(decode(animated(form), fps=5).frames) == list(range(0, 20, 2))


@pytest.mark.parametrize("form", FORMS)
def test_frames_equal_those_of_pillow(form: str) -> None:
    data = animated(form)
    for index, frame in zip((0, 5, 10, 15), decode(data, 4).frames, strict=True):
        with Image.open(io.BytesIO(data)) as file:
            file.seek(index)
            np.testing.assert_array_equal(frame, np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("form", FORMS)
def test_transparent_frames_lie_over_white(form: str) -> None:
    pictures = [Image.new("RGBA", (8, 8), (200, 0, 0, alpha)) for alpha in (0, 255)]
    file = io.BytesIO()
    pictures[0].save(
        file, form, save_all=True, append_images=pictures[1:], duration=50, disposal=1, blend=0
    ) if form == "PNG" else pictures[0].save(
        file, form, save_all=True, append_images=pictures[1:], duration=50, lossless=True
    )
    frames = decode(file.getvalue(), 2).frames
    assert frames[0, 4, 4].tolist() == [255, 255, 255]
    assert frames[1, 4, 4].tolist() == [200, 0, 0]


def test_a_still_picture_before_an_apng_is_no_frame_of_it() -> None:
    pictures = [Image.fromarray(frame_of(number)) for number in range(5)]
    file = io.BytesIO()
    pictures[0].save(
        file, "PNG", save_all=True, default_image=True, append_images=pictures[1:], duration=40
    )
    clip = decode(file.getvalue(), 4)
    assert numbers_of(clip.frames) == [1, 2, 3, 4]
    assert (clip.num_source_frames, clip.fps) == (4, pytest.approx(25.0))


def test_unequal_times_give_their_mean() -> None:
    assert decode(animated("WEBP", 4, [100, 100, 400, 200]), 1).fps == pytest.approx(5.0)
    assert decode(animated("PNG", 4, 0), 1).fps is None


@pytest.mark.parametrize("form", ["WEBP", "PNG", "JPEG"])
def test_still_pictures_are_no_videos(form: str) -> None:
    file = io.BytesIO()
    Image.fromarray(frame_of(1)).save(file, form)
    with pytest.raises(MediaUndecodableError, match="not a video in a known format"):
        decode(file.getvalue())


def test_text_of_a_still_picture_does_not_animate_it() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "acTL")
    file = io.BytesIO()
    Image.fromarray(frame_of(1)).save(file, "PNG", pnginfo=info)
    assert animations.read(file.getvalue()) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"max_video_frames": 10}, "--max-video-frames"),
        ({"max_video_pixels": 3 * HEIGHT * WIDTH}, "--max-video-pixels"),
        ({"max_image_pixels": HEIGHT * WIDTH - 1}, "--max-image-pixels"),
    ],
)
def test_the_limits_of_videos_hold(
    monkeypatch: pytest.MonkeyPatch, form: str, limit: dict[str, int], words: str
) -> None:
    data = animated(form)
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded before they are looked at
    with pytest.raises(MediaTooLargeError, match=words):
        decode(data, 20, **limit)


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_an_error_or_a_clip(form: str) -> None:
    data = animated(form, 8)
    rng = np.random.default_rng(3)
    for _ in range(120):
        changed = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(changed), 3):
            changed[place] = rng.integers(0, 256)
        with suppress(RequestError):
            assert decode(bytes(changed), 4).frames.shape[0] <= 4


@pytest.mark.parametrize("form", FORMS)
def test_as_a_picture_an_animation_is_its_first_frame(form: str) -> None:
    pixels = image.decode(animated(form), image.ImageOptions(), max_pixels=1 << 20)
    assert numbers_of([pixels]) == [0]
