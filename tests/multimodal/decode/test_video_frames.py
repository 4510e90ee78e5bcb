"""Videos that come as frames: every form gives the same clip; metadata are checked.

Nothing is sampled unasked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    RequestError,
)
from sensorium.multimodal.cache.digest import object_digest
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.decode.video import video_frames as frames
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.items import Video
from sensorium.multimodal.parse.messages import refs_from_data
from tests.multimodal.support import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 14, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
FORMS: dict[str, Any] = {
    "array": PIXELS,
    "tensor": TENSOR,
    "float tensor": TENSOR.float() / 255,
    "list of arrays": list(PIXELS),
    "tuple of arrays": tuple(PIXELS),
    "list of tensors": list(TENSOR),
    "list of pictures": [Image.fromarray(frame) for frame in PIXELS],
    "two pictures": (Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[1])),
    "with metadata": (PIXELS, {"fps": 2.0}),
    "list with metadata": (list(PIXELS), {"fps": 2.0}),
}


def decode(source: Any, options: VideoOptions = VideoOptions(), **config: Any) -> Video:
    return video.decode_object(source, options, MediaConfig(**config), None)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_gives_the_same(form: str) -> None:
    (ref,) = refs_from_data({"video": FORMS[form]})
    assert ref.kind == "object"
    clip = decode(ref.source)
    num = 2 if form == "two pictures" else 6
    np.testing.assert_array_equal(clip.frames, PIXELS[:num])
    assert clip.indices == tuple(range(num))
    assert clip.num_source_frames == num
    assert clip.fps == (2.0 if "metadata" in form else None)
    assert not np.shares_memory(clip.frames, PIXELS)


def test_lists_of_videos_are_several() -> None:
    for value in ([PIXELS, PIXELS[:2]], [list(PIXELS), (PIXELS, {"fps": 1})], [TENSOR, TENSOR]):
        assert len(refs_from_data({"video": value})) == 2


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        (VideoOptions(), [0, 1, 2, 3, 4, 5]),
        (VideoOptions(num_frames=3), [0, 2, 4]),
        (VideoOptions.parse({"num_frames": -1}), [0, 1, 2, 3, 4, 5]),
        (VideoOptions(num_frames=40), [0, 1, 2, 3, 4, 5]),
        (VideoOptions(fps=1.0), [0, 2, 4]),
        (VideoOptions(fps=100.0), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_sampled_only_when_asked(options: VideoOptions, indices: list[int]) -> None:
    clip = decode((PIXELS, {"fps": 2.0}), options)
    assert list(clip.indices) == indices
    np.testing.assert_array_equal(clip.frames, PIXELS[indices])


def test_frames_that_were_taken_of_a_longer_video() -> None:
    """Six of 60 frames at 20 per second last three seconds: one per second are three of them."""
    taken = [0, 10, 20, 30, 40, 50]
    metadata = {"fps": 20, "total_num_frames": 60, "frames_indices": taken, "duration": 3.0}
    clip = decode((PIXELS, metadata))
    assert (list(clip.indices), clip.num_source_frames, clip.fps) == (taken, 60, 20.0)
    assert list(decode((PIXELS, metadata), VideoOptions(fps=1)).indices) == [0, 20, 40]
    without = {"fps": 20, "total_num_frames": 60}
    assert list(decode((PIXELS, without)).indices) == taken
    assert (
        decode((PIXELS, {"frames_indices": taken, "duration": 3, "fps": 20})).num_source_frames
        == 60
    )
    assert decode((PIXELS, {"frames_indices": taken})).num_source_frames == 51
    assert decode((PIXELS, {"duration": 3, "total_num_frames": 60})).fps == 20
    assert decode((PIXELS, {"frames_indices": np.array(taken)})).indices == tuple(taken)
    assert decode((PIXELS, {"frames_indices": torch.tensor(taken)})).indices == tuple(taken)
    spread = (PIXELS, {"frames_indices": range(0, 60, 10)})
    assert decode(spread).indices == tuple(taken)
    assert object_digest(spread) == object_digest((PIXELS, {"frames_indices": taken}))
    assert decode((PIXELS, {"frames_indices": None, "fps": None})).fps is None


def test_a_rate_of_frames_without_metadata_is_theirs() -> None:
    clip = decode(PIXELS, VideoOptions(fps=4.0))
    assert (clip.indices, clip.fps) == (tuple(range(6)), 4.0)
    assert decode((PIXELS, {"fps": 2.0}), VideoOptions(fps=1.0)).fps == 2.0


def test_metadata_may_ask_for_the_models_rule() -> None:
    many = np.repeat(PIXELS, 10, axis=0)
    metadata = {"fps": 2.0, "video_backend": "x", "height": 10, "width": 14}
    assert len(decode((many, metadata)).frames) == 60
    assert len(decode((many, metadata | {"do_sample_frames": True})).frames) == 32


@pytest.mark.parametrize(
    ("metadata", "pattern"),
    [
        ({"fsp": 2}, "unknown key 'fsp'.*Did you mean 'fps'"),
        ({"fps": 0}, "fps=0; it must be positive"),
        ({"fps": float("nan")}, "fps=nan; it must be positive"),
        ({"fps": 10**400}, "it must be positive, from 1e-09 to 1e\\+09"),
        ({"fps": 1e-308}, "fps=1e-308; it must be positive"),
        ({"duration": 1e308, "fps": 30}, "duration=1e\\+308; it must be positive"),
        ({"fps": np.complex64(1)}, "it must be a number"),
        ({"frames_indices": set(range(9))}, "no list of integers, got set"),
        ({"frames_indices": iter(range(9))}, "no list of integers, got range_iterator"),
        ({"video_backend": object()}, "neither text nor number: object"),
        ({"fps": "2"}, "fps='2'; it must be a number"),
        ({"duration": -1}, "duration=-1"),
        ({"total_num_frames": 5}, "total_num_frames=5, but has 6 frames"),
        ({"total_num_frames": 0.5}, "must be a number from 1"),
        ({"total_num_frames": 10**400, "duration": 3}, "must be a number from 1"),
        ({"frames_indices": [0, 1, 2, 3, 4, 10**400], "fps": 2}, "at most"),
        ({"frames_indices": [0, 1, 2]}, "3 entries in frames_indices for 6 frames"),
        ({"frames_indices": [0, 1, 2, 3, 5, 4]}, "do not ascend"),
        ({"frames_indices": [-1, 1, 2, 3, 4, 5]}, "negative"),
        ({"frames_indices": [0, 1, 2, 3, 4, 5.5]}, "no list of integers"),
        ({"frames_indices": 3}, "no list of integers"),
        ({"frames_indices": [0, 1, 2, 3, 4, 9], "total_num_frames": 9}, "frame 9 among"),
        ({"fps": 2.0, "duration": 30.0}, "fps=2 and duration=30, but 6 frames .* last 3 s"),
        ({"do_sample_frames": 1}, "do_sample_frames=1; it must be true or false"),
    ],
)
def test_metadata_that_cannot_be(metadata: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=pattern):
        decode((PIXELS, metadata))
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        refs_from_data({"video": [(PIXELS, metadata)]})
    assert caught.value.param == "multi_modal_data.video[0]"


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ([PIXELS[0], PIXELS[1][:5]], "one size; frame 0 has 14 x 10 pixels, frame 1 has 14 x 5"),
        (PIXELS.astype(np.int64), "uint8"),
        (PIXELS[..., :2], r"\(height, width, 3\)"),
        (TENSOR.permute(0, 2, 3, 1), r"\(3, height, width\)"),
        (TENSOR.float() * 2, "values from 0 to 255, or from 0 to 1"),
        (PIXELS[:0], "at least one frame"),
        ([], "at least one frame"),
        (PIXELS[0], "list of frames or an array of four dimensions"),
        ("clip.mp4", "got str"),
        (3, "got int"),
    ],
)
def test_what_is_no_video(source: Any, pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=pattern):
        decode(source)


def test_limits() -> None:
    with pytest.raises(MediaTooLargeError, match=r"6 frames of 14 x 10 .*--max-video-pixels"):
        decode(PIXELS, max_video_pixels=839)
    assert len(decode(PIXELS, max_video_pixels=840).frames) == 6
    limit = {"video": {"num_frames": 5}}
    with pytest.raises(MediaTooLargeError, match=r"6 frames; at most 5.*--limit-mm-per-prompt"):
        decode(PIXELS, limit_mm_per_prompt=limit)
    assert len(decode(PIXELS, VideoOptions(num_frames=4), limit_mm_per_prompt=limit).frames) == 4


# --- identity -------------------------------------------------------------------------------------


def test_different_videos_have_different_digests() -> None:
    pictures = [Image.fromarray(frame) for frame in PIXELS]
    sources = [
        PIXELS,
        PIXELS[::-1],
        PIXELS[:5],
        PIXELS.reshape(6, 14, 10, 3),
        TENSOR,
        TENSOR.float() / 255,
        list(PIXELS),
        list(PIXELS[::-1]),
        [PIXELS[0], *PIXELS],
        pictures,
        pictures[::-1],
        (PIXELS, {"fps": 2.0}),
        (PIXELS, {"fps": 3.0}),
        (PIXELS, {"duration": 2.0}),
        (PIXELS, {"frames_indices": [0, 1, 2, 3, 4, 5]}),
        (PIXELS, {"frames_indices": [0, 1, 2, 3, 4, 6]}),
        (pictures, {"fps": 2.0}),
    ]
    digests = [object_digest(source) for source in sources]
    assert len(set(digests)) == len(sources)
    assert digests == [object_digest(source) for source in sources]
    assert object_digest((PIXELS.copy(), {"fps": 2.0})) == object_digest((PIXELS, {"fps": 2.0}))
    ordered = {"fps": 2.0, "duration": 3.0}
    turned = {"duration": 3.0, "fps": 2.0}
    assert object_digest((PIXELS, ordered)) == object_digest((PIXELS, turned))


def test_indices_as_a_tensor_have_a_digest() -> None:
    one, two = ((PIXELS, {"frames_indices": torch.arange(6) * step}) for step in (1, 2))
    assert object_digest(one) != object_digest(two)


# --- pictures of a data: URL ----------------------------------------------------------------------


def packed(num: int = 4) -> bytes:
    return frames.pack([encoded(Image.fromarray(frame)) for frame in PIXELS[:num]])


def decode_packed(data: bytes, **options: Any) -> Video:
    return video.decode(data, VideoOptions(**options), MediaConfig(), None)


def test_packed_pictures() -> None:
    clip = decode_packed(packed())
    np.testing.assert_array_equal(clip.frames, PIXELS[:4])
    assert (clip.indices, clip.fps) == ((0, 1, 2, 3), None)
    assert decode_packed(packed(), num_frames=2).indices == (0, 2)
    with pytest.raises(MediaTooLargeError, match="4 frames; at most 3"):
        config = MediaConfig(limit_mm_per_prompt={"video": {"num_frames": 3}})
        video.decode(packed(), VideoOptions(), config, None)


def test_packed_pictures_are_decoded_within_the_limit() -> None:
    config = MediaConfig(max_video_frames=3)
    assert len(video.decode(packed(), VideoOptions(num_frames=3), config, None).frames) == 3
    with pytest.raises(MediaTooLargeError, match=r"4 frames .* at most 3 .*--max-video-frames"):
        video.decode(packed(), VideoOptions(), config, None)


@pytest.mark.parametrize(
    "data",
    [frames.pack([]), packed()[:-1], packed() + b"x", frames.pack([b"no picture"]), packed()[:15]],
)
def test_packed_pictures_that_are_damaged(data: bytes) -> None:
    with pytest.raises(MediaUndecodableError):
        decode_packed(data)


def test_more_packed_pictures_than_make_a_video() -> None:
    """A file from anywhere may look like an unpacked URL.

    A few bytes for each of millions of empty pictures.
    """
    with pytest.raises(MediaTooLargeError, match=f"more than {frames.MAX_PICTURES} pictures"):
        decode_packed(frames.pack([b""] * (frames.MAX_PICTURES + 1)))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern", "place"),
    [
        ({"num_frames": 0}, "from 1, or -1 for all", ".num_frames"),
        ({"num_frames": True}, "got True", ".num_frames"),
        ({"num_frames": 2.0}, "got 2.0", ".num_frames"),
        ({"num_frames": "8"}, "got '8'", ".num_frames"),
        ({"fps": 0}, "above 0", ".fps"),
        ({"fps": -2.0}, "above 0", ".fps"),
        ({"fps": float("inf")}, "got inf", ".fps"),
        ({"fps": "2"}, "got '2'", ".fps"),
        ({"frames": 2}, "Unknown option 'frames'.*num_frames, fps", ""),
        ([2], "must be a mapping, got list", ""),
    ],
)
def test_wrong_options(options: Any, pattern: str, place: str) -> None:
    with pytest.raises(RequestError, match=pattern) as caught:
        VideoOptions.parse(options)
    assert caught.value.param == f"media_io_kwargs.video{place}"


def test_options() -> None:
    assert VideoOptions.parse({}) == VideoOptions()
    assert VideoOptions.parse({"num_frames": 4, "fps": 2}) == VideoOptions(4, 2.0)
    assert VideoOptions.parse({"num_frames": None}) == VideoOptions()
