"""LLaVA-OneVision's processor: images, videos, embeddings, options, and refusals."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sensorium.errors import (
    ConfigError,
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaTooLargeError,
)
from sensorium.models import loader
from sensorium.models.families.llava_onevision import tiles
from sensorium.models.families.llava_onevision.config import read_pinpoints
from sensorium.models.families.llava_onevision.processing import LlavaOnevisionProcessor
from sensorium.models.families.llava_onevision.tiles import Grids, pad_and_resize
from sensorium.models.media import pixels
from sensorium.models.registry import resolve
from sensorium.multimodal.processor import FrameChoice, VideoFacts
from tests.checkpoints import make_llava_onevision
from tests.checkpoints.llava_onevision import TILE
from tests.models.harness import image_processor, picture
from tests.models.onevision import clip

PUBLISHED = Grids(tile=384, side=27, pinpoints=read_pinpoints(None, 384), most=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return processor_of(folder)


def processor_of(folder: Path, **overrides: Any) -> Any:
    loaded = loader.read_config(str(folder), hf_overrides=overrides)
    return resolve(loaded.config).build_processor(loaded)


def change(folder: Path, **values: Any) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sizes(num: int, longest: int) -> list[tuple[int, int]]:
    """Random heights and widths, spread evenly in the logarithm."""
    edges = np.exp(np.random.default_rng(0).uniform(0, np.log(longest), (num, 2)))
    return [(int(height), int(width)) for height, width in edges]


@pytest.mark.parametrize("variant", [{}, {"image_mean": [0.48, 0.2, 0.4], "resample": 2}])
def test_pixels_equal_reference(tmp_path: Path, variant: dict[str, Any]) -> None:
    folder = make_llava_onevision(tmp_path)
    change(folder, **variant)
    ours, theirs = processor_of(folder), image_processor(folder)
    mean, std = np.array(theirs.image_mean), np.array(theirs.image_std)
    for height, width in [*sizes(50, 600), (1, 1), (44, 44), (45, 43), (3, 800)]:
        image = picture(height, width, seed=height + width)
        for num_items, images in ((1, [image]), (2, [[image, image]])):
            expected = theirs(images, return_tensors="np", input_data_format="channels_last")
            features = ours.process("image", image, {}, num_items)
            shape, pixels = features.meta["original_size"], features.arrays["pixels"]
            assert shape == tuple(expected["image_sizes"][0].tolist())
            found = (pixels / 255 - mean) / std
            theirs_last = expected["pixel_values"][0].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(found, theirs_last, atol=1e-5, err_msg=f"{height, width}")


def test_frames_are_squeezed(ours: Any) -> None:
    own = clip(4, 33, 70)
    features = ours.process("video", own, {})
    pixels = features.arrays["pixels"]
    assert pixels.dtype == np.uint8
    for frame, found in zip(own.frames, pixels, strict=True):
        expected = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, np.array(expected))
    assert features.num_embeds == 4 * 2 * 2 + 1


@pytest.mark.parametrize(("height", "width"), [(2, 1500), (1500, 2), (400, 1499), (1499, 400)])
def test_padding_in_strips(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CANVAS_PIXELS", 50_000)
    image, background = picture(height, width, 0), (127, 3, 250)
    edge = max(height, width)
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = background
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = image
    expected = np.array(Image.fromarray(square).resize((56, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pad_and_resize(image, 56, background, 3), expected)


@pytest.mark.parametrize("shape", [(1, 100_000, 3), (100_000, 1, 3), (40_000, 60, 3)])
def test_very_long_images(
    ours: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded to a square these would have up to ten thousand million pixels."""
    monkeypatch.setattr(tiles, "MAX_SQUARE", 1024)
    image = np.full(shape, 200, np.uint8)
    assert ours.process("image", image, {}, 2).arrays["pixels"].shape == (1, TILE, TILE, 3)
    assert ours.process("image", image, {}, 1).arrays["pixels"][0].min() == 200


def test_shrinking_first_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(300, 1700, 0)
    exact = pad_and_resize(image, 56, (127, 127, 127), 3).astype(int)
    monkeypatch.setattr(tiles, "MAX_SQUARE", 1024)
    difference = np.abs(pad_and_resize(image, 56, (127, 127, 127), 3) - exact)
    assert 0 < difference.max() <= 12
    assert difference.mean() < 1


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "num_embeds"),
    [
        (384, 384, 1485),
        (200, 200, 1485),
        (640, 480, 2929),
        (480, 640, 2943),
        (1000, 500, 4009),
        (1024, 1024, 7371),
        (1920, 1080, 7269),
        (2304, 2304, 7371),
        (3000, 4000, 7332),
    ],
)
def test_published_lengths(width: int, height: int, num_embeds: int) -> None:
    assert PUBLISHED.num_embeds(height, width) == num_embeds
    assert PUBLISHED.num_several == 730
    assert PUBLISHED.pooled_side == 14


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000))
def test_lengths_equal_reference(height: int, width: int) -> None:
    from types import SimpleNamespace

    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor as Theirs,
    )

    theirs = Theirs.__new__(Theirs)  # its constructor needs torchvision; its counting does not
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 729, "anyres_max_9"
    grids = [list(pair) for pair in PUBLISHED.pinpoints]
    theirs.image_processor = SimpleNamespace(image_grid_pinpoints=grids)
    expected = theirs._get_number_of_features(height, width, 384, 384)
    assert PUBLISHED.num_embeds(height, width) == expected


def test_scaling_down_leaves_a_row() -> None:
    """Few features a tile, and a long line of tiles: a row is never divided into nothing."""
    grids = Grids(tile=42, side=3, pinpoints=((42, 42 * 8),), most=1)
    layout = grids.layout(1, 1000)
    assert (layout.height, layout.width) == (1, 24)
    assert layout.scaled == (1, 14)
    assert grids.num_embeds(1, 1000) == 9 + 15


def test_placeholders(ours: Any) -> None:
    alone = ours.process("image", picture(44, 44, 0), {}, 1)
    (image_id,) = ours.placeholder("image")
    assert ours.placeholder_text("image") == "<image>"
    assert ours.replacement(alone).token_ids == (image_id,) * (9 + 3 * 4)
    video = ours.process("video", clip(3, 20, 20), {}, 1)
    assert ours.placeholder_text("video") == "<video>"
    assert ours.replacement(video).token_ids == ours.placeholder("video") * 13
    assert ours.placeholder("video") != ours.placeholder("image")
    assert ours.positions([1, 2], []) is None


def test_identity(ours: Any) -> None:
    """One image alone differs from one among several.

    Two differ in nothing from three, nor clips from clips.
    """
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert ours.identity("image", {}, 1) != ours.identity("image", {}, 2)
    assert ours.identity("image", {}, 2) == ours.identity("image", {}, 3)
    assert ours.identity("video", {}, 1) == ours.identity("video", {}, 2)
    assert ours.identity("image", {}) != dataclasses.replace(ours, resample=2).identity("image", {})


def test_small_frames_that_would_be_gigabytes_are_refused(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "MAX_VIDEO_PIXELS", 3 * TILE**2)
    ours.process("video", clip(3, 2, 2), {})
    with pytest.raises(MediaTooLargeError, match="4 frames"):
        ours.process("video", clip(4, 2, 2), {})


def test_frames_are_chosen_evenly(ours: Any) -> None:
    choose = pickle.loads(pickle.dumps(ours.decoding("video", {})))
    facts = VideoFacts(64, 16.0)
    assert choose(facts, FrameChoice()).tolist() == list(range(0, 64, 2))
    assert choose(facts, FrameChoice(num_frames=4)).tolist() == [0, 16, 32, 48]
    assert choose(facts, FrameChoice(fps=2)).tolist() == list(range(0, 64, 8))
    assert len(choose(facts, FrameChoice(at_most=5))) == 5
    asked = ours.decoding("video", {"num_frames": 2})
    assert asked(facts, FrameChoice()).tolist() == [0, 32]
    assert len(ours.decoding("video", {"num_frames": -1})(facts, FrameChoice())) == 64
    assert ours.decoding("image", {}) is None


# --- embeddings -----------------------------------------------------------------------------------

PARAM = "multi_modal_data.image"


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_embeddings_of_images(ours: Any) -> None:
    """Any length; with sizes, the length that such an image has alone or among several."""
    parts = [values(21, 64), values(10, 64)]
    square = [[44, 44], [500, 3]]
    forms: list[Any] = [
        parts,
        {"image_embeds": parts},
        {"image_embeds": parts, "image_sizes": torch.tensor(square)},
        {"image_embeds": parts, "image_sizes": square},
    ]
    for form in forms:
        found = ours.embeddings("image", form, PARAM)
        assert [f.num_embeds for f in found] == [21, 10]
        assert all(f.precomputed and f.modality == "image" for f in found)
        np.testing.assert_array_equal(found[1].arrays["embeds"], parts[1].numpy())
    assert len(ours.embeddings("image", values(2, 10, 64), PARAM)) == 2


def test_embeddings_of_videos(ours: Any) -> None:
    for form in (values(2, 9, 64), [values(9, 64)] * 2, {"video_embeds": values(2, 9, 64)}):
        found = ours.embeddings("video", form, PARAM)
        assert [(f.num_embeds, f.modality) for f in found] == [(9, "video")] * 2


WRONG: dict[str, tuple[str, Any, str, str]] = {
    "hidden size": ("image", values(1, 21, 63), r"hidden size 64 .* \(21, 63\)", f"{PARAM}[0]"),
    "unknown name": ("image", {"embeds": values(1, 21, 64)}, "got one with", PARAM),
    "no embeddings": ("image", {"image_sizes": [[1, 2]]}, "got one with", PARAM),
    "grid": (
        "video",
        {"video_embeds": values(1, 9, 64), "image_sizes": [[1, 2]]},
        "one with",
        PARAM,
    ),
    "length": (
        "image",
        {"image_embeds": [values(10, 64), values(12, 64)], "image_sizes": [[44, 44]] * 2},
        "44 has 21 embeddings in this model, or 10 among several images, got 12",
        f"{PARAM}.image_embeds[1]",
    ),
    "number of sizes": (
        "image",
        {"image_embeds": values(2, 10, 64), "image_sizes": [[44, 44]]},
        "1 entry for the embeddings of 2 images",
        f"{PARAM}.image_sizes",
    ),
    "no size": (
        "image",
        {"image_embeds": values(1, 10, 64), "image_sizes": [[0, 44]]},
        r"positive .* got \(0, 44\)",
        f"{PARAM}.image_sizes[0]",
    ),
    "sizes": (
        "image",
        {"image_embeds": values(1, 10, 64), "image_sizes": [[1.5, 44]]},
        r"integers of shape \(items, 2\)",
        f"{PARAM}.image_sizes",
    ),
    "nothing": ("image", values(2, 0, 64), r"at least one .* \(0, 64\)", f"{PARAM}[0]"),
    "frames": ("video", values(1, 8, 64), "4 embeddings a frame and one at the end", f"{PARAM}[0]"),
    "no frames": ("video", values(1, 1, 64), "4 embeddings a frame", f"{PARAM}[0]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_embeddings(ours: Any, name: str) -> None:
    modality, source, pattern, place = WRONG[name]
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        ours.embeddings(modality, source, PARAM)
    assert caught.value.param == place


# --- configuration and options --------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": ({"vision_feature_select_strategy": "default"}, "no class token"),
    "layer": ({"vision_feature_layer": 3}, "outside a tower of 2 layers"),
    "aspect": ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio must be 'anyres_max_'"),
    "pinpoints": ({"image_grid_pinpoints": [[44, 50]]}, "multiples of .* 44, got \\[44, 50\\]"),
    "no pinpoints": ({"image_grid_pinpoints": []}, "list of pairs"),
    "pinpoints as text": ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "list of pairs"),
    "tower": ({"vision_config": {"model_type": "clip_vision_model"}}, "only 'siglip_vision_model'"),
    "token": ({"video_token_index": 10**6}, "video_token_index 1000000 is outside"),
    "default pinpoints": ({"image_grid_pinpoints": None}, r"got \(384, 384\)"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_impossible_configurations(folder: Path, name: str) -> None:
    overrides, pattern = BAD_CONFIGS[name]
    with pytest.raises(ConfigError, match=pattern):
        processor_of(folder, **overrides)


@pytest.mark.parametrize(
    "values",
    [
        {"size": {"height": 56, "width": 56}},
        {"crop_size": 56},
        {"do_resize": False},
        {"image_grid_pinpoints": [[44, 44]]},
        {"image_mean": [0.5]},
        {"image_mean": "half"},
    ],
)
def test_preprocessors_that_do_not_fit(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = make_llava_onevision(tmp_path)
    change(folder, **values)
    with pytest.raises(ConfigError, match=next(iter(values))):
        processor_of(folder)


@pytest.mark.parametrize(
    "options",
    [
        *({"frames": 3}, {"num_frames": 0}, {"num_frames": True}, {"num_frames": "8"}),
        *({"fps": 0}, {"fps": float("nan")}, {"fps": 1e308}, {"fps": 10**400}),
    ],
)
def test_wrong_options(ours: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ours.check_options(options)
    assert caught.value.param == f"mm_processor_kwargs.{next(iter(options))}"
    ours.check_options({"num_frames": 8})
    ours.check_options({"fps": 1.5})


def test_messages_are_short(ours: Any) -> None:
    """Whatever the request holds, it is not sent back in full."""
    sizes = {"image_embeds": values(1, 10, 64), "image_sizes": [[44, 44]] * 5000}
    with pytest.raises(InvalidEmbeddingsError) as many:
        ours.embeddings("image", sizes, PARAM)
    with pytest.raises(InvalidRequestError) as long:
        ours.check_options({"x" * 5000: 1})
    assert len(many.value.message) < 200
    assert len(long.value.message) < 200
    assert len(long.value.param or "") < 200


def test_images_must_be_arrays(ours: Any) -> None:
    with pytest.raises(InvalidRequestError, match="image must be"):
        ours.process("image", np.zeros((5, 5), np.uint8), {})


def test_the_smallest_processor_is_a_value() -> None:
    grids = Grids(28, 2, ((28, 28),), 1)
    ours = LlavaOnevisionProcessor(1, 2, 8, grids, (0, 0, 0), 3)
    assert ours.process("image", picture(9, 9, 0), {}).num_embeds == 4 + 2 * 3
    assert hash(ours) == hash(dataclasses.replace(ours))
