"""MiniCPM-V 2.6 equals the plain model in ``plain_minicpmv``: tokens, logits, features.

And what it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.families.minicpmv import model as own_model
from sensorium.models.families.minicpmv.resampler import sine_table
from sensorium.models.families.minicpmv.vision import position_ids
from sensorium.multimodal.items import Video
from sensorium.multimodal.placeholders import PlaceholderIds
from tests.checkpoints import make_minicpmv
from tests.models.harness import Harness, Running, picture
from tests.models.plain_minicpmv import Item, PlainReference

TOLERANCE = 1e-4
NUM_TOKENS = 12
IMAGE, VIDEO = "(<image>./</image>)", "(<video>./</video>)"
Size = tuple[int, int]
Case = tuple[str, list[Size | list[Size]]]

CASES: dict[str, Case] = {
    "text": ("How many birds?", []),
    "one view": (f"{IMAGE}\nWhat is shown?", [(41, 33)]),
    "slices": (f"{IMAGE}\nWhat is shown?", [(97, 133)]),
    "several": (
        f"Left {IMAGE} and {IMAGE}{IMAGE}\nright? {IMAGE}",
        [(60, 200), (300, 61), (1, 1), (56, 56)],
    ),
    "lines": (f"{IMAGE}{IMAGE}?", [(3, 700), (900, 7)]),
    "rounding": (f"{IMAGE}!", [(8, 350)]),  # 25 columns in a table of 10: float32 decides
    "video": (f"{VIDEO}\nWhat moves?", [[(50, 90)] * 3]),
    "both": (f"{IMAGE}a{VIDEO}b{IMAGE}", [(60, 80), [(100, 40)] * 2, (20, 30)]),
}


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def items_of(case: Case) -> list[Item]:
    """Arrays of the sizes (height, width); a list of sizes is a video."""
    made: list[Item] = []
    for place, size in enumerate(case[1]):
        if isinstance(size, list):
            made.append([picture(*s, seed=place + frame) for frame, s in enumerate(size)])
        else:
            made.append(picture(*size, seed=size[0] * size[1]))
    return made


def media_of(items: list[Item]) -> list[np.ndarray | Video]:
    return [
        Video(np.stack(item), tuple(range(len(item))), len(item))
        if isinstance(item, list)
        else item
        for item in items
    ]


class Pair:
    """Ours and the plain model on one folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.harness = Harness(loader.load(str(folder), device="cpu", **options))
        self.plain = PlainReference(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.processor: Any = self.harness.loaded.processor
        self.placeholders = PlaceholderIds(self.processor, self.processor.markup)

    def ids(self, text: str) -> list[int]:
        """The prompt's ids with one marker per placeholder, as the engine makes them."""
        stretches, found = self.placeholders.split(text)
        ids = self.tokenizer.encode(stretches[0]).ids
        for placeholder, stretch in zip(found, stretches[1:], strict=True):
            ids += [*placeholder.ids, *self.tokenizer.encode(stretch).ids]
        return ids

    def add(self, case: Case, **options: Any) -> Running:
        return self.harness.add(self.ids(chat(case[0])), media_of(items_of(case)), **options)

    def check(self, case: Case, **options: Any) -> list[int]:
        """Ids, logits (whole and in chunks of 7) and greedy tokens; these."""
        ids = options.get("use_image_id", True)
        most = options.get("max_slice_nums")
        prompt, views = self.plain.prompt(chat(case[0]), items_of(case), most=most, ids=ids)
        seq = self.add(case, **options)
        assert seq.ids == prompt
        logits = self.plain.logits(prompt, views)
        found = self.harness.prefill(seq)
        torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=TOLERANCE)
        chunked = self.harness.prefill(self.add(case, **options), chunk=7)
        torch.testing.assert_close(chunked, logits, atol=TOLERANCE, rtol=TOLERANCE)
        expected = self.plain.greedy(prompt, views, NUM_TOKENS)
        assert self.harness.greedy(self.add(case, **options), NUM_TOKENS, chunk=11) == expected
        return expected


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(make_minicpmv(tmp_path_factory.mktemp("minicpmv"), sharded=True))


def test_equal_to_the_plain_model(pair: Pair) -> None:
    answers = [pair.check(case) for case in CASES.values()]
    assert len({tuple(tokens) for tokens in answers}) == len(CASES), "answers must vary"


@pytest.mark.parametrize(
    "options", [{"max_slice_nums": 1}, {"max_slice_nums": 2, "use_image_id": False}]
)
def test_options_of_the_processor(pair: Pair, options: dict[str, Any]) -> None:
    for name in ("slices", "both"):
        pair.check(CASES[name], **options)


def test_slices_decide_the_number_of_tokens(pair: Pair) -> None:
    lengths = [len(pair.add(CASES["slices"], max_slice_nums=most).ids) for most in (1, 2, 4)]
    assert lengths == sorted(set(lengths))


def test_several_sequences_together(pair: Pair) -> None:
    harness = pair.harness
    names = ("text", "slices", "video", "both")
    alone = [harness.greedy(pair.add(CASES[name]), NUM_TOKENS) for name in names]
    seqs = [pair.add(CASES[name]) for name in names]
    found: list[list[int]] = [[] for _ in seqs]
    while any(len(tokens) < NUM_TOKENS for tokens in found):
        spans = [
            (seq, min(len(seq.ids) - seq.num_computed, 5 + 4 * index))
            for index, seq in enumerate(seqs)
            if len(found[index]) < NUM_TOKENS
        ]
        order = sorted(spans, key=lambda span: span[1] > 1)
        for (seq, _), logits in zip(order, harness.step(spans), strict=True):
            if seq.num_computed == len(seq.ids):
                seq.ids.append(int(logits[-1].argmax()))
                found[seqs.index(seq)].append(seq.ids[-1])
    assert found == alone


@pytest.mark.parametrize("most", [1, 20, 100])
def test_batches_of_views_change_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    items = [picture(97, 133, 1), picture(20, 30, 2), picture(200, 60, 3)]
    features = pair.harness.process(items)
    model: Any = pair.harness.model
    with torch.inference_mode():
        together = model.encode(features)
        monkeypatch.setattr(own_model, "MAX_PATCHES", most)
        parts = list(own_model.batches(features, most))
        assert sum(len(sizes) for _, sizes in parts) == sum(
            len(f.arrays["sizes"]) for f in features
        )
        assert len(parts) > 1
        apart = model.encode(features)
        single = [model.encode([f])[0] for f in features]
    for one, other, alone, f in zip(together, apart, single, features, strict=True):
        assert one.shape == (f.num_embeds, 256)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)


def test_drop_vision_last_layer(tmp_path: Path) -> None:
    folder = make_minicpmv(tmp_path, drop_vision_last_layer=True)
    pair = Pair(folder)
    assert len(pair.harness.model.tower.layers) == 2
    pair.check(CASES["slices"])


def test_dropped_layers_may_be_in_the_file(tmp_path: Path) -> None:
    whole = Pair(make_minicpmv(tmp_path))
    override = {"drop_vision_last_layer": True}
    cut = loader.load(str(tmp_path), device="cpu", hf_overrides=override)
    features = whole.harness.process([picture(60, 60, 0)])
    model: Any = whole.harness.model
    with torch.inference_mode():
        before, found = model.encode(features)[0], cut.model.encode(features)[0]
        model.tower.layers.pop()
        torch.testing.assert_close(found, model.encode(features)[0], atol=1e-6, rtol=1e-6)
    assert (before - found).abs().max() > 1e-3


def test_tower_as_wide_as_the_decoder(tmp_path: Path) -> None:
    """Then there is no projection between them."""
    vision = {"hidden_size": 128, "num_hidden_layers": 1}
    folder = make_minicpmv(tmp_path, vision=vision, hidden_size=128, query_num=3)
    Pair(folder).check(CASES["slices"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(tmp_path: Path, dtype: str) -> None:
    pair = Pair(make_minicpmv(tmp_path, dtype=dtype), dtype=dtype)
    case = CASES["several"]
    prompt, views = pair.plain.prompt(chat(case[0]), items_of(case))
    exact = pair.plain.logits(prompt, views)
    found = pair.harness.prefill(pair.add(case)).float()
    error = (found - exact).abs().mean() / exact.abs().mean()
    assert error < (0.06 if dtype == "bfloat16" else 0.01), error


def test_the_picture_decides_the_answer(pair: Pair) -> None:
    ids = pair.ids(chat(CASES["slices"][0]))
    harness = pair.harness
    answers = {
        tuple(harness.greedy(harness.add(ids, [picture(60, 90, seed)]), 6)) for seed in range(6)
    }
    assert len(answers) >= 5


def test_skipped_modalities(tmp_path: Path) -> None:
    folder = make_minicpmv(tmp_path)
    half = loader.load(str(folder), device="cpu", skip_modalities=["video"]).model
    assert half.has_encoder
    text_only = loader.load(str(folder), device="cpu", skip_modalities=["video", "image"]).model
    assert not text_only.has_encoder
    assert text_only.encode([]) == []


def test_dummy_weights_run(tmp_path: Path) -> None:
    loaded = loader.load(str(make_minicpmv(tmp_path)), device="cpu", load_format="dummy")
    (embeds,) = loaded.model.encode(Harness(loaded).process([picture(60, 60, 0)]))
    assert embeds.isfinite().all()


@pytest.mark.parametrize("side", [10, 70])
def test_positions_are_relative_places(side: int) -> None:
    """A view of the trained size has each position once; half as many patches take every second."""
    assert position_ids((side, side), side).tolist() == list(range(side * side))
    half = position_ids((1, side // 2), side)
    assert (half - torch.arange(0, side, 2)).abs().max() <= 1
    assert position_ids((1, 3 * side), side).unique().tolist() == list(range(side))


def test_sine_table() -> None:
    table = sine_table(5, 8)
    assert table.shape == (5, 8)
    expected = [
        [f(m / 10000 ** (k / 4)) for f in (np.sin, np.cos) for k in range(4)] for m in range(5)
    ]
    np.testing.assert_allclose(table.numpy(), np.array(expected), atol=1e-6)


@pytest.mark.parametrize("version", [2.6, "2.6"])
def test_version_as_number_or_text(tmp_path: Path, version: Any) -> None:
    folder = make_minicpmv(tmp_path, version=version)
    assert loader.read_config(str(folder)).config["version"] == version
    assert Pair(folder).harness.model.shape.hidden_size == 256


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        ({"version": 2.5}, r"version 2\.5 is not supported, only 2\.6"),
        ({"version": "4.0"}, r"version '4\.0' is not supported"),
        ({"version": None}, "version None is not supported"),
        ({"hidden_size": 64}, "64 must be a multiple of 128"),
        ({"query_num": 0}, "query_num must be at least 1, got 0"),
        ({"vision_config": {"model_type": "idefics2"}}, "'idefics2' is not supported"),
        ({"vision_config": {"image_size": 10}}, "10 is less than a patch"),
        (
            {"vision_config": {"num_hidden_layers": 1}, "drop_vision_last_layer": True},
            "leaves no layer",
        ),
        ({"vision_config": {"hidden_act": "swiglu"}}, "unknown activation 'swiglu'"),
    ],
)
def test_refused_configurations(pair: Pair, overrides: dict[str, Any], pattern: str) -> None:
    folder = pair.harness.loaded.config.folder
    with pytest.raises(ConfigError, match=pattern):
        loader.load(folder, device="cpu", load_format="dummy", hf_overrides=overrides)
