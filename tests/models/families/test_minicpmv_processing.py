"""MiniCPM-V 2.6: slices, features, placeholders and embeddings; what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.errors import (
    ConfigError,
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaTooLargeError,
)
from sensorium.models import loader
from sensorium.models.families.minicpmv.slicing import Slicing
from sensorium.models.media import pixels
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Features, Video
from sensorium.multimodal.placeholders import marker
from sensorium.multimodal.processor import FrameChoice, VideoFacts
from tests.checkpoints import make_minicpmv
from tests.models.harness import picture
from tests.models.plain_minicpmv import grid_of, views_of

PARAM = "multi_modal_data.image"
HIDDEN, QUERIES = 256, 5

PUBLISHED = [
    ((200, 100), (630, 322), None, None),
    ((448, 448), (448, 448), None, None),
    ((449, 449), (448, 448), (1, 2), (630, 322)),
    ((640, 480), (518, 392), (2, 1), (364, 546)),
    ((480, 640), (392, 518), (1, 2), (546, 364)),
    ((1000, 500), (630, 322), (2, 1), (448, 448)),
    ((1344, 1344), (448, 448), (3, 3), (448, 448)),
    ((1920, 1080), (602, 336), (4, 2), (420, 476)),
    ((2000, 300), (1148, 168), (4, 1), (574, 350)),
    ((3000, 4000), (392, 518), (3, 3), (392, 518)),
]


def processor_of(folder: Path, **overrides: Any) -> Any:
    loaded = loader.read_config(str(folder), hf_overrides=overrides)
    return resolve(loaded.config).build_processor(loaded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minicpmv(tmp_path_factory.mktemp("minicpmv"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return processor_of(folder)


def change(folder: Path, **values: Any) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def published(folder: Path) -> Any:
    change(folder, max_slice_nums=9, scale_resolution=448)
    return processor_of(folder)


@pytest.mark.parametrize(("size", "source", "grid", "cell"), PUBLISHED)
def test_published_sizes(size: Any, source: Any, grid: Any, cell: Any) -> None:
    width, height = size
    layout = Slicing(448, 14).layout(width, height, 9)
    assert (layout.source, layout.grid) == (source, grid)
    assert layout.num_views == (1 if grid is None else 1 + grid[0] * grid[1])
    if cell is not None:
        assert layout.cell == cell


def views_in(features: Features, size: int = 14) -> list[np.ndarray]:
    """The views (h, w, 3) that the patches of features are cut from."""
    views, start = [], 0
    for rows, columns in features.arrays["sizes"].tolist():
        patches = features.arrays["patches"][start : start + rows * columns]
        cells = patches.reshape(rows, columns, 3, size, size).transpose(0, 3, 1, 4, 2)
        views.append(cells.reshape(rows * size, columns * size, 3))
        start += rows * columns
    assert start == len(features.arrays["patches"])
    return views


def sizes(num: int, longest: int, shortest: int = 1) -> list[tuple[int, int]]:
    """Random heights and widths, spread evenly in the logarithm."""
    rng = np.random.default_rng(3)
    edges = np.exp(rng.uniform(np.log(shortest), np.log(longest), (num, 2)))
    return [(int(h), int(w)) for h, w in edges]


def test_features_equal_the_plain_ones(tmp_path: Path) -> None:
    """50 random sizes and extreme ones, with the published resolution; pixel by pixel."""
    from PIL import Image

    ours = published(make_minicpmv(tmp_path))
    some = [*sizes(50, 1300, 60), (1, 1), (448, 448), (449, 448), (5, 1500), (1500, 3), (700, 900)]
    num_cut = 0
    for height, width in some:
        image = picture(height, width, seed=height + width)
        features = ours.process("image", image, {})
        expected = views_of(Image.fromarray(image), 448, 14, 9)
        found = views_in(features)
        assert len(found) == len(expected), (height, width)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, np.asarray(other), err_msg=f"{height, width}")
        grid = grid_of(width, height, 448, 9)
        assert features.meta["grid"] == (grid or (0, 0))
        assert features.num_embeds == QUERIES * len(expected)
        num_cut += grid is not None
    assert num_cut > 10
    assert all(a.flags.c_contiguous for a in features.arrays.values())


@pytest.mark.parametrize("most", [1, 2, 3, 9, 20])
def test_grids_equal_the_plain_ones(most: int) -> None:
    slicing = Slicing(448, 14)
    for height, width in sizes(300, 6000):
        assert slicing.layout(width, height, most).grid == grid_of(width, height, 448, most)


def test_videos_are_frames_without_slices(ours: Any) -> None:
    frames = np.stack([picture(120, 90, seed) for seed in range(3)])
    clip = Video(frames, (0, 30, 60), 90, 30.0)
    features = ours.process("video", clip, {})
    assert (features.num_embeds, len(features.arrays["sizes"])) == (3 * QUERIES, 3)
    for number, frame in enumerate(frames):
        (expected,) = views_in(ours.process("image", frame, {"max_slice_nums": 1}))
        np.testing.assert_array_equal(views_in(features)[number], expected)
    for most in (2, 4):
        features = ours.process("video", clip, {"max_slice_nums": most})
        assert features.meta["grid"] == (1, 2), "at most two slices"
        assert features.num_embeds == 9 * QUERIES


def test_small_frames_that_would_be_gigabytes_are_refused(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resizing makes 56 x 56 pixels of each."""
    monkeypatch.setattr(pixels, "MAX_VIDEO_PIXELS", 3 * 56**2)
    frames = np.zeros((4, 14, 14, 3), np.uint8)
    ours.process("video", Video(frames[:3], (0, 1, 2), 3, 30.0), {})
    with pytest.raises(MediaTooLargeError, match="4 frames"):
        ours.process("video", Video(frames, (0, 1, 2, 3), 4, 30.0), {})


def test_frames_are_sampled_once_a_second(ours: Any) -> None:
    sampler = pickle.loads(pickle.dumps(ours.decoding("video", {})))
    assert ours.decoding("image", {}) is None
    assert sampler(VideoFacts(90, 30.0), FrameChoice()).tolist() == [0, 30, 60]
    assert len(sampler(VideoFacts(300000, 30.0), FrameChoice())) == 64
    assert len(sampler(VideoFacts(90, 30.0), FrameChoice(num_frames=8))) == 8


def test_replacement_spells_the_slices(folder: Path, ours: Any) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    unk = "<unk>" * QUERIES
    features = ours.process("image", picture(200, 50, 0), {})
    assert features.meta["grid"] == (1, 4)
    replacement = ours.replacement(features, 12)
    text = f"<image_id>12</image_id><image>{unk}</image>"
    text += "\n".join([f"<slice>{unk}</slice>"] * 4)
    assert list(replacement.token_ids) == tokenizer.encode(text).ids
    pad = tokenizer.token_to_id("<unk>")
    filled = [i for start, num in replacement.runs for i in range(start, start + num)]
    assert filled == [i for i, token in enumerate(replacement.token_ids) if token == pad]
    assert len(filled) == features.num_embeds
    features = ours.process("image", picture(80, 100, 0), {"use_image_id": False})
    columns, rows = features.meta["grid"]
    lines = [f"<slice>{unk}</slice>" * columns] * rows
    text = f"<image>{unk}</image>" + "\n".join(lines)
    assert list(ours.replacement(features, 7).token_ids) == tokenizer.encode(text).ids


def test_no_two_views_share_a_token(ours: Any) -> None:
    clip = Video(np.stack([picture(120, 90, seed) for seed in range(2)]), (0, 1), 2)
    features = ours.process("video", clip, {"max_slice_nums": 2})
    replacement = ours.replacement(features, 3)
    assert [num for _, num in replacement.runs] == [QUERIES] * 6
    ends = [start + num for start, num in replacement.runs]
    assert all(end < start for end, (start, _) in zip(ends, replacement.runs[1:], strict=False))
    assert ours.vocabulary.id_start not in replacement.token_ids


def test_placeholders_are_markers(ours: Any) -> None:
    assert ours.placeholder("image") == (marker("image"),)
    assert ours.placeholder("video") == (marker("video"),)
    assert ours.placeholder_text("image", 3) == "(<image>./</image>)"
    assert ours.placeholder_text("video") == "(<video>./</video>)"
    assert ours.positions([1, 2], []) is None


def test_processor_is_a_small_value(folder: Path, ours: Any) -> None:
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert len(pickle.dumps(ours)) < 2000
    plain = ours.identity("image", {})
    assert plain == processor_of(folder).identity("image", {})
    assert plain != ours.identity("image", {"max_slice_nums": 2})
    assert plain != processor_of(folder, query_num=6).identity("image", {})


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"max_slices": 3}, "no option 'max_slices'; it has max_slice_nums, use_image_id"),
        ({"max_slice_nums": 0}, "from 1 to 36, got 0"),
        ({"max_slice_nums": 37}, "from 1 to 36, got 37"),
        ({"max_slice_nums": True}, "got True"),
        ({"max_slice_nums": 2.0}, r"got 2\.0"),
        ({"use_image_id": 1}, "true or false, got 1"),
    ],
)
def test_wrong_options(ours: Any, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        ours.check_options(options)
    assert caught.value.param == f"mm_processor_kwargs.{next(iter(options))}"


def test_options_that_are_right(ours: Any) -> None:
    for options in ({}, {"max_slice_nums": 36}, {"max_slice_nums": 1, "use_image_id": False}):
        ours.check_options(options)


@pytest.mark.parametrize(("height", "width"), [(1, 20000), (1, 2_000_000), (60_000, 2)])
def test_lines_of_pixels_are_refused(tmp_path: Path, height: int, width: int) -> None:
    ours = published(make_minicpmv(tmp_path))
    image = np.zeros((height, width, 3), np.uint8)
    if max(height, width) == 2_000_000:
        assert ours.process("image", image, {}).num_embeds > 0, "too narrow for a single row"
        return
    with pytest.raises(InvalidRequestError, match=f"{width} x {height} pixels is too narrow"):
        ours.process("image", image, {})


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 5), (5, 5, 4)])
def test_empty_or_misshapen_arrays(ours: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="image must be"):
        ours.process("image", np.zeros(shape, np.uint8), {})


def test_preprocessor_that_does_not_fit(tmp_path: Path) -> None:
    change(make_minicpmv(tmp_path), patch_size=16)
    with pytest.raises(ConfigError, match=r"patch_size 16 is not .* 14"):
        processor_of(tmp_path)
    change(tmp_path, patch_size=14, scale_resolution=0)
    with pytest.raises(ConfigError, match="scale_resolution must be at least 1, got 0"):
        processor_of(tmp_path)
    change(tmp_path, scale_resolution=56, im_id_start="<number>")
    with pytest.raises(ConfigError, match="lacks <number>"):
        processor_of(tmp_path)


def test_values_of_the_preprocessor(tmp_path: Path) -> None:
    make_minicpmv(tmp_path)
    change(tmp_path, slice_mode=False, use_image_id=False)
    ours = processor_of(tmp_path)
    features = ours.process("image", picture(300, 300, 0), {})
    assert features.num_embeds == QUERIES
    assert ours.vocabulary.id_start not in ours.replacement(features).token_ids
    (tmp_path / "preprocessor_config.json").unlink()
    ours = processor_of(tmp_path)
    assert (ours.max_slices, ours.slicing.scale, ours.use_image_id) == (4, 56, True)


# --- embeddings -----------------------------------------------------------------------------------


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sized(embeds: Any, image_sizes: Any) -> dict[str, Any]:
    return {"image_embeds": embeds, "image_sizes": image_sizes}


def test_embeddings_with_sizes(ours: Any) -> None:
    """56 x 56 is one view; 50 x 200 is cut into four slices, as the picture itself would be."""
    one, five = values(QUERIES, HIDDEN), values(5 * QUERIES, HIDDEN)
    for listed in (
        [(56, 56), (50, 200)],
        torch.tensor([[56, 56], [50, 200]]),
        [[56, 56], [50, 200]],
    ):
        first, second = ours.embeddings("image", sized([one, five], listed), PARAM)
        assert (first.num_embeds, second.num_embeds) == (QUERIES, 5 * QUERIES)
        assert (first.meta["grid"], second.meta["grid"]) == ((0, 0), (1, 4))
        assert first.precomputed
        np.testing.assert_array_equal(second.arrays["embeds"], five.numpy())
        made = ours.process("image", picture(200, 50, 0), {})
        assert ours.replacement(second, 1) == ours.replacement(made, 1)
    (single,) = ours.embeddings("image", sized(one[None], (56, 56)), PARAM)
    assert single.num_embeds == QUERIES
    pair = ours.embeddings("image", sized(values(2, QUERIES, HIDDEN), [[9, 9]] * 2), PARAM)
    assert len(pair) == 2


def test_the_older_key_works(ours: Any) -> None:
    source = {"image_embeds": values(1, QUERIES, HIDDEN), "image_size_list": [(56, 56)]}
    (features,) = ours.embeddings("image", source, PARAM)
    assert features.num_embeds == QUERIES


WRONG: dict[str, tuple[Any, str, str]] = {
    "no mapping": (values(1, QUERIES, HIDDEN), "mapping with 'image_embeds'", ""),
    "no sizes": ({"image_embeds": values(1, QUERIES, HIDDEN)}, "image_sizes", ""),
    "another key": ({**sized(values(1, 5, HIDDEN), [[9, 9]]), "grid": 1}, "'grid'", ""),
    "hidden size": (sized(values(1, 5, 255), [[9, 9]]), r"256 .* \(5, 255\)", ".image_embeds[0]"),
    "count": (
        sized([values(5, HIDDEN), values(20, HIDDEN)], [[9, 9], [50, 200]]),
        r"50 x 200 pixels has 5 views of 5 embeddings here, together 25, got shape \(20, 256\)",
        ".image_embeds[1]",
    ),
    "items": (
        sized(values(2, 5, HIDDEN), [[9, 9]]),
        "image_sizes has 1 entry .* 2 images",
        ".image_sizes",
    ),
    "negative": (sized(values(1, 5, HIDDEN), [[9, -9]]), "9 x -9", ".image_sizes"),
    "zero": (sized(values(1, 5, HIDDEN), [[0, 9]]), "from 1", ".image_sizes"),
    "huge": (sized(values(1, 5, HIDDEN), [[1 << 40, 9]]), "from 1 to 1048576", ".image_sizes"),
    "float": (sized(values(1, 5, HIDDEN), [[9.5, 9]]), "integers", ".image_sizes"),
    "ragged": (sized(values(1, 5, HIDDEN), [[9], [9, 9]]), "integers", ".image_sizes"),
    "three": (sized(values(1, 5, HIDDEN), [[9, 9, 3]]), "integers", ".image_sizes"),
    "NaN": (sized(values(1, 5, HIDDEN) * float("nan"), [[9, 9]]), "NaN", ".image_embeds"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_refused_embeddings(ours: Any, name: str) -> None:
    source, pattern, place = WRONG[name]
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        ours.embeddings("image", source, PARAM)
    assert caught.value.param == PARAM + place


def test_embeddings_of_videos(ours: Any) -> None:
    clip = values(3 * QUERIES, HIDDEN)
    for source in (clip, clip[None], [clip], {"video_embeds": [clip], "num_frames": 3}):
        (features,) = ours.embeddings("video", source, PARAM)
        assert (features.num_embeds, features.meta["num_frames"]) == (3 * QUERIES, 3)
        assert [num for _, num in ours.replacement(features).runs] == [QUERIES] * 3
    source = {"video_embeds": [clip, clip[:QUERIES]], "num_frames": torch.tensor([3, 1])}
    assert [f.num_embeds for f in ours.embeddings("video", source, PARAM)] == [15, 5]


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (values(1, 7, HIDDEN), r"A frame has 5 embeddings .* \(7, 256\)"),
        (values(1, 5, HIDDEN + 1), "hidden size 256"),
        ({"video_embeds": values(1, 10, HIDDEN), "num_frames": 3}, "this video 3 frames"),
        ({"video_embeds": values(1, 10, HIDDEN), "num_frames": [2, 2]}, "2 values .* 1 video"),
        ({"video_embeds": values(1, 10, HIDDEN), "num_frames": 0}, "this video 0 frames"),
        ({"video_embeds": values(1, 10, HIDDEN), "num_frames": "2"}, "integers"),
        ({"num_frames": 2}, "'video_embeds'"),
    ],
)
def test_refused_embeddings_of_videos(ours: Any, source: Any, pattern: str) -> None:
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        ours.embeddings("video", source, PARAM)
    assert caught.value.param.startswith(PARAM)
