"""Image processors equal the reference's, with and without options.

Extreme sizes get an answer or an error.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.models import loader
from sensorium.models.families.llava.processing import Edges, LlavaProcessor, resize_and_crop
from sensorium.models.families.qwen2_vl.config import VisionConfig
from sensorium.models.families.qwen2_vl.processing import Qwen2VLProcessor
from sensorium.models.families.qwen2_vl.sizes import PixelRange, read_pixel_range, target_size
from sensorium.models.families.qwen2_vl.video import read_video_rules
from sensorium.models.families.qwen2_vl.vision import VisionTower
from sensorium.models.interface import BuildOptions
from sensorium.models.media.pixels import read_normalization
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Features, MediaItem
from sensorium.multimodal.processor import PlacedItem
from tests.checkpoints import make_llava, make_qwen2_5_vl, make_qwen2_vl
from tests.models.harness import Reference, image_processor, picture

TOLERANCE = 1e-5


def processor_of(folder: Path, **overrides: Any) -> Any:
    loaded = loader.read_config(str(folder), hf_overrides=overrides)
    return resolve(loaded.config).build_processor(loaded)


def sizes(num: int, longest: int, seed: int = 0) -> list[tuple[int, int]]:
    """Random heights and widths, spread evenly in the logarithm."""
    rng = np.random.default_rng(seed)
    edges = np.exp(rng.uniform(0, np.log(longest), (num, 2)))
    return [(int(h), int(w)) for h, w in edges if max(h, w) / min(h, w) < 30]


def normalized(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) float32."""
    values = read_normalization({})
    scaled = pixels.astype(np.float32) * values.scale - np.array(values.mean, np.float32)
    return (scaled / np.array(values.std, np.float32)).transpose(2, 0, 1)


LLAVA_PREPROCESSORS: dict[str, dict[str, Any]] = {
    "published": {},
    "integers": {"size": 56, "crop_size": 56},
    "smaller than the crop": {"size": {"shortest_edge": 40}},
    "larger than the crop": {"size": {"shortest_edge": 71}},
    "both edges": {"size": {"height": 50, "width": 90}, "resample": 2},
    "no resize": {"do_resize": False},
}


@pytest.mark.parametrize("name", sorted(LLAVA_PREPROCESSORS))
def test_llava_equals_reference(tmp_path: Path, name: str) -> None:
    folder = make_llava(tmp_path)
    change(folder, LLAVA_PREPROCESSORS[name])
    ours, theirs = processor_of(folder), image_processor(folder)
    for height, width in [
        *sizes(60 if name == "published" else 20, 700),
        (1, 1),
        (56, 56),
        (57, 55),
        (9, 300),
    ]:
        image = picture(height, width, seed=height + width)
        expected = theirs(image, return_tensors="np", input_data_format="channels_last")
        pixels = ours.process("image", image, {}).arrays["pixels"]
        np.testing.assert_allclose(
            normalized(pixels),
            expected["pixel_values"][0],
            atol=TOLERANCE,
            err_msg=f"{height, width}",
        )


def change(folder: Path, values: dict[str, Any]) -> None:
    import json

    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


QWEN_PREPROCESSORS: dict[str, dict[str, Any]] = {
    "published": {"min_pixels": 3136, "max_pixels": 12845056},
    "narrow": {"min_pixels": 20000, "max_pixels": 30000},
    "edges": {
        "min_pixels": None,
        "max_pixels": None,
        "size": {"shortest_edge": 3136, "longest_edge": 100352},
    },
    "defaults": {"min_pixels": None, "max_pixels": None},
}


@pytest.mark.parametrize("name", sorted(QWEN_PREPROCESSORS))
def test_qwen2_vl_equals_reference(tmp_path: Path, name: str) -> None:
    folder = make_qwen2_vl(tmp_path)
    change(folder, QWEN_PREPROCESSORS[name])
    ours, theirs = processor_of(folder), image_processor(folder)
    tower = bare_tower()
    for height, width in [
        *sizes(60 if name == "published" else 20, 900),
        (1, 1),
        (1, 200),
        (28, 28),
        (42, 42),
    ]:
        image = picture(height, width, seed=height + width)
        expected = theirs(image, return_tensors="np", input_data_format="channels_last")
        features = ours.process("image", image, {})
        rows, grid = tower.patches(torch.from_numpy(features.arrays["pixels"]))
        assert [grid] == [tuple(row) for row in expected["image_grid_thw"].tolist()]
        assert features.meta["grid"] == grid
        assert features.num_embeds == len(rows) // 4
        np.testing.assert_allclose(rows.numpy(), expected["pixel_values"], atol=TOLERANCE)


def bare_tower() -> VisionTower:
    config = VisionConfig(0, 32, 128, 64, 2, 14, 2, 2, "quick_gelu")
    options = BuildOptions(torch.float32, torch.device("cpu"))
    return VisionTower(config, read_normalization({}), options)


@pytest.mark.parametrize(
    ("width", "height", "tall", "wide", "num_embeds"),
    [
        (28, 28, 56, 56, 4),
        (500, 300, 308, 504, 198),
        (640, 480, 476, 644, 391),
        (1920, 1080, 1092, 1932, 2691),
        (6000, 4000, 2912, 4368, 16224),
    ],
)
def test_published_qwen2_vl_sizes(
    width: int, height: int, tall: int, wide: int, num_embeds: int
) -> None:
    limits = PixelRange(3136, 12845056)
    assert target_size(height, width, 28, limits) == (tall, wide)
    assert tall * wide // 28**2 == num_embeds


@pytest.mark.parametrize(
    ("width", "height", "num_embeds"), [(28, 28, 1), (1920, 1080, 2479), (3000, 4000, 2494)]
)
def test_published_retrieval_sizes(width: int, height: int, num_embeds: int) -> None:
    tall, wide = target_size(height, width, 28, PixelRange(784, 2560 * 784))
    assert tall * wide // 28**2 == num_embeds


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.integers(1, 1 << 24),
    st.integers(0, 1 << 24),
)
def test_target_size_equals_reference(height: int, width: int, least: int, more: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = PixelRange(least, least + more)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InvalidRequestError, match=f"{width} x {height}"):
            target_size(height, width, 28, limits)
        return
    expected = smart_resize(height, width, 28, limits.least, limits.most)
    assert target_size(height, width, 28, limits) == tuple(expected)


@pytest.mark.parametrize(("height", "width"), [(1, 10000), (10000, 1), (2, 60000), (7, 1000)])
def test_llava_takes_any_aspect(height: int, width: int) -> None:
    """Resized whole, these would be millions of pixels wide; the result equals that."""
    image = picture(height, width, seed=1)
    ours = LlavaProcessor(9, 16, 64, 56, Edges(56, 56, True), 3)
    pixels = ours.process("image", image, {}).arrays["pixels"]
    assert pixels.shape == (56, 56, 3)
    if max(height, width) > 1000:
        return
    from PIL import Image

    target = Edges(56, 56, True).target(height, width)
    whole = np.array(Image.fromarray(image).resize(target[::-1], Image.Resampling.BICUBIC))
    left = (whole.shape[1] - 56) // 2
    assert np.abs(whole[:, left : left + 56].astype(int) - pixels).max() <= 1
    assert target[0] * target[1] > 64 * 56 * 56, "the case must take the other way"


def test_resize_and_crop_pads_what_is_too_narrow() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    pixels = resize_and_crop(image, (3, 3000), 6, 3)
    assert pixels.shape == (6, 6, 3)
    assert (pixels[2:5] == 200).all()
    assert not pixels[:2].any()
    assert not pixels[5:].any()


def test_qwen2_vl_refuses_extreme_aspects(tmp_path: Path) -> None:
    ours = processor_of(make_qwen2_vl(tmp_path))
    with pytest.raises(InvalidRequestError, match=r"10000 x 1 .* 10000;.* 200"):
        ours.process("image", picture(1, 10000, 0), {})
    assert ours.process("image", picture(1, 200, 0), {}).num_embeds > 0


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 5), (5, 5, 4)])
def test_empty_or_misshapen_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for build in (make_llava, make_qwen2_vl):
        ours = processor_of(build(tmp_path))
        with pytest.raises(InvalidRequestError, match="image must be"):
            ours.process("image", np.zeros(shape, np.uint8), {})


def test_qwen2_vl_options_equal_reference(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    ours, theirs = processor_of(folder), image_processor(folder)
    image = picture(300, 400, 0)
    for options in (
        {"max_pixels": 20000},
        {"min_pixels": 100000, "max_pixels": 200000},
        {"size": {"shortest_edge": 784, "longest_edge": 50000}},
    ):
        ours.check_options(options)
        size = options.get("size") or {
            "shortest_edge": options.get("min_pixels", 3136),
            "longest_edge": options.get("max_pixels"),
        }
        expected = theirs(image, size=size, return_tensors="np", input_data_format="channels_last")
        grid = ours.process("image", image, options).meta["grid"]
        assert list(grid) == expected["image_grid_thw"][0].tolist()


def test_llava_size_option(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)
    ours, theirs = processor_of(folder), image_processor(folder)
    image, options = picture(100, 80, 0), {"size": {"shortest_edge": 70}}
    ours.check_options(options)
    expected = theirs(image, return_tensors="np", input_data_format="channels_last", **options)
    pixels = ours.process("image", image, options).arrays["pixels"]
    np.testing.assert_allclose(normalized(pixels), expected["pixel_values"][0], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"max_pixel": 5}, "no option 'max_pixel'; it has min_pixels, max_pixels, size"),
        ({"max_pixels": 1 << 40}, "at most 12845056"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "5000 is more than max_pixels 4000"),
        ({"min_pixels": -1}, "min_pixels must be an integer from 1, got -1"),
        ({"max_pixels": 3.5}, "max_pixels must be an integer"),
        ({"size": 7}, "size must be a mapping"),
    ],
)
def test_wrong_qwen2_vl_options(tmp_path: Path, options: dict[str, Any], pattern: str) -> None:
    ours = processor_of(make_qwen2_vl(tmp_path))
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        ours.check_options(options)
    assert caught.value.param.startswith("mm_processor_kwargs")


@pytest.mark.parametrize(
    "options", [{"crop": 1}, {"size": 0}, {"size": 10**9}, {"size": {"a": 1}}, {"size": "x"}]
)
def test_wrong_llava_options(tmp_path: Path, options: dict[str, Any]) -> None:
    ours = processor_of(make_llava(tmp_path))
    with pytest.raises(InvalidRequestError):
        ours.check_options(options)


def test_preprocessor_that_does_not_fit_the_tower(tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "a")
    change(folder, {"crop_size": {"height": 28, "width": 28}})
    with pytest.raises(ConfigError, match=r"28 x 28 is not .* image_size 56"):
        processor_of(folder)
    folder = make_qwen2_vl(tmp_path / "b")
    change(folder, {"patch_size": 16})
    with pytest.raises(ConfigError, match=r"patch_size 16 is not .* 14"):
        processor_of(folder)


def test_processors_are_small_values(tmp_path: Path) -> None:
    """Picklable, and their identity covers the configuration and the options."""
    for build in (make_llava, make_qwen2_vl):
        ours = processor_of(build(tmp_path))
        assert pickle.loads(pickle.dumps(ours)) == ours
        plain = ours.identity("image", {})
        assert plain == ours.identity("image", {})
        assert plain != ours.identity("image", {"size": {"shortest_edge": 9}})
        change(tmp_path, {"resample": 2})
        assert processor_of(tmp_path).identity("image", {}) != plain


def test_newer_files_keep_the_image_processor_inside(tmp_path: Path) -> None:
    import json

    folder = make_qwen2_vl(tmp_path, max_pixels=23520)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    nested = {"processor_class": "Qwen2VLProcessor", "image_processor": preprocessor}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert processor_of(folder).pixels == PixelRange(3136, 23520)


def test_placeholders(tmp_path: Path) -> None:
    ours = processor_of(make_qwen2_vl(tmp_path / "q"))
    features = ours.process("image", picture(56, 84, 0), {})
    assert ours.placeholder_text("image") == "<|vision_start|><|image_pad|><|vision_end|>"
    assert ours.replacement(features).token_ids == ours.placeholder("image") * 6
    assert ours.replacement(features).runs == ((0, 6),)
    ours = processor_of(make_llava(tmp_path / "l"))
    features = ours.process("image", picture(56, 84, 0), {})
    assert ours.placeholder_text("image") == "<image>"
    assert ours.replacement(features).runs == ((0, 16),)
    assert ours.positions([1, 2], []) is None


def grid_item(start: int, grid: tuple[int, int, int], merge: int = 2) -> PlacedItem:
    num = grid[0] * grid[1] * grid[2] // merge**2
    item = MediaItem("image", bytes(32), Features("image", {}, num, {"grid": grid}))
    return PlacedItem(item, ((start, num),))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 6)), max_size=4))
def test_positions_equal_reference(
    qwen_reference: Reference, layout: list[tuple[int, int, int]]
) -> None:
    """Any mixture of text and images, also images without text between them or at either end."""
    ours, image_id = qwen_processor(), qwen_reference.config.image_token_id
    ids: list[int] = []
    items = []
    for text, rows, columns in layout:
        ids += [5] * text
        items.append(grid_item(len(ids), (1, 2 * rows, 2 * columns)))
        ids += [image_id] * (rows * columns)
        ids.append(6)  # the reference tells adjacent images apart by what stands between them
    ids += [7] * 3
    found = ours.positions(ids, items)
    if not items:
        assert found is None
        return
    tensor = torch.tensor([ids])
    expected, delta = qwen_reference.model.model.get_rope_index(
        tensor,
        (tensor == image_id).int(),
        image_grid_thw=torch.tensor([item.features.meta["grid"] for item in items]),
    )
    assert found is not None
    assert found[0].dtype == np.int32
    np.testing.assert_array_equal(found[0], expected[:, 0].numpy())
    assert found[1] == delta.item()


def test_adjacent_images_count_on() -> None:
    items = [grid_item(0, (1, 4, 4)), grid_item(4, (1, 2, 2))]
    rows, delta = qwen_processor().positions([9] * 6, items)
    assert rows.tolist() == [[0, 0, 0, 0, 2, 3], [0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 3]]
    assert delta == 4 - 6


def test_text_after_a_video_continues_after_its_largest_position() -> None:
    """Two text tokens, eight frames of 2 x 2.

    Text goes on at 10, as the released code of the model's time has it.
    """
    items = [grid_item(2, (8, 4, 4))]
    rows, delta = qwen_processor().positions([9] * 35, items)
    assert rows[0, 2:34].tolist() == [2 + frame for frame in range(8) for _ in range(4)]
    assert rows[:, 34].tolist() == [10, 10, 10]
    assert delta == 11 - 35


def qwen_processor() -> Qwen2VLProcessor:
    videos = read_video_rules({}, {}, 28, 2)
    pixels = read_pixel_range({}, PixelRange(1, 2))
    return Qwen2VLProcessor(440, 441, 64, 14, 2, pixels, True, 3, videos)


@pytest.fixture(scope="module", params=[make_qwen2_vl, make_qwen2_5_vl])
def qwen_reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    return Reference(request.param(tmp_path_factory.mktemp("qwen")))


def test_tower_on_clips_equals_reference(qwen_reference: Reference) -> None:
    """Grids with several temporal indices.

    Attention stays within each, and items of all sizes share a batch.
    """
    loaded = loader.load(str(qwen_reference.folder), device="cpu")
    rng = np.random.default_rng(0)
    shapes = [(4, 56, 84, 3), (84, 56, 3), (6, 28, 28, 3), (140, 84, 3)]
    items = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    model: Any = loaded.model
    tower = model.tower
    with torch.inference_mode():
        found = tower(items)
        rows = [tower.patches(torch.from_numpy(item)) for item in items]
        grids = torch.tensor([grid for _, grid in rows])
        assert grids.tolist() == [[2, 4, 6], [1, 6, 4], [3, 2, 2], [1, 10, 6]]
        pixels = torch.cat([patches for patches, _ in rows])
        expected = qwen_reference.model.model.visual(pixels, grid_thw=grids).pooler_output
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)
    assert [len(embeds) for embeds in found] == [12, 6, 3, 15]


def test_video_patches_keep_the_frames_apart() -> None:
    """Row layout (channel, frame, y, x), as the kernel of the patch embedding wants it."""
    tower = bare_tower()
    clip = np.zeros((2, 28, 28, 3), np.uint8)
    clip[1, 14:, :14, 2] = 255
    rows, grid = tower.patches(torch.from_numpy(clip))
    assert grid == (1, 2, 2)
    bright = rows.view(4, 3, 2, 14 * 14)[:, 2].amax(-1) > 0
    assert bright.tolist() == [[False, False], [False, False], [False, True], [False, False]]
