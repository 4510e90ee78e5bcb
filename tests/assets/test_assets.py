"""The pictures, clip and sounds that come with the package."""

from __future__ import annotations

import asyncio
import base64
import io
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from sensorium import LLM, AsyncLLM, SamplingParams
from sensorium.assets import AudioAsset, ImageAsset, VideoAsset
from sensorium.config import MediaConfig
from sensorium.errors import InvalidRequestError, MediaRefusedError
from sensorium.multimodal.fetch.guard import Guard


@pytest.mark.parametrize("name", ImageAsset.names)
def test_images(name: str) -> None:
    image = ImageAsset(name).pil_image
    assert image.mode == "RGB"
    assert min(image.size) > 500
    kind, _, data = ImageAsset(name).data_url.partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == image.size


def test_the_stop_sign_is_red() -> None:
    red, green, blue = ImageAsset("stop_sign").pil_image.getpixel((400, 180))
    assert red > 150 > 80 > max(green, blue)


@pytest.mark.parametrize(("num_frames", "expected"), [(-1, 90), (1, 1), (16, 16), (500, 90)])
def test_video(num_frames: int, expected: int) -> None:
    asset = VideoAsset(name="baby_reading", num_frames=num_frames)
    frames, metadata = asset.np_ndarrays, asset.metadata
    assert frames.shape == (expected, 360, 640, 3)
    assert frames.dtype == np.uint8
    assert len(metadata["frames_indices"]) == expected == len(set(metadata["frames_indices"]))
    assert metadata["total_num_frames"] == 90
    assert metadata["duration"] == pytest.approx(6.0)
    assert metadata["fps"] == pytest.approx(15.0)
    assert np.array_equal(np.asarray(asset.pil_images[-1]), frames[-1])


def test_the_frames_differ() -> None:
    first, last = VideoAsset("baby_reading", num_frames=2).np_ndarrays.astype(int)
    assert np.abs(first - last).mean() > 0.5


@pytest.mark.parametrize("name", AudioAsset.names)
def test_sounds(name: str) -> None:
    samples, rate = AudioAsset(name).audio_and_sample_rate
    assert rate == 16000
    assert samples.ndim == 1
    assert samples.dtype == np.float32
    assert 4 < len(samples) / rate < 20
    assert 0.5 < np.abs(samples).max() <= 1
    data = base64.b64decode(AudioAsset(name).data_url.partition(";base64,")[2])
    assert soundfile.info(io.BytesIO(data)).samplerate == rate


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [(ImageAsset, "stopsign", "stop_sign"), (AudioAsset, "winning", "winning_call")],
)
def test_unknown_names(kind: type, name: str, near: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"Did you mean '{near}'"):
        kind(name)


@pytest.mark.parametrize("num_frames", [0, -2, True, "4", 2.5, None])
def test_impossible_numbers_of_frames(num_frames: Any) -> None:
    with pytest.raises(InvalidRequestError, match="num_frames must be from 1"):
        VideoAsset("baby_reading", num_frames=num_frames)


@pytest.mark.parametrize(
    "asset", [ImageAsset("stop_sign"), VideoAsset("baby_reading"), AudioAsset("winning_call")]
)
def test_urls_and_paths(asset: Any) -> None:
    """As the guides use them: the URL as an id, the path to open, the data to send."""
    assert asset.url.startswith("file:///")
    assert len(asset.url) < 1024
    with urllib.request.urlopen(asset.url) as file:
        content = file.read()
    assert asset.path == asset.get_local_path()
    assert asset.get_local_path().read_bytes() == content
    assert base64.b64decode(asset.data_url.partition(";base64,")[2]) == content


def test_its_urls_are_taken_offline_without_an_option_and_by_no_server() -> None:
    url = ImageAsset("stop_sign").url
    content = ImageAsset("stop_sign").path.read_bytes()
    assert Guard.of(MediaConfig(), package_files=True).read_local(url, 1 << 20) == content
    with pytest.raises(MediaRefusedError, match="--allowed-local-media-path"):
        Guard.of(MediaConfig()).read_local(url, 1 << 20)
    for outside in (f"{url}/../../../__init__.py", "/etc/passwd", str(Path(url).parent)):
        with pytest.raises(MediaRefusedError):
            Guard.of(MediaConfig(), package_files=True).read_local(outside, 1 << 20)


def test_a_chat_with_a_file_of_the_package() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": ImageAsset("stop_sign").url}},
        {"type": "text", "text": "What colour is it?"},
    ]
    with LLM("demo", num_kv_blocks=100) as llm:
        (output,) = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=2))
    assert len(output.outputs[0].token_ids) == 2


def test_the_same_in_a_program_with_an_event_loop() -> None:
    content = [{"type": "image_url", "image_url": ImageAsset("stop_sign").url}]

    async def main() -> list[int]:
        async with AsyncLLM("demo", num_kv_blocks=100) as llm:
            params = SamplingParams(max_tokens=2, ignore_eos=True, output_kind="final_only")
            asked = llm.chat([{"role": "user", "content": content}], params)
            return [len(output.outputs[0].token_ids) async for output in asked]

    assert asyncio.run(main()) == [2]
