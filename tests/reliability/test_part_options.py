"""Options in a part of a message hold for its item alone, as those of qwen-vl-utils do.

Unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from sensorium.assets.image import ImageAsset
from sensorium.assets.video import VideoAsset
from sensorium.engine.prompts.types import ChatPrompt
from sensorium.errors import InvalidRequestError, RequestError
from sensorium.models import loader
from sensorium.models.families.qwen2_vl.sizes import PixelRange
from sensorium.models.registry import resolve
from sensorium.multimodal.parse.part_options import by_use
from sensorium.text.chat.chat_template import parse_messages
from tests.checkpoints import make_llava, make_qwen2_5_vl, make_qwen3_vl
from tests.parts import Parts, build_llm
from tests.reliability.asking import Offline, Service, image, text
from tests.reliability.media import picture, picture_url
from tests.vision_info import qwen_vl_utils

ROOM = {"num_kv_blocks": 100, "max_model_len": 1024, "allowed_local_media_path": "/"}
CELL = 28 * 28
CLIP = str(VideoAsset("baby_reading").path)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with build_llm(make_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl")), **ROOM) as parts:
        yield parts


def features(model: Parts, *parts: dict[str, Any]) -> list[Any]:
    """What is made of the items of a message."""
    messages = parse_messages([{"role": "user", "content": list(parts)}])
    prepared = model.run(model.processor.prepare(ChatPrompt(conversation=messages)))
    return [item.features for item in prepared.items]


def sizes(model: Parts, *parts: dict[str, Any]) -> list[tuple[int, int]]:
    """Height and width of each image or frame as the model sees it."""
    found = [made.arrays["pixels"].shape for made in features(model, *parts)]
    return [(int(shape[-3]), int(shape[-2])) for shape in found]


def num_frames(model: Parts, part: dict[str, Any]) -> int:
    (found,) = features(model, part)
    return int(found.arrays["pixels"].shape[0])


def shown(picture: Image.Image, **more: Any) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": picture, **more}


def clip(**more: Any) -> dict[str, Any]:
    return {"type": "video", "video": CLIP, **more}


OF_IMAGES = [
    {"max_pixels": 3136},
    {"max_pixels": 20 * CELL},
    {"min_pixels": 300 * CELL},
    {"min_pixels": 40 * CELL, "max_pixels": 50 * CELL},
]


@pytest.mark.parametrize("options", OF_IMAGES)
def test_sizes_of_images_equal_those_of_the_utilities(qwen: Parts, options: dict[str, int]) -> None:
    source = ImageAsset("cherry_blossom").pil_image.convert("RGB").resize((300, 200))
    part = {"type": "image", "image": source, **options}
    ((expected,), _) = qwen_vl_utils().process_vision_info([{"role": "user", "content": [part]}])
    other = picture(112, 56)
    found = sizes(qwen, shown(other), shown(source, **options), shown(other))
    assert found == [(56, 112), (expected.height, expected.width), (56, 112)]


OF_VIDEOS: list[dict[str, Any]] = [
    {"nframes": 8, "max_pixels": 8 * CELL, "min_pixels": 4 * CELL},
    {"nframes": 6, "total_pixels": 6 * 20 * CELL, "min_pixels": 4 * CELL},
    {"nframes": 16, "min_pixels": 16 * CELL, "max_pixels": 90 * CELL, "total_pixels": 20480 * CELL},
    {"fps": 2, "max_pixels": 20 * CELL, "min_pixels": 4 * CELL},
    {"fps": 5, "max_frames": 10, "max_pixels": 6 * CELL, "min_pixels": 4 * CELL},
    {"fps": 0.5, "min_frames": 6, "max_pixels": 6 * CELL, "min_pixels": 4 * CELL},
]


@pytest.mark.parametrize("options", OF_VIDEOS)
def test_frames_and_sizes_of_videos_equal_those_of_the_utilities(
    qwen: Parts, options: dict[str, Any]
) -> None:
    content = [{"type": "video", "video": CLIP, **options}]
    _, ((expected),) = qwen_vl_utils().process_vision_info([{"role": "user", "content": content}])
    ((height, width),) = sizes(qwen, clip(**options))
    assert (num_frames(qwen, clip(**options)), height, width) == (
        expected.shape[0],
        *expected.shape[2:],
    )


def test_pixels_of_a_frame_are_a_frames_for_every_family(tmp_path: Any) -> None:
    """Qwen3-VL's own processor counts those of all frames together.

    A part means each, as in its cookbook.
    """
    loaded_config = loader.read_config(str(make_qwen3_vl(tmp_path)))
    rules = resolve(loaded_config.config).build_processor(loaded_config).videos  # type: ignore[union-attr]
    published = dataclasses.replace(rules, pixels=PixelRange(4096, 25165824), max_tokens=None)
    utils, cell = qwen_vl_utils(), 32 * 32
    height, width = VideoAsset("baby_reading", num_frames=1).np_ndarrays.shape[1:3]
    for options in (
        {"max_pixels": 12 * cell, "min_pixels": 4 * cell},
        {"total_pixels": 8 * 5 * cell, "min_pixels": 4 * cell},
        {"total_pixels": 20480 * cell, "max_pixels": 256 * cell, "min_pixels": 64 * cell},
    ):
        part = {"video": CLIP, "nframes": 8, **options}
        expected = utils.fetch_video(part, image_patch_size=16)
        own, _ = by_use("video", options, "part")
        assert published.target(8, height, width, own) == tuple(expected.shape[2:])


def test_a_rate_for_each_video(qwen: Parts) -> None:
    """``fps`` of the utilities' ``video_kwargs`` is a list, one rate per video."""
    frames = VideoAsset("baby_reading", num_frames=4).np_ndarrays[:, :56, :56]
    prompt = {
        "prompt": "<|vision_start|><|video_pad|><|vision_end|>" * 2,
        "multi_modal_data": {"video": [frames, frames]},
        "mm_processor_kwargs": {"fps": [2.0, 4.0], "do_sample_frames": False},
    }
    prepared = qwen.prepare(prompt)
    assert [i.features.meta["second_per_grid"] for i in prepared.items] == [1.0, 0.5]


UNKNOWN: list[tuple[dict[str, Any], str, str]] = [
    ({"max_pixel": 3136}, "max_pixel", "Did you mean 'max_pixels'"),
    ({"nframes": 4}, "nframes", "its options are min_pixels, max_pixels."),
    ({"foo": 1}, "foo", "Unknown key 'foo' in the part"),
]


@pytest.mark.parametrize(("more", "key", "words"), UNKNOWN)
def test_unknown_keys_are_refused(
    anywhere: Service | Offline, more: dict[str, Any], key: str, words: str
) -> None:
    answer = anywhere.ask(image(picture_url(), **more), text("What is it?"))
    answer.is_refusal(400, "invalid_request", f"messages[0].content[0].{key}")
    assert words in answer.error["message"]


def test_options_act_where_they_stand(anywhere: Service | Offline) -> None:
    """In the part or in its payload; null says nothing; keys for other servers are passed over."""

    def num_tokens(part: dict[str, Any]) -> int:
        if isinstance(anywhere, Service):
            return int(anywhere.ask(part, text("?")).body["usage"]["prompt_tokens"])
        return len(anywhere.ask(part, text("?")).body["prompt_token_ids"])

    url = picture_url()
    usual, small = num_tokens(image(url)), num_tokens(image(url, max_pixels=3136))
    assert usual - small == 20 - 4
    inner = {"type": "image_url", "image_url": {"url": url, "max_pixels": 3136, "detail": "auto"}}
    assert num_tokens(inner) == small
    harmless = {"cache_control": {"type": "ephemeral"}, "max_pixels": None, "uuid": None}
    assert num_tokens(image(url, **harmless)) == usual


WRONG = [{"max_pixels": 0}, {"max_pixels": "many"}, {"min_pixels": 1 << 40}]


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_the_option_that_is_too_large_is_named(anywhere: Service | Offline, name: str) -> None:
    answer = anywhere.ask(image(picture_url(), **{name: 1 << 40}), text("?"))
    assert answer.error["message"].startswith(f"{name} may be at most")


def test_what_was_sent_is_not_sent_back_whole(anywhere: Service | Offline) -> None:
    answer = anywhere.ask(image(picture_url(), max_pixels="9" * 100_000), text("?"))
    assert len(answer.error["message"]) < 200


@pytest.mark.parametrize("options", WRONG)
def test_wrong_values_are_refused_at_their_part(
    anywhere: Service | Offline, options: dict[str, Any]
) -> None:
    good = image(picture_url())
    answer = anywhere.ask(good, image(picture_url(), **options), text("?"))
    answer.is_refusal(400, "invalid_request", "messages[0].content[1].image_url")
    assert "_pixels" in answer.error["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_pixels": -1}, "total_pixels must be a number"),
        ({"max_pixels": -1}, "max_pixels must be an integer"),
        ({"fps": 0}, "fps must be a number above 0"),
        ({"nframes": "x"}, r"^nframes \(or num_frames\) must be an integer"),
        ({"nframes": 4, "num_frames": 4}, "two names of one option"),
        ({"resized_height": 280}, "Unknown key 'resized_height'"),
    ],
)
def test_wrong_options_of_videos(qwen: Parts, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        features(qwen, clip(**options))
    assert str(caught.value.param).startswith("messages[0].content[0]")


def test_a_model_without_such_sizes_says_so(tmp_path: Any) -> None:
    make_llava(tmp_path)
    with build_llm(tmp_path, **ROOM) as parts, pytest.raises(RequestError) as caught:
        features(parts, shown(picture(), max_pixels=3136))
    assert "has no option 'max_pixels'" in caught.value.message
    assert caught.value.param == "messages[0].content[0].image_pil"
