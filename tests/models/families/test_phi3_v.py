"""Phi-3.5-Vision equals a plain implementation: features, logits, greedy tokens.

Both layouts, whole and in chunks.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium.errors import ConfigError, InvalidEmbeddingsError, InvalidRequestError
from sensorium.models import loader
from sensorium.models.families.phi3_v.config import IMAGE_TOKEN_ID, read_phi3_v_config
from sensorium.models.families.phi3_v.processing import Phi3VProcessor, to_tiles
from sensorium.models.registry import resolve
from sensorium.multimodal.placeholders import PlaceholderIds
from tests.checkpoints import make_phi3_v
from tests.models.harness import Harness, Running, picture
from tests.models.plain_phi3_v import PlainPhi3V, hd_image, normalized_views

TOLERANCE = 1e-4
PARAM = "multi_modal_data.image"
PUBLISHED = Phi3VProcessor(IMAGE_TOKEN_ID, 3072, tile=336, cells=12, num_crops=4)
TINY = Phi3VProcessor(440, 64, tile=56, cells=2, num_crops=4)

Case = tuple[str, list[tuple[int, int]]]
CASES: list[Case] = [
    ("<|user|>\nHow many birds?<|end|>\n<|assistant|>\n", []),
    ("<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n", [(97, 33)]),
    ("Left <|image_1|> and <|image_2|><|image_3|>", [(20, 70), (300, 41), (1, 1)]),
    ("<|image_2|> before <|image_1|> what?", [(56, 56), (30, 200)]),
    ("<|image_1|> then <|image_2|> and again <|image_1|>.", [(90, 31), (7, 29)]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phi3_v(tmp_path_factory.mktemp("phi3_v"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainPhi3V:
    return PlainPhi3V(folder)


def images_of(case: Case) -> list[np.ndarray]:
    return [picture(height, width, seed=height * width) for height, width in case[1]]


def start(harness: Harness, folder: Path, case: Case, **options: Any) -> Running:
    """A prompt as the engine would have it: split at its tags, an item for each of them."""
    from sensorium.text.tokenizer import Tokenizer

    processor = harness.loaded.processor
    assert processor is not None
    assert processor.markup is not None
    stretches, found = PlaceholderIds(processor, processor.markup).split(case[0])
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(stretches[0])
    for placeholder, stretch in zip(found, stretches[1:], strict=True):
        ids += [*placeholder.ids, *tokenizer.encode(stretch)]
    images = images_of(case)
    named = [images[placeholder.number - 1] for placeholder in found if placeholder.number]
    return harness.add(ids, named, **options)


def assert_parity(
    folder: Path,
    cases: Sequence[Case] = CASES,
    num_crops: int | None = None,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> None:
    """Every case alone, whole and in chunks of 7, then all together."""
    harness = Harness(loader.load(str(folder), device="cpu", **options))
    plain = PlainPhi3V(folder)
    wanted = {} if num_crops is None else {"num_crops": num_crops}
    expected = []
    for case in cases:
        views = [plain.embeds(image, num_crops) for image in images_of(case)]
        ids = plain.ids(case[0], views)
        expected.append(plain.logits(ids, views))
        seq = start(harness, folder, case, **wanted)
        image_token = plain.config["image_token_id"]
        assert seq.ids == [image_token if i < 0 else i for i in ids]
        for chunk in (None, 7):
            seq.num_computed = 0
            torch.testing.assert_close(
                harness.prefill(seq, chunk), expected[-1], atol=tolerance, rtol=tolerance
            )
    together = [start(harness, folder, case, **wanted) for case in cases]
    spans = [(seq, len(seq.ids)) for seq in together]
    for logits, other in zip(harness.step(spans), expected, strict=True):
        torch.testing.assert_close(logits, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["hub", "resaved"])
def test_logits(tmp_path: Path, layout: str) -> None:
    assert_parity(make_phi3_v(tmp_path, layout=layout, seed=3, sharded=layout == "hub"))


@pytest.mark.parametrize("num_crops", [1, 16])
def test_other_numbers_of_crops(folder: Path, num_crops: int) -> None:
    assert_parity(folder, [CASES[1], CASES[4]], num_crops)


def test_the_small_copy_first(tmp_path: Path) -> None:
    layout = {"embedding_cls": "image", "hd_transform_order": "glb_sub"}
    assert_parity(make_phi3_v(tmp_path, embd_layer=layout), CASES[1:3])


def test_the_layer_of_the_features_is_configurable(tmp_path: Path) -> None:
    folder = make_phi3_v(tmp_path)
    image = PlainPhi3V(folder).config["img_processor"] | {"layer_idx": -1}
    assert_parity(make_phi3_v(tmp_path / "last", img_processor=image), CASES[1:2])


def test_long_factors_are_chosen_by_the_length_of_the_sequence(tmp_path: Path) -> None:
    """One prompt ends before the original length, two behind it; all in one batch, too."""
    folder = make_phi3_v(tmp_path, original_max_position_embeddings=32)
    assert_parity(folder, [("<|user|>\nHow many birds?", []), *CASES[1:3]])


def test_greedy_tokens(folder: Path, plain: PlainPhi3V) -> None:
    harness = Harness(loader.load(str(folder), device="cpu"))
    for case in (CASES[1], CASES[4]):
        expected = plain.greedy(case[0], images_of(case), 12)
        assert harness.greedy(start(harness, folder, case), 12, chunk=9) == expected


def test_embeddings_of_many_sizes(folder: Path, plain: PlainPhi3V) -> None:
    """One batch of more tiles than the tower takes at once; each image equal to its own alone."""
    loaded = loader.load(str(folder), device="cpu")
    assert loaded.processor is not None
    images = [picture(height, width, seed=height) for height, width in random_sizes(14, 400, 1)]
    features = [loaded.processor.process("image", image, {}) for image in images]
    with torch.inference_mode():
        found = loaded.model.encode(features)
    for embeds, item, image in zip(found, features, images, strict=True):
        assert len(embeds) == item.num_embeds
        torch.testing.assert_close(embeds, plain.embeds(image), atol=TOLERANCE, rtol=TOLERANCE)


def test_half_precision_is_close(tmp_path: Path) -> None:
    folder = make_phi3_v(tmp_path, dtype="bfloat16")
    loaded = loader.load(str(folder), device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    harness, plain, case = Harness(loaded), PlainPhi3V(folder), CASES[2]
    views = [plain.embeds(image) for image in images_of(case)]
    exact = plain.logits(plain.ids(case[0], views), views)
    found = harness.prefill(start(harness, folder, case)).float()
    assert (found - exact).abs().mean() / exact.abs().mean() < 0.05


def test_without_images_no_encoder_is_built(folder: Path) -> None:
    loaded = loader.load(str(folder), device="cpu", skip_modalities=["image"])
    assert not loaded.model.has_encoder
    with pytest.raises(ValueError, match="no encoder for image"):
        loaded.model.encode([TINY.process("image", picture(9, 9, 0), {})])


def random_sizes(num: int, longest: int, seed: int = 0) -> list[tuple[int, int]]:
    """Heights and widths, spread evenly in the logarithm, less than 50 times as long as wide."""
    rng = np.random.default_rng(seed)
    edges = np.exp(rng.uniform(0, np.log(longest), (3 * num, 2))).astype(int)
    sizes = [(int(h), int(w)) for h, w in edges if max(h, w) < 50 * min(h, w)][:num]
    assert len(sizes) == num
    return sizes


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_tiles_equal_the_plain_ones(num_crops: int) -> None:
    extreme = [(1, 1), (56, 56), (224, 224), (1, 56), (50, 1), (112, 113), (57, 55)]
    for height, width in [*random_sizes(50, 700, seed=num_crops), *extreme]:
        image = picture(height, width, seed=height + width)
        ours = to_tiles(image, 56, num_crops)
        theirs = np.array(hd_image(Image.fromarray(image), 56, num_crops))
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{height, width}")


def test_views_equal_the_plain_ones(folder: Path) -> None:
    model: Any = loader.load(str(folder), device="cpu").model
    for height, width in random_sizes(50, 400, seed=7):
        pixels = to_tiles(picture(height, width, seed=width), 56, 4)
        large, small = normalized_views(Image.fromarray(pixels), 56)
        found = model.views(torch.from_numpy(pixels))
        torch.testing.assert_close(found[-1], small, atol=1e-5, rtol=1e-5)
        rows, columns = pixels.shape[0] // 56, pixels.shape[1] // 56
        assert len(found) == rows * columns + 1
        corner = large[:, -56:, -56:]
        torch.testing.assert_close(found[-2], corner, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_crops", "width", "height", "size", "num_embeds"),
    [
        (4, 336, 336, (672, 672), 757),
        (4, 640, 480, (672, 672), 757),
        (4, 1920, 1080, (672, 672), 757),
        (4, 50, 50, (672, 672), 757),
        (4, 1000, 500, (336, 672), 457),
        (4, 500, 1000, (672, 336), 469),
        (4, 1600, 400, (336, 1344), 745),
        (4, 100, 1000, (1344, 336), 781),
        (16, 336, 336, (1344, 1344), 2509),
        (16, 640, 480, (1008, 1344), 1921),
        (16, 480, 640, (1344, 1008), 1933),
        (16, 1000, 500, (1008, 1680), 2353),
        (16, 1600, 400, (672, 2688), 2485),
        (1, 336, 336, (336, 336), 313),
    ],
)
def test_published_numbers(
    num_crops: int, width: int, height: int, size: tuple[int, int], num_embeds: int
) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    features = PUBLISHED.process("image", image, {"num_crops": num_crops})
    assert features.arrays["pixels"].shape == (*size, 3)
    assert features.meta["image_size"] == size
    assert features.num_embeds == num_embeds
    token_ids = PUBLISHED.replacement(features).token_ids
    assert token_ids == (IMAGE_TOKEN_ID,) * num_embeds


def test_what_is_too_narrow_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="1 x 2000 pixels is too narrow"):
        to_tiles(np.zeros((2000, 1, 3), np.uint8), 336, 4)
    assert to_tiles(np.zeros((1344, 1, 3), np.uint8), 336, 4).shape == (1344, 336, 3)


@pytest.mark.parametrize("value", [0, -1, 65, 1.0, True, "4", None])
def test_impossible_num_crops(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 64") as caught:
        TINY.check_options({"num_crops": value})
    assert caught.value.param == "mm_processor_kwargs.num_crops"
    with pytest.raises(InvalidRequestError, match="got 'xxx") as long:
        TINY.check_options({"num_crops": "x" * 5000})
    assert len(long.value.message) < 200
    with pytest.raises(InvalidRequestError, match="it has num_crops"):
        TINY.check_options({"max_crops": 2})


def test_options_are_part_of_the_identity() -> None:
    assert TINY.identity("image", {}) != TINY.identity("image", {"num_crops": 2})
    assert TINY.identity("image", {}) == pickle.loads(pickle.dumps(TINY)).identity("image", {})


def test_processor_of_a_checkpoint(folder: Path) -> None:
    loaded = loader.read_config(str(folder))
    processor: Any = resolve(loaded.config).build_processor(loaded)
    assert (processor.tile, processor.cells, processor.num_crops) == (56, 2, 4)
    assert processor.placeholder_text("image", 12) == "<|image_12|>"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no img_processor": ({"img_processor": None}, "img_processor must be a mapping"),
    "tower": ({"img_processor": {"name": "siglip"}}, "img_processor.name 'siglip'"),
    "features": ({"img_processor": {"type_feature": "cls_patch"}}, "type_feature"),
    "width": ({"img_processor": {"image_dim_out": 768}}, "image_dim_out 768"),
    "number": ({"img_processor": {"num_img_tokens": 576}}, "num_img_tokens 576"),
    "layer": ({"img_processor": {"layer_idx": 25}}, "layer_idx 25 is outside"),
    "kind of layer": ({"img_processor": {"layer_idx": "last"}}, "layer_idx must be an integer"),
    "tile": ({"img_processor": {"vision_config": {"image_size": 42}}}, "image_size 42"),
    "projector": ({"embd_layer": {"projection_cls": "linear"}}, "projection_cls 'linear'"),
    "order": ({"embd_layer": {"hd_transform_order": "both"}}, "hd_transform_order must be"),
    "no separators": ({"embd_layer": {"with_learnable_separator": False}}, "separator False"),
    "token": ({"image_token_id": 32064}, "image_token_id 32064 is outside"),
    "small vocabulary": ({"vocab_size": 1000}, "image_token_id 32044 is outside"),
}
CONFIG: dict[str, Any] = {"vocab_size": 32064, "img_processor": {}, "embd_layer": {}}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_impossible_configurations(name: str) -> None:
    values, pattern = WRONG[name]
    with pytest.raises(ConfigError, match=pattern):
        read_phi3_v_config(CONFIG | values)


def test_published_files_need_no_extension() -> None:
    config = read_phi3_v_config(CONFIG)
    assert (config.cells, config.feature_layer, config.image_token_id) == (12, 23, IMAGE_TOKEN_ID)
    assert (config.vision.hidden_size, config.vision.num_layers) == (1024, 24)
    assert config.text.fused


def test_a_preprocessor_of_other_tiles_is_refused(tmp_path: Path) -> None:
    folder = make_phi3_v(tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text('{"num_crops": 4, "num_img_tokens": 144}')
    with pytest.raises(ConfigError, match="num_img_tokens 144 is not the 4 of a tile of 56"):
        loader.load(str(folder), device="cpu")


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_precomputed_embeddings() -> None:
    """One tile makes 13 embeddings, four make 27."""
    for source in (values(2, 13, 64), list(values(2, 13, 64)), {"image_embeds": values(2, 13, 64)}):
        found = TINY.embeddings("image", source, PARAM)
        assert [f.num_embeds for f in found] == [13, 13]
        assert all(f.precomputed for f in found)
    mixed = [values(13, 64), values(27, 64)]
    for sizes in ([[56, 56], [112, 112]], torch.tensor([[56, 56], [112, 112]])):
        found = TINY.embeddings("image", {"image_embeds": mixed, "image_sizes": sizes}, PARAM)
        assert [f.meta["image_size"] for f in found] == [(56, 56), (112, 112)]
    one = {"image_embeds": values(27, 64), "image_sizes": np.array([112, 112])}
    assert len(TINY.embeddings("image", one, PARAM)) == 1


def test_every_number_of_embeddings_of_an_image_is_taken() -> None:
    possible = {TINY.num_embeds(56 * a, 56 * b) for a in range(1, 40) for b in range(1, 40)}
    for num in range(1, 150):
        array = np.zeros((num, 64), np.float32)
        if num in possible:
            assert TINY.embeddings("image", [array], PARAM)[0].num_embeds == num
        else:
            with pytest.raises(InvalidEmbeddingsError, match=f"No image has {num} embeddings"):
                TINY.embeddings("image", [array], PARAM)


def sized(embeds: Any, sizes: Any) -> dict[str, Any]:
    return {"image_embeds": embeds, "image_sizes": sizes}


WRONG_EMBEDDINGS: dict[str, tuple[Any, str, str]] = {
    "hidden size": (values(1, 13, 63), "hidden size 64", f"{PARAM}[0]"),
    "another key": ({"image_embeds": values(1, 13, 64), "more": 1}, "'more'", PARAM),
    "no embeddings": ({"image_sizes": [[56, 56]]}, "image_embeds", PARAM),
    "count": (
        sized(values(1, 13, 64), [[112, 112]]),
        r"112 x 112 \(height, width\) has 27",
        f"{PARAM}.image_embeds[0]",
    ),
    "number of sizes": (
        sized(values(2, 13, 64), [[56, 56]]),
        "1 entry for the embeddings of 2 images",
        f"{PARAM}.image_embeds",
    ),
    "no tiles": (sized(values(1, 13, 64), [[56, 57]]), "56; got", f"{PARAM}.image_sizes[0]"),
    "negative": (sized(values(1, 13, 64), [[-56, 56]]), "positive", f"{PARAM}.image_sizes[0]"),
    "fractions": (sized(values(1, 13, 64), [[56.0, 56.0]]), "integers", f"{PARAM}.image_sizes"),
    "ragged": (sized(values(1, 13, 64), [[56], [1, 2]]), "integers", f"{PARAM}.image_sizes"),
    "three edges": (sized(values(1, 13, 64), [[1, 56, 56]]), "integers", f"{PARAM}.image_sizes"),
    "NaN": (values(1, 13, 64) * float("nan"), "NaN", PARAM),
}


@pytest.mark.parametrize("name", sorted(WRONG_EMBEDDINGS))
def test_wrong_embeddings(name: str) -> None:
    source, pattern, place = WRONG_EMBEDDINGS[name]
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        TINY.embeddings("image", source, PARAM)
    assert caught.value.param == place


def test_the_picture_decides_the_answer(folder: Path) -> None:
    """Guards the other tests: if this checkpoint ignored pictures, parity would show nothing."""
    harness = Harness(loader.load(str(folder), device="cpu"))
    ids = harness.loaded.processor.placeholder("image") if harness.loaded.processor else ()
    answers = {
        tuple(harness.greedy(harness.add([5, *ids, 6], [picture(60, 90, seed)]), 8))
        for seed in range(6)
    }
    assert len(answers) >= 5
