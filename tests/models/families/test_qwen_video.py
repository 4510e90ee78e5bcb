"""Videos of Qwen2-VL and Qwen2.5-VL.

Features, positions, logits and greedy tokens equal the reference's.

The reference's video processor needs torchvision; ``reference_video`` is its arithmetic in plain
torch. Its model counts positions after a video by another rule (see ``positions_by_loops``), so
that it is given ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium.errors import (
    ConfigError,
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaTooLargeError,
)
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Decoded, Features, MediaItem, Video
from sensorium.multimodal.processor import FrameChoice, PlacedItem, VideoFacts
from tests.checkpoints import make_qwen2_5_vl, make_qwen2_vl
from tests.checkpoints.common import CLIP_MEAN, CLIP_STD
from tests.models.harness import Harness, Running, picture, place, text_ids
from tests.models.videos import NUM_TOKENS, VideoReference, clip, tower_rows

FAMILIES = {"qwen2_vl": make_qwen2_vl, "qwen2_5_vl": make_qwen2_5_vl}
TOLERANCE = {"qwen2_vl": 1e-4, "qwen2_5_vl": 3e-4}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
MEAN, STD = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)


def processor_of(folder: Path, **overrides: Any) -> Any:
    loaded = loader.read_config(str(folder), hf_overrides=overrides)
    return resolve(loaded.config).build_processor(loaded)


# --- features -------------------------------------------------------------------------------------


def reference_size(
    num: int, height: int, width: int, least: int, most: int, tokens: int | None
) -> tuple[int, int]:
    """Height and width of resized frames, by the published rule with its cap."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if tokens is not None:
        total = int(tokens * 28 * 28 * 0.9)
        most = max(min(most, total * 2 // num), int(least * 1.05))
    return smart_resize(height, width, 28, least, most)


def reference_video(
    frames: np.ndarray, resize: Callable[..., np.ndarray], *limits: int | None
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Rows of patches (t * h * w, 1176) and grid of frames (T, H, W, 3), resized by ``resize``."""
    size = reference_size(*frames.shape[:3], *limits)
    video = torch.from_numpy(resize(frames, *size)).permute(0, 3, 1, 2)
    video = (video.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    if len(video) % 2:
        video = torch.cat((video, video[-1:]))
    t, h, w = len(video) // 2, size[0] // 14, size[1] // 14
    cells = video.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    rows = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 1176)
    return rows, (t, h, w)


def pillow(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    pictures = [Image.fromarray(frame).resize((width, height), 3) for frame in frames]
    return np.stack([np.asarray(p) for p in pictures])


def tensors(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """What torchvision does; it cuts off what overshoots at another place than Pillow."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    size = (height, width)
    video = torch.nn.functional.interpolate(video, size, mode="bicubic", antialias=True)
    return video.permute(0, 2, 3, 1).numpy()


def test_features_equal_the_reference(tmp_path: Path) -> None:
    """Exactly with Pillow's resizing; to rounding with torch's."""
    ours = processor_of(make_qwen2_vl(tmp_path, min_pixels=4 * 784, max_pixels=20 * 784))
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(v) for v in np.exp(rng.uniform(np.log(8), np.log(150), 2)))
        own = clip(int(rng.integers(1, 6)), height, width)
        features = ours.process("video", own, {})
        rows = tower_rows(features.arrays["pixels"])
        expected, grid = reference_video(own.frames, pillow, 4 * 784, 20 * 784, None)
        assert features.meta["grid"] == grid
        assert features.num_embeds == math.prod(grid) // 4
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
        near, _ = reference_video(own.frames, tensors, 4 * 784, 20 * 784, None)
        levels = ((rows - near).view(-1, 3, 392).abs() * 255 * STD[:, None]).round()
        assert (levels > 1).float().mean() < 0.002
        assert levels.mean() < 0.4


def test_small_frames_that_would_be_gigabytes_are_refused(tmp_path: Path) -> None:
    ours = processor_of(make_qwen2_vl(tmp_path))
    small = Video(np.zeros((50, 28, 28, 3), np.uint8), tuple(range(50)), 50, 2.0)
    options = {"min_pixels": 12_000_000, "max_pixels": 12_800_000}
    ours.check_options(options)
    with pytest.raises(MediaTooLargeError, match="50 frames"):
        ours.process("video", small, options)


def test_an_odd_number_of_frames_is_completed(tmp_path: Path) -> None:
    ours = processor_of(make_qwen2_vl(tmp_path))
    pixels = ours.process("video", clip(5, 56, 84), {}).arrays["pixels"]
    assert pixels.shape == (6, 56, 84, 3)
    np.testing.assert_array_equal(pixels[5], pixels[4])
    assert ours.process("video", clip(1, 56, 84), {}).meta["grid"] == (1, 4, 6)


def write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(values))


VIDEO_FILE = {
    "video_processor_type": "Qwen2VLVideoProcessor",
    "size": {"shortest_edge": 784, "longest_edge": 20 * 784},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "cap_pixels_per_frame": True,
    "max_video_tokens": 60,
    "do_sample_frames": True,
    "fps": 1,
    "min_frames": 2,
    "max_frames": 12,
}


@pytest.mark.parametrize("nested", [False, True])
def test_the_video_processors_own_file(tmp_path: Path, nested: bool) -> None:
    folder = make_qwen2_vl(tmp_path)
    if nested:
        write(folder, "processor_config.json", {"video_processor": VIDEO_FILE})
    else:
        write(folder, "video_preprocessor_config.json", VIDEO_FILE)
    ours = processor_of(folder)
    for frames in (2, 4, 9, 12):
        for height, width in ((150, 200), (28, 28), (300, 61)):
            found = ours.process("video", clip(frames, height, width), {}).arrays["pixels"]
            expected = reference_size(frames, height, width, 784, 20 * 784, 60)
            assert found.shape[1:3] == tuple(expected)
    image = ours.process("image", picture(300, 300, 0), {})
    assert image.arrays["pixels"].size > 3 * 20 * 784, "images have their own limits"
    sampler = ours.decoding("video", {})
    assert len(sampler(VideoFacts(300, 30.0), FrameChoice())) == 10
    assert len(sampler(VideoFacts(3000, 30.0), FrameChoice())) == 12


def test_sizes_without_any_file(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    write(folder, "preprocessor_config.json", {})
    pixels = processor_of(folder).process("video", clip(2, 40, 40), {}).arrays["pixels"]
    assert pixels.shape[1:3] == reference_size(2, 40, 40, 128 * 784, 768 * 784, None)


def test_a_video_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    for change, pattern in (
        ({"patch_size": 16}, "patch_size 16 is not the vision tower's 14"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "normalises videos otherwise"),
        ({"fps": -1}, "fps must be a number above 0"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
    ):
        write(folder, "video_preprocessor_config.json", VIDEO_FILE | change)
        with pytest.raises(ConfigError, match=pattern):
            processor_of(folder)


# --- options --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(make_qwen2_5_vl(tmp_path_factory.mktemp("options")))


def test_options_choose_the_frames(ours: Any) -> None:
    def num(options: dict[str, Any], choice: FrameChoice = FrameChoice()) -> int:
        return len(ours.decoding("video", options)(VideoFacts(100, 10.0), choice))

    assert num({}) == 32
    assert num({"num_frames": 6}) == 6
    assert num({"num_frames": -1}) == 100
    assert num({"fps": 2}) == 20
    assert num({"fps": [2.0]}) == 20
    assert num({"fps": 2, "max_frames": 8}) == 8
    assert num({"fps": 0.1, "min_frames": 12}) == 12
    assert num({"fps": 2}, FrameChoice(num_frames=4)) == 4
    assert num({"fps": 2, "do_sample_frames": False}) == 32
    assert num({"do_sample_frames": True}, FrameChoice(given=True)) == 32
    assert num({}, FrameChoice(given=True)) == 100
    assert ours.decoding("image", {"fps": 2}) is None


def test_options_choose_the_size(ours: Any) -> None:
    own = clip(2, 200, 300)
    for options in (
        {"max_pixels": 6 * 784},
        {"size": {"longest_edge": 6 * 784}},
        {"min_pixels": 784, "max_pixels": 6 * 784},
    ):
        ours.check_options(options)
        pixels = ours.process("video", own, options).arrays["pixels"]
        assert pixels.shape[1:3] == (56, 84)
    large = {"min_pixels": 60 * 784, "max_pixels": 80 * 784}
    assert math.prod(ours.process("video", own, large).arrays["pixels"].shape[1:3]) >= 60 * 784


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"fps": 0}, "fps must be a number above 0"),
        ({"fps": [1.0, 2.0]}, "fps must be a number"),
        ({"fps": True}, "fps must be a number"),
        ({"num_frames": 0}, "num_frames must be an integer from 1"),
        ({"num_frames": 2.5}, "num_frames must be an integer"),
        ({"min_frames": 900}, "min_frames 900 is more than max_frames 768"),
        ({"max_frames": "8"}, "max_frames must be an integer"),
        ({"do_sample_frames": 1}, "do_sample_frames must be true or false"),
        ({"max_pixels": 1 << 40}, "max_pixels may be at most"),
        ({"frames": 3}, "no option 'frames'"),
    ],
)
def test_wrong_options_are_refused(ours: Any, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        ours.check_options(options)
    assert (caught.value.param or "").startswith("mm_processor_kwargs")


def test_a_line_of_pixels_is_refused(ours: Any) -> None:
    with pytest.raises(InvalidRequestError, match="A video of 300 x 1 pixels"):
        ours.process("video", clip(2, 1, 300), {})


# --- positions ------------------------------------------------------------------------------------


def positions_by_loops(
    ids: Sequence[int],
    pads: set[int],
    grids: Sequence[tuple[int, int, int]],
    intervals: Sequence[float],
    after: str,
) -> tuple[list[tuple[int, ...]], int]:
    """Positions one by one.

    ``after``: where text after an item goes on, past all its positions (``max``, as the models were
    trained) or past its rows and columns only (``space``, as in newer code of the reference).
    """
    found: list[tuple[int, ...]] = []
    start, at, item = 0, 0, 0
    while at < len(ids):
        if ids[at] not in pads:
            found.append((start,) * 3)
            start, at = start + 1, at + 1
            continue
        t, h, w = grids[item][0], grids[item][1] // 2, grids[item][2] // 2
        step = np.float32(intervals[item])
        times = [int(np.float32(frame) * step) for frame in range(t)]
        cells = [(time, row, col) for time in times for row in range(h) for col in range(w)]
        found += [(start + time, start + row, start + col) for time, row, col in cells]
        at += len(cells)
        start += 1 + max(map(max, cells)) if after == "max" else max(h, w)
        item += 1
    return found, max(map(max, found)) + 1 - len(ids)


CASES: dict[str, tuple[str, list[Callable[[], Decoded]]]] = {
    "one": (f"What {VIDEO}happens?", [lambda: clip(4, 60, 90, 24.0)]),
    "long and small": (f"What {VIDEO}happens?", [lambda: clip(18, 56, 56, 4.0)]),
    "mixed": (
        f"{VIDEO}Before {IMAGE}{VIDEO} and {IMAGE} after.",
        [
            lambda: clip(5, 70, 41, 30.0),
            lambda: picture(90, 60, 1),
            lambda: clip(3, 100, 61, None, seed=3),
            lambda: picture(28, 28, 2),
        ],
    ),
}


def intervals_of(seq: Running, family: str) -> list[float]:
    """Temporal positions from one temporal patch to the next.

    The checkpoints have the default of 4 a second.
    """
    if family == "qwen2_vl":
        return [1.0] * len(seq.items)
    return [4.0 * item.features.meta.get("second_per_grid", 0.25) for item in seq.items]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def harness(folder: Path) -> Harness:
    return Harness(loader.load(str(folder), device="cpu"))


def add(harness: Harness, folder: Path, name: str) -> tuple[Running, list[Decoded]]:
    text, makers = CASES[name]
    media = [make() for make in makers]
    return harness.add(text_ids(folder, text), media), media


@pytest.mark.parametrize("name", sorted(CASES))
def test_positions(harness: Harness, folder: Path, family: str, name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    seq, _ = add(harness, folder, name)
    config = AutoConfig.from_pretrained(folder)
    pads = {config.image_token_id, config.video_token_id}
    grids = [item.features.meta["grid"] for item in seq.items]
    steps = intervals_of(seq, family)
    expected, delta = positions_by_loops(seq.ids, pads, grids, steps, "max")
    assert seq.positions is not None
    assert seq.positions.T.tolist() == [list(row) for row in expected]
    assert seq.delta == delta
    theirs, their_delta = positions_by_loops(seq.ids, pads, grids, steps, "space")
    ids = torch.tensor([seq.ids])
    kinds = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    own: dict[str, Any] = {}
    for modality in ("image", "video"):
        items = [item for item in seq.items if item.features.modality == modality]
        if items:
            own[f"{modality}_grid_thw"] = torch.tensor([i.features.meta["grid"] for i in items])
    if family == "qwen2_5_vl":
        own["second_per_grid_ts"] = [
            item.features.meta["second_per_grid"]
            for item in seq.items
            if item.features.modality == "video"
        ]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    found, found_delta = model.model.get_rope_index(ids, kinds.int(), **own)
    assert found[:, 0].T.tolist() == [list(row) for row in theirs]
    assert int(found_delta) == their_delta
    if name != "mixed":
        assert (expected == theirs) is (name == "one"), "the rules differ where time goes further"


def test_seconds_of_a_temporal_patch(ours: Any) -> None:
    """Half of the source's frames are taken: at 24 per second 12 are seen, 6 temporal patches."""

    def seconds(rate: float | None, **options: Any) -> float:
        return ours.process("video", clip(4, 56, 56, rate), options).meta["second_per_grid"]

    assert seconds(24.0) == pytest.approx(2 / 12)
    assert seconds(24.0, fps=3) == pytest.approx(2 / 12)
    assert seconds(None) == 1.0
    assert seconds(None, fps=4) == 0.5


# --- the whole model ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hub", "resaved", "t5"])
def test_parity(family: str, layout: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path, layout=layout, seed=len(layout))
    harness, reference = Harness(loader.load(str(folder), device="cpu")), VideoReference(folder)
    answers = []
    for name in sorted(CASES):
        seq, media = add(harness, folder, name)
        logits, tokens = reference.run(seq, media)
        close = {"atol": TOLERANCE[family], "rtol": TOLERANCE[family]}
        torch.testing.assert_close(harness.prefill(seq), logits, **close)
        chunked, _ = add(harness, folder, name)
        torch.testing.assert_close(harness.prefill(chunked, chunk=7), logits, **close)
        again, _ = add(harness, folder, name)
        assert harness.greedy(again, NUM_TOKENS, chunk=11) == tokens
        answers.append(tuple(tokens))
    assert len(set(answers)) == len(CASES)


def test_several_prompts_together(harness: Harness, folder: Path) -> None:
    alone = [harness.prefill(add(harness, folder, name)[0])[-1] for name in sorted(CASES)]
    seqs = [add(harness, folder, name)[0] for name in sorted(CASES)]
    together = harness.step([(seq, len(seq.ids)) for seq in seqs])
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found[-1], expected, atol=3e-4, rtol=3e-4)


def test_the_order_of_frames_decides(harness: Harness, folder: Path) -> None:
    """Guards the parity tests: a model that ignored time would pass them too."""
    ids = text_ids(folder, CASES["one"][0])
    own = clip(6, 60, 90, 24.0)
    turned = Video(own.frames[::-1].copy(), own.indices, own.num_source_frames, own.fps)
    first, second = (harness.prefill(harness.add(ids, [c]))[-1] for c in (own, turned))
    assert (first - second).abs().max() > 0.05


# --- embeddings and switches ----------------------------------------------------------------------


def test_precomputed_embeddings_give_the_same(harness: Harness, folder: Path, family: str) -> None:
    ids = text_ids(folder, f"{VIDEO} and {VIDEO}")
    media = [clip(5, 60, 90, 24.0), clip(2, 84, 30, 10.0)]
    seq = harness.add(ids, media)
    source: dict[str, Any] = {
        "video_embeds": torch.cat(seq.embeds),
        "video_grid_thw": torch.tensor([item.features.meta["grid"] for item in seq.items]),
    }
    if family == "qwen2_5_vl":
        source["second_per_grid_ts"] = torch.tensor(
            [item.features.meta["second_per_grid"] for item in seq.items]
        )
    processor = harness.loaded.processor
    assert processor is not None
    found = processor.embeddings("video", source, "p")
    expanded, items = place(harness.loaded, ids, found)
    assert expanded == seq.ids
    own = processor.positions(expanded, items)
    assert own is not None
    np.testing.assert_array_equal(own[0], seq.positions)
    assert own[1] == seq.delta
    for features, embeds in zip(found, seq.embeds, strict=True):
        assert features.precomputed
        assert features.modality == "video"
        np.testing.assert_array_equal(features.arrays["embeds"], embeds.numpy())


def embeds_source(**changes: Any) -> dict[str, Any]:
    base = {"video_embeds": torch.zeros(8, 64), "video_grid_thw": [[2, 4, 4]]}
    return {name: value for name, value in (base | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "pattern", "place"),
    [
        ({"second_per_grid_ts": [0.5, 0.5]}, "one for each of 1 videos", "p.second_per_grid_ts"),
        ({"second_per_grid_ts": [0.0]}, "positive numbers", "p.second_per_grid_ts"),
        ({"second_per_grid_ts": ["x"]}, "positive numbers", "p.second_per_grid_ts"),
        ({"video_grid_thw": [[1, 4, 4]]}, r"together 4, but there are 8", "p.video_embeds"),
        ({"video_grid_thw": None}, "video_grid_thw", "p"),
        ({"image_grid_thw": [[2, 4, 4]]}, "video_grid_thw", "p"),
    ],
)
def test_wrong_embeddings_are_refused(
    ours: Any, changes: dict[str, Any], pattern: str, place: str
) -> None:
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        ours.embeddings("video", embeds_source(**changes), "p")
    assert caught.value.param == place


def test_embeddings_without_seconds_last_one_each(ours: Any) -> None:
    (features,) = ours.embeddings("video", embeds_source(), "p")
    assert features.meta == {"grid": (2, 4, 4), "second_per_grid": 1.0}
    assert (
        ours.embeddings("video", embeds_source(second_per_grid_ts=[0.5]), "p")[0].meta[
            "second_per_grid"
        ]
        == 0.5
    )


def test_the_tower_is_skipped_only_without_both(folder: Path) -> None:
    for skipped, has_encoder in (
        (("image",), True),
        (("video",), True),
        (("image", "video"), False),
    ):
        loaded = loader.load(str(folder), device="cpu", skip_modalities=skipped)
        assert loaded.model.has_encoder is has_encoder


def test_placeholders(ours: Any) -> None:
    assert ours.modalities == ("image", "video")
    assert ours.placeholder_text("video") == VIDEO
    features = ours.process("video", clip(4, 56, 56), {})
    replacement = ours.replacement(features)
    assert replacement.token_ids == ours.placeholder("video") * 8
    assert replacement.runs == ((0, 8),)


@pytest.mark.parametrize("seconds", [1e6, 2e9, 1e300])
def test_a_video_that_lasts_for_years(tmp_path: Path, seconds: float) -> None:
    """A rate may be anything: times stay in their 32 bits, and in order."""
    ours = processor_of(make_qwen2_5_vl(tmp_path))
    meta = {"grid": (12, 4, 4), "second_per_grid": seconds}
    video = MediaItem("video", bytes(32), Features("video", {}, 48, meta))
    items = [PlacedItem(video, ((start, 48),)) for start in (2, 52, 102)]
    positions, delta = ours.positions([5] * 152, items)
    assert positions.min() == 0
    assert (np.diff(positions.max(axis=0)) >= 0).all()
    assert positions[0].max() + 1 == 152 + delta < 1 << 31
