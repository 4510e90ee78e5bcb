"""Pixels that come as floating-point numbers, as qwen-vl-utils and other preparing code hand
them over: 0 to 255 where the published processors take them so, 0 to 1 only where they can be
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.assets.video import VideoAsset
from sensorium.config import MediaConfig
from sensorium.errors import InvalidEmbeddingsError, InvalidRequestError
from sensorium.multimodal.decode import image
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.parse.messages import refs_from_data
from tests.checkpoints import make_qwen2_5_vl
from tests.vision_info import qwen_vl_utils

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>describe this video.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 28, 56, 3), dtype=np.uint8)
DARK = np.random.default_rng(1).integers(0, 2, (4, 28, 56, 3), dtype=np.uint8)
"""Frames of 0 and 1 of 255."""


def seen(source: Any) -> np.ndarray:
    """The frames that a model sees of a video."""
    (ref,) = refs_from_data({"video": source})
    return video.decode_object(ref.source, VideoOptions(), MediaConfig(), None).frames


def looked_at(source: Any) -> np.ndarray:
    """The picture that a model sees."""
    (ref,) = refs_from_data({"image": source})
    return image.decode_object(ref.source, image.ImageOptions(), max_pixels=1 << 20)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))
    with LLM(str(folder), num_kv_blocks=400, max_model_len=2048) as llm:
        yield llm


def asked(llm: LLM, clip: Any, **more: Any) -> tuple[list[int], list[int]]:
    prompt = {"prompt": PROMPT, "multi_modal_data": {"video": clip}, **more}
    (out,) = llm.generate([prompt], GREEDY)
    return list(out.prompt_token_ids or ()), list(out.outputs[0].token_ids)


def messages(**options: Any) -> list[dict[str, Any]]:
    """The guide's messages, of a file in place of an address."""
    part = {"type": "video", "video": str(VideoAsset("baby_reading").path), "nframes": 4, **options}
    content = [{"type": "text", "text": "describe this video."}, part]
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": content},
    ]


SMALL = {"total_pixels": 20480 * 28 * 28, "min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}


def test_the_guides_video_example(llm: LLM) -> None:
    """qwen-vl-utils gives float32 of 0 to 255; the answer is that to the same frames as bytes."""
    pictures, videos = qwen_vl_utils().process_vision_info(messages(**SMALL))
    (frames,) = videos
    assert pictures is None
    assert (frames.dtype, frames.shape[:2]) == (torch.float32, (4, 3))
    assert frames.max() > 1
    np.testing.assert_array_equal(seen(frames), frames.byte().permute(0, 2, 3, 1).numpy())
    assert asked(llm, videos) == asked(llm, frames.byte())


def test_metadata_of_the_utilities(llm: LLM) -> None:
    """``return_video_metadata=True`` gives pairs of frames and metadata.

    Of a file with indices as a tensor.
    """
    _, videos, options = qwen_vl_utils().process_vision_info(
        messages(**SMALL), return_video_kwargs=True, return_video_metadata=True
    )
    ((frames, metadata),) = videos
    assert isinstance(metadata["frames_indices"], torch.Tensor)
    same = {**metadata, "frames_indices": metadata["frames_indices"].tolist()}
    found = asked(llm, videos, mm_processor_kwargs=options)
    assert found == asked(llm, [(frames.byte(), same)], mm_processor_kwargs=options)


def test_listed_frames_through_the_utilities(llm: LLM) -> None:
    """Of a list of pictures the utilities make a number of source frames that is a float."""
    clip = [Image.fromarray(frame) for frame in FRAMES]
    rates = {"sample_fps": 3.0, "raw_fps": 25.0}
    content = [{"type": "video", "video": clip, **rates, **SMALL}]
    _, videos, options = qwen_vl_utils().process_vision_info(
        [{"role": "user", "content": content}],
        return_video_kwargs=True,
        return_video_metadata=True,
    )
    ((frames, metadata),) = videos
    assert metadata["total_num_frames"] == pytest.approx(33.3333, abs=1e-3)
    whole = {**metadata, "total_num_frames": 33}
    found = asked(llm, videos, mm_processor_kwargs=options)
    assert found == asked(llm, [(frames.byte(), whole)], mm_processor_kwargs=options)


FLOATS: dict[str, Any] = {
    "tensor of 0 to 255": torch.from_numpy(FRAMES).permute(0, 3, 1, 2).float(),
    "tensor of 0 to 1": torch.from_numpy(FRAMES).permute(0, 3, 1, 2).float() / 255,
    "array of 0 to 255": FRAMES.astype(np.float32),
    "array of 0 to 1": FRAMES.astype(np.float64) / 255,
    "frames of 0 to 255": list(FRAMES.astype(np.float16)),
    "frames of 0 to 1": list(FRAMES.astype(np.float32) / 255),
    "floats among bytes": [FRAMES[0], *FRAMES[1:].astype(np.float32)],
    "between whole numbers": FRAMES.clip(1, 254) + np.float32(0.25),
}


@pytest.mark.parametrize("form", sorted(FLOATS))
def test_videos_of_floats(form: str) -> None:
    expected = FRAMES.clip(1, 254) if form == "between whole numbers" else FRAMES
    np.testing.assert_array_equal(seen(FLOATS[form]), expected)


@pytest.mark.parametrize("form", [f for f in sorted(FLOATS) if "bytes" not in f])
def test_images_of_floats(form: str) -> None:
    expected = FRAMES.clip(1, 254) if form == "between whole numbers" else FRAMES
    np.testing.assert_array_equal(looked_at(FLOATS[form][1]), expected[1])


def test_a_dark_frame_is_not_brightened() -> None:
    """One scale for all frames: those of 0 and 1 stay dark beside one of 255, and in 0 to 1
    beside a fraction.
    """
    clip = np.concatenate((DARK, FRAMES)).astype(np.float32)
    np.testing.assert_array_equal(seen(clip)[:4], DARK)
    np.testing.assert_array_equal(seen(list(clip.clip(0, 254) + np.float32(0.25)))[:4], DARK)
    black_and_white = np.concatenate((DARK, FRAMES / np.float32(255)))
    np.testing.assert_array_equal(seen(black_and_white)[:4], DARK * 255)
    np.testing.assert_array_equal(seen(DARK.astype(np.float32)), DARK)  # nothing says 0 to 1
    np.testing.assert_array_equal(looked_at(DARK[0].astype(np.float32)), DARK[0])


@pytest.mark.parametrize(
    ("lowest", "highest", "hint"),
    [(0.0, 255.5, ""), (-0.5, 1.0, "undo the normalisation"), (0.0, float("nan"), "")],
)
def test_values_that_are_no_pixels(lowest: float, highest: float, hint: str) -> None:
    wrong = FRAMES.astype(np.float32) / 256
    wrong[1, 2, 3, 0], wrong[2, 0, 0, 1] = lowest, highest
    for source in (wrong, torch.from_numpy(wrong).permute(0, 3, 1, 2), list(wrong)):
        with pytest.raises(
            InvalidRequestError, match=rf"video must have values .* 0 to 255.*{hint}"
        ):
            seen(source)
    alone = wrong[1] if lowest < 0 else wrong[2]
    with pytest.raises(InvalidRequestError, match=rf"image must have values .* 0 to 255.*{hint}"):
        looked_at(alone)


def test_a_picture_that_was_read_as_embeddings_is_told_how_to_be_one(tmp_path: Any) -> None:
    """Where embeddings are enabled, nothing but its place tells a floating-point tensor (3, H,
    W) from them.
    """
    make_qwen2_5_vl(tmp_path)
    pixels = torch.rand(3, 56, 56) * 255
    prompt = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>"}
    with LLM(str(tmp_path), num_kv_blocks=100, enable_mm_embeds=True) as llm:
        with pytest.raises(InvalidEmbeddingsError, match="put the tensor of an image into a list"):
            llm.generate({**prompt, "multi_modal_data": {"image": pixels}}, GREEDY)
        (listed,) = llm.generate({**prompt, "multi_modal_data": {"image": [pixels]}}, GREEDY)
        bytes_ = pixels.round().to(torch.uint8)
        (whole,) = llm.generate({**prompt, "multi_modal_data": {"image": bytes_}}, GREEDY)
    assert listed.outputs[0].token_ids == whole.outputs[0].token_ids
