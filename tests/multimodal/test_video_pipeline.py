"""Videos on their way through the pipeline: URLs, options, limits, identity, the model's own rule."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.errors import (
    ConfigError,
    InvalidRequestError,
    MediaRefusedError,
    MediaTooLargeError,
    MediaUndecodableError,
)
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.decode.video import frame_sampling
from sensorium.multimodal.fetch.data_url import parse_data_url
from sensorium.multimodal.items import Features, MediaRef, Video
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.clips import frame_of, make_clip, numbers_of
from tests.multimodal.support import FakeProcessor, data_url, encoded


class ClipProcessor(FakeProcessor):
    """Features are the decoded frames."""

    modalities = ("image", "video")

    def __init__(self, sampler: Any = None) -> None:
        super().__init__()
        self.sampler = sampler
        self.clips: list[Video] = []

    def decoding(self, modality: str, options: Mapping[str, Any]) -> Any:
        return self.sampler

    def process(self, modality, data, options, num_items=1) -> Features:
        self.clips.append(data)
        return super().process(modality, data.frames, options, num_items)


class Setup:
    def __init__(self, sampler: Any = None, **config: Any) -> None:
        self.processor = ClipProcessor(sampler)
        self.pipeline = MediaPipeline(
            MediaConfig(**config),
            self.processor,
            FeatureCache(1 << 24),
            workers=ThreadWorkers(2),
        )

    async def load(self, source: Any, kind: Any = "url", **options: Any) -> Any:
        ref = MediaRef("video", kind, source, param="here")
        return (await self.pipeline.load([ref], **options))[0]


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[Setup] = []

    def build(*args: Any, **config: Any) -> Setup:
        made.append(Setup(*args, **config))
        return made[-1]

    yield build
    for setup in made:
        setup.pipeline.close()


def frames_url(num: int, form: str = "JPEG") -> str:
    pictures = [encoded(Image.fromarray(frame_of(i)), form) for i in range(num)]
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(p).decode() for p in pictures)


async def test_every_way_to_send_a_video(make: Any, tmp_path: Path) -> None:
    data = make_clip("mp4", 20)
    (tmp_path / "a clip.mp4").write_bytes(data)
    setup = make(allowed_local_media_path=str(tmp_path))
    options = {"media_io_kwargs": {"video": {"num_frames": 4}}}
    ways = [
        (str(tmp_path / "a clip.mp4"), "url"),
        (f"file://{tmp_path}/a%20clip.mp4", "url"),
        (data_url(data, "video/mp4"), "url"),
        (data, "bytes"),
    ]
    items = [await setup.load(source, kind, **options) for source, kind in ways]
    assert len({item.digest for item in items}) == 1
    assert setup.processor.num_calls == 1
    assert numbers_of(items[0].features.arrays["pixels"]) == [0, 5, 10, 15]


async def test_options_are_part_of_the_identity(make: Any) -> None:
    setup, url = make(), data_url(make_clip("mp4", 20), "video/mp4")
    asked = [None, {"num_frames": 4}, {"num_frames": 5}, {"fps": 2}, {"fps": 2, "num_frames": 4}]
    items = [
        await setup.load(url, media_io_kwargs={"video": own} if own else None) for own in asked
    ]
    assert len({item.digest for item in items}) == len(asked)
    assert [len(i.features.arrays["pixels"]) for i in items] == [20, 4, 5, 4, 4]


async def test_the_configurations_options_are_overridden(make: Any) -> None:
    setup = make(media_io_kwargs={"video": {"num_frames": 3}})
    url = data_url(make_clip("mp4", 20), "video/mp4")
    assert len((await setup.load(url)).features.arrays["pixels"]) == 3
    own = {"video": {"num_frames": 6}}
    item = await setup.load(url, media_io_kwargs=own)
    assert len(item.features.arrays["pixels"]) == 6


async def test_the_models_rule_decides(make: Any) -> None:
    setup = make(functools.partial(frame_sampling.minicpm_v))
    item = await setup.load(make_clip("mp4", 40), "bytes")
    assert numbers_of(item.features.arrays["pixels"]) == [0, 10, 20, 30]
    frames = np.stack([frame_of(i) for i in range(40)])
    assert len((await setup.load(frames, "object")).features.arrays["pixels"]) == 40


async def test_pictures_with_commas_between(make: Any) -> None:
    setup = make()
    item = await setup.load(frames_url(5))
    assert numbers_of(item.features.arrays["pixels"]) == [0, 1, 2, 3, 4]
    assert (setup.processor.clips[0].fps, setup.processor.clips[0].num_source_frames) == (None, 5)
    assert (await setup.load(frames_url(5))).digest == item.digest
    assert setup.processor.num_calls == 1
    assert (await setup.load(frames_url(4))).digest != item.digest
    one = await setup.load(frames_url(1))
    assert numbers_of(one.features.arrays["pixels"]) == [0]
    own = {"video": {"num_frames": 2}}
    assert (await setup.load(frames_url(5), media_io_kwargs=own)).features.arrays["pixels"].shape[
        0
    ] == 2


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("data:video/jpeg;base64,", "damaged|no frames|empty"),
        (frames_url(2) + ",", "empty|damaged"),
        (frames_url(2)[:-40], "damaged"),
        ("data:video/jpeg;base64,!!!!", "base64"),
        ("data:video/mp4;base64,AAAA", "not a video in a known format"),
    ],
)
async def test_pictures_that_are_damaged(make: Any, url: str, pattern: str) -> None:
    with pytest.raises(MediaUndecodableError, match=pattern) as caught:
        await make().load(url)
    assert caught.value.param == "here"


def test_all_pictures_together_count_against_the_limit() -> None:
    url = frames_url(3)
    size = len(parse_data_url(url, 1 << 20))
    with pytest.raises(MediaTooLargeError, match=f"more than {size // 2} bytes"):
        parse_data_url(url, size // 2)


def test_commas_alone_cost_nothing() -> None:
    with pytest.raises(MediaTooLargeError, match="20001 images; at most 16384"):
        parse_data_url("data:video/jpeg;base64," + "," * 20_000, 1 << 20)


async def test_limits_name_their_flags(make: Any) -> None:
    setup = make(
        limit_mm_per_prompt={"video": {"count": 1, "num_frames": 6}}, max_video_pixels=48 * 80 * 8
    )
    item = await setup.load(make_clip("mp4", 20), "bytes")
    assert len(item.features.arrays["pixels"]) == 6
    frames = np.stack([frame_of(i) for i in range(7)])
    with pytest.raises(MediaTooLargeError, match="--limit-mm-per-prompt") as caught:
        await setup.load(frames, "object")
    assert caught.value.param == "here"
    large = np.zeros((3, 200, 200, 3), np.uint8)
    with pytest.raises(MediaTooLargeError, match="--max-video-pixels"):
        await setup.load(large, "object")


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"video": {"num_frames": 0}}, "media_io_kwargs.video.num_frames"),
        ({"video": {"fps": "fast"}}, "media_io_kwargs.video.fps"),
        ({"video": {"frames": 3}}, "media_io_kwargs.video"),
        ({"video": 3}, "media_io_kwargs.video"),
        ({"vido": {}}, "media_io_kwargs.vido"),
    ],
)
async def test_wrong_options_fail_at_start(make: Any, given: Any, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(media_io_kwargs=given)
    assert caught.value.param == place
    with pytest.raises(InvalidRequestError) as refused:
        await make().load(b"", "bytes", media_io_kwargs=given)
    assert refused.value.param == place


async def test_local_files_stay_guarded(make: Any, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(make_clip("mp4", 2))
    with pytest.raises(MediaRefusedError):
        await make().load(str(tmp_path / "clip.mp4"))
