"""Videos of Qwen3-VL: sizes, times, positions, logits and greedy tokens equal the reference's.

The reference's video processor needs torchvision; its rule of sizes does not. Its features are made
here of the frames that ours resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Decoded, Features, Video
from tests.checkpoints import make_qwen3_vl
from tests.models.harness import Harness, image_processor, picture, text_ids
from tests.models.videos import VideoReference, clip

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
NUM_TOKENS = 10
CASES: list[tuple[str, list[Decoded]]] = [
    (f"{VIDEO}What happens?", [clip(5, 60, 100, 4.0)]),
    (
        f"Is {VIDEO} like {IMAGE} or {VIDEO}?",
        [clip(2, 90, 40), picture(50, 70, 1), clip(8, 40, 40, 8.0)],
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"), max_pixels=32 * 32 * 12)


def processor_of(folder: Path) -> Any:
    loaded = loader.read_config(str(folder))
    return resolve(loaded.config).build_processor(loaded)


def rows_of(features: Features) -> torch.Tensor:
    """Rows of patches (t * h * w, 3 * 2 * 16 * 16) of resized frames."""
    pixels = torch.from_numpy(features.arrays["pixels"]).permute(0, 3, 1, 2)
    video = (pixels.float() / 255 - 0.5) / 0.5
    t, h, w = features.meta["grid"]
    cells = video.reshape(t, 2, 3, h // 2, 2, 16, w // 2, 2, 16)
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 1536)


class Reference(VideoReference):
    def inputs(self, seq: Any, media: Sequence[Decoded]) -> dict[str, Any]:
        images = [item for item in media if not isinstance(item, Video)]
        found: dict[str, Any] = {}
        if images:
            found |= image_processor(self.folder)(
                images, return_tensors="pt", input_data_format="channels_last"
            )
        videos = [item.features for item in seq.items if item.features.modality == "video"]
        if videos:
            found["pixel_values_videos"] = torch.cat([rows_of(features) for features in videos])
            found["video_grid_thw"] = torch.tensor([features.meta["grid"] for features in videos])
        return found

    def positions(self, seq: Any, media: Sequence[Decoded]) -> np.ndarray:
        """What the reference counts by itself."""
        ids, config = torch.tensor([seq.ids]), self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        own = self.inputs(seq, media)
        grids = {name: own.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        found, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
        return found[:, 0].numpy()


def test_parity(folder: Path) -> None:
    harness, reference = Harness(loader.load(str(folder), device="cpu")), Reference(folder)
    expected = []
    for text, media in CASES:
        ids = text_ids(folder, text)
        seq = harness.add(ids, media)
        np.testing.assert_array_equal(seq.positions, reference.positions(seq, media))
        logits, tokens = reference.run(seq, media, NUM_TOKENS)
        torch.testing.assert_close(harness.prefill(seq), logits, atol=1e-4, rtol=1e-4)
        chunked = harness.prefill(harness.add(ids, media), chunk=7)
        torch.testing.assert_close(chunked, logits, atol=1e-4, rtol=1e-4)
        assert harness.greedy(harness.add(ids, media), NUM_TOKENS, chunk=11) == tokens
        expected.append(tokens)
    assert expected[0] != expected[1]


def test_sizes_equal_the_published_rule(folder: Path) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    ours = processor_of(folder)
    rng = np.random.default_rng(0)
    least, most = 16 * 1024, 60 * 1024
    options = {"min_pixels": least, "max_pixels": most}
    for _ in range(50):
        num = int(rng.integers(2, 12))
        height, width = (int(v) for v in np.exp(rng.uniform(np.log(10), np.log(400), 2)))
        found = ours.videos.target(num, height, width, options)
        assert found == smart_resize(num, height, width, 2, 32, least, most), (num, height, width)


def test_each_patch_is_told_its_time(folder: Path) -> None:
    ours = processor_of(folder)
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    features = ours.process("video", Video(frames, (0, 10, 20, 30, 40), 50, 10.0), {})
    assert features.meta["timestamps"] == (0.5, 2.5, 4.0)
    replacement = ours.replacement(features)
    tokenizer = text_ids
    text = "".join(
        f"<{seconds:.1f} seconds><|vision_start|>{'<|video_pad|>' * length}<|vision_end|>"
        for seconds, (_, length) in zip((0.5, 2.5, 4.0), replacement.runs, strict=True)
    )
    assert list(replacement.token_ids) == tokenizer(folder, text)
    assert sum(length for _, length in replacement.runs) == features.num_embeds
    unknown = ours.process("video", Video(frames[:2], (0, 1), 2, None), {})
    assert unknown.meta["timestamps"] == (0.5 / 24,)


def test_frames_are_taken_twice_a_second(folder: Path) -> None:
    from sensorium.multimodal.processor import FrameChoice, VideoFacts

    sampler = processor_of(folder).decoding("video", {})
    found = sampler(VideoFacts(100, 25.0), FrameChoice())
    assert found.tolist() == np.linspace(0, 99, 8).round().astype(int).tolist()


def test_embeddings_in_place_of_a_clip(folder: Path) -> None:
    """What the tower makes of a clip gives the clip's own answer, with the same times."""
    own = clip(4, 64, 96, 4.0)
    metadata = {"fps": 4.0, "frames_indices": list(own.indices), "total_num_frames": 8}
    prompt = f"{VIDEO}What happens?"
    loaded = loader.load(str(folder), device="cpu")
    assert loaded.processor is not None
    features = loaded.processor.process("video", own, {})
    times = features.meta["timestamps"]
    with torch.inference_mode():
        embeds = loaded.model.encode([features])[0].clone()
    data = {
        "video_embeds": embeds,
        "video_grid_thw": torch.tensor([features.meta["grid"]]),
        "second_per_grid_ts": [times[1] - times[0]],
    }
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(model=str(folder), enable_mm_embeds=True, num_kv_blocks=64) as llm:
        pictures = [Image.fromarray(frame) for frame in own.frames]
        [raw] = llm.generate(
            {"prompt": prompt, "multi_modal_data": {"video": (pictures, metadata)}},
            params,
            use_tqdm=False,
        )
        [made] = llm.generate(
            {"prompt": prompt, "multi_modal_data": {"video": data}}, params, use_tqdm=False
        )
    assert raw.prompt_token_ids == made.prompt_token_ids
    assert raw.outputs[0].token_ids == made.outputs[0].token_ids


@pytest.mark.parametrize(
    ("version", "keeps"),
    [
        ("4.57.0.dev0", False),
        ("5.9.0", False),
        ("5.10.1", True),
        ("5.24.0", True),
        (None, False),
        ("x", False),
    ],
)
def test_the_tokens_around_a_video_are_those_of_the_checkpoints_version(
    folder: Path, version: str | None, keeps: bool
) -> None:
    """The installed version, which keeps them, is asked for the tokens of its own."""
    loaded = loader.read_config(str(folder), hf_overrides={"transformers_version": version})
    ours: Any = resolve(loaded.config).build_processor(loaded)
    assert ours is not None
    features = ours.process(
        "video", Video(np.zeros((3, 64, 64, 3), np.uint8), (0, 10, 20), 30, 10.0), {}
    )
    replacement = ours.replacement(features)
    num = replacement.runs[0][1]
    patches = "".join(
        f"<{seconds:.1f} seconds><|vision_start|>{'<|video_pad|>' * num}<|vision_end|>"
        for seconds in (0.5, 2.0)
    )
    whole = f"<|vision_start|>{patches}<|vision_end|>" if keeps else patches
    assert list(replacement.token_ids) == text_ids(folder, whole)
    for start, length in replacement.runs:
        assert set(replacement.token_ids[start : start + length]) == {ours.video_token_id}
    if version == "5.24.0":
        assert patches == published_patches(features.meta["grid"], [0, 10, 20], 10.0)


def published_patches(grid: tuple[int, int, int], indices: list[int], fps: float) -> str:
    """What the installed reference puts in place of ``<|video_pad|>`` alone."""
    from types import SimpleNamespace

    from transformers import Qwen3VLProcessor

    known = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
    )
    known._calculate_timestamps = Qwen3VLProcessor._calculate_timestamps.__get__(known)
    metadata = SimpleNamespace(fps=fps, frames_indices=indices)
    inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    return str(Qwen3VLProcessor.replace_video_token(known, inputs, 0))
