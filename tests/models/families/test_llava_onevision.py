"""LLaVA-OneVision: parity with transformers on images, clips, and both together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.models import loader
from sensorium.models.families.llava_onevision import model as onevision
from sensorium.models.interface import BuildOptions
from sensorium.multimodal.items import Decoded, Features
from tests.checkpoints import make_llava_onevision
from tests.checkpoints.llava_onevision import TILE
from tests.models.harness import Harness, Running, picture, text_ids
from tests.models.onevision import OnevisionReference, clip

TOLERANCE = 1e-4
NUM_TOKENS = 12


def chat(*parts: str) -> str:
    return f"<|im_start|>user {''.join(parts)}<|im_end|><|im_start|>assistant\n"


CASES: dict[str, tuple[str, list[Decoded]]] = {
    "wide": (chat("<image>", "\nWhat?"), [picture(52, 130, 1)]),
    "tall": (chat("<image>", "\nWhat?"), [picture(88, 50, 2)]),
    "scaled down": (chat("<image>", "\nWhat?"), [picture(50, 170, 3)]),
    "a line": (chat("<image>", "\nWhat?"), [picture(1, 90, 4)]),
    "several": (
        chat("<image>", "\nor", "<image>", "<image>", "?"),
        [picture(60, 133, 5), picture(151, 40, 6), picture(44, 44, 7)],
    ),
    "clip": (chat("<video>", "\nWhat happens?"), [clip(5, 33, 70)]),
    "two clips": (chat("<video>", "\nthen", "<video>"), [clip(3, 33, 70, 1), clip(3, 90, 50, 2)]),
    "image and clip": (
        chat("<video>", "\nas in ", "<image>"),
        [picture(60, 133, 8), clip(2, 44, 44, 3)],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def harness(folder: Path) -> Harness:
    return Harness(loader.load(str(folder), device="cpu"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> OnevisionReference:
    return OnevisionReference(folder)


@pytest.fixture(scope="module")
def ours(harness: Harness) -> Any:
    return harness.loaded.processor


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(
    folder: Path, harness: Harness, reference: OnevisionReference, name: str
) -> None:
    prompt, media = CASES[name]
    ids = text_ids(folder, prompt)
    seq = harness.add(ids, media)
    logits = reference.logits(seq, media)
    torch.testing.assert_close(harness.prefill(seq), logits, atol=TOLERANCE, rtol=TOLERANCE)
    chunked = harness.prefill(harness.add(ids, media), chunk=7)
    torch.testing.assert_close(chunked, logits, atol=TOLERANCE, rtol=TOLERANCE)
    expected = reference.greedy(seq, NUM_TOKENS, media)
    assert harness.greedy(harness.add(ids, media), NUM_TOKENS, chunk=11) == expected


def test_the_cases_reach_what_they_are_for(ours: Any) -> None:
    """Padding above and at the sides, scaling down, one tile and many."""
    layouts = {
        name: ours.grids.layout(*media[0].shape[:2])
        for name, (_, media) in CASES.items()
        if isinstance(media[0], np.ndarray)
    }
    assert layouts["wide"].top > 0
    assert layouts["wide"].scaled is None
    assert layouts["tall"].left > 0
    assert layouts["scaled down"].top > 0
    assert layouts["scaled down"].scaled == (3, 10)
    assert layouts["a line"].height == 1


@pytest.mark.parametrize("layers", [[-2, 1], 1, [2, 0]])
def test_feature_layers(tmp_path: Path, layers: int | list[int]) -> None:
    folder = make_llava_onevision(tmp_path, vision_feature_layer=layers)
    harness, reference = Harness(loader.load(str(folder), device="cpu")), OnevisionReference(folder)
    for name in ("wide", "clip"):
        prompt, media = CASES[name]
        seq = harness.add(text_ids(folder, prompt), media)
        logits = reference.logits(seq, media)
        torch.testing.assert_close(harness.prefill(seq), logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_tied_when_the_decoder_says_so(tmp_path: Path, tied: bool) -> None:
    folder = make_llava_onevision(tmp_path, text={"tie_word_embeddings": tied})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    harness = Harness(loader.load(str(folder), device="cpu"))
    decoder = harness.model.decoder
    assert decoder.config.tied is tied
    seq = harness.add(text_ids(folder, CASES["wide"][0]), CASES["wide"][1])
    logits = OnevisionReference(folder).logits(seq, CASES["wide"][1])
    torch.testing.assert_close(harness.prefill(seq), logits, atol=TOLERANCE, rtol=TOLERANCE)


def test_published_geometry(tmp_path: Path) -> None:
    """Tiles of 27 x 27 features, the published grids.

    Features of an image that is scaled down, and of two frames.
    """
    folder = make_llava_onevision(
        tmp_path,
        vision={"image_size": 384, "hidden_size": 16, "intermediate_size": 16},
        image_grid_pinpoints=None,
        vision_aspect_ratio="anyres_max_9",
    )
    harness, reference = Harness(loader.load(str(folder), device="cpu")), OnevisionReference(folder)
    image, frames = picture(700, 2300, 0), clip(2, 90, 120)
    features = harness.process([image, frames])
    assert harness.loaded.processor.grids.layout(700, 2300).scaled == (44, 145)
    assert [f.num_embeds for f in features] == [729 + 44 * 146, 2 * 196 + 1]
    seq = Running([1], [], None, 0, [])
    given = reference.inputs(seq, [image, frames])
    with torch.inference_mode():
        model = reference.model.model
        names = ("pixel_values", "image_sizes", "batch_num_images")
        images = model.get_image_features(**{name: given[name] for name in names}).pooler_output
        clips = model.get_video_features(given["pixel_values_videos"]).pooler_output
        found = [harness.model.encode([own])[0] for own in features]
    torch.testing.assert_close(found[0], images[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], clips[0], atol=1e-4, rtol=1e-4)


def test_items_share_batches(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tower's batch is, and whichever items are in it, the embeddings are the same."""
    images = [
        *harness.process([picture(60, 133, 1)]),
        *harness.process([picture(20, 20, 2), picture(30, 44, 3)]),
        *harness.process([picture(170, 163, 4)]),
    ]
    clips = harness.process([clip(5, 33, 70), clip(1, 44, 44)])
    with torch.inference_mode():
        alone = [harness.model.encode([item])[0] for item in (*images, *clips)]
        for size in (1, 3, 16):
            monkeypatch.setattr(onevision, "IMAGES_PER_BATCH", size)
            found = [*harness.model.encode(images), *harness.model.encode(clips)]
            for embeds, expected in zip(found, alone, strict=True):
                torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
    for embeds, item in zip(alone, (*images, *clips), strict=True):
        assert len(embeds) == item.num_embeds


def test_skipped_modalities(folder: Path) -> None:
    """The tower serves both: it is left out only with both."""
    one = loader.load(str(folder), device="cpu", skip_modalities=frozenset({"image"})).model
    none = loader.load(
        str(folder), device="cpu", skip_modalities=frozenset({"image", "video"})
    ).model
    assert one.has_encoder
    assert not none.has_encoder


def test_embeddings_take_the_place_of_items(folder: Path, harness: Harness, ours: Any) -> None:
    """What the encoder makes of an image is accepted as its embeddings."""
    (features,) = harness.process([picture(60, 133, 1)])
    with torch.inference_mode():
        (embeds,) = harness.model.encode([features])
    source = {"image_embeds": embeds[None], "image_sizes": [features.meta["original_size"]]}
    (found,) = ours.embeddings("image", source, "here")
    assert isinstance(found, Features)
    np.testing.assert_array_equal(found.arrays["embeds"], embeds.numpy())


def test_tower_of_patches_in_any_order(harness: Harness) -> None:
    """Rows of patches with positions of their own, several images in one batch, give what whole
    images give.
    """
    from sensorium.models.media.pixels import Normalization
    from sensorium.models.parts.siglip import SiglipTower

    tower = harness.model.tower
    images = np.stack([picture(TILE, TILE, seed) for seed in range(2)])
    full = SiglipTower(
        harness.model.config.vision,
        2,
        Normalization(1 / 255, (0.5,) * 3, (0.5,) * 3),
        BuildOptions(torch.float32, torch.device("cpu")),
        post_norm=True,
    )
    full.patches, full.positions, full.layers = tower.patches, tower.positions, tower.layers
    assert full.post_norm is not None
    full.post_norm.load(torch.full((32,), 2.0), torch.full((32,), 0.5))
    with torch.inference_mode():
        (expected,) = tower.hidden_states(images, [2])
        order = torch.tensor([4, 0, 8, 1, 2, 3, 7, 6, 5])
        rows = torch.cat([tower.patches.rows(image[None])[order] for image in images])
        found = full.run(full.embed(rows, order.repeat(2)), [0, 9, 18])
        expected = full.post_norm(expected[:, order]).flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
