"""Results of processors of transformers for one item, and refusals of unusable ones."""

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
    UnsupportedModelError,
)
from sensorium.models import loader
from sensorium.models.families.hf import adapter, processing
from sensorium.models.families.hf.processing import HfProcessor
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Audio, MediaItem
from sensorium.multimodal.placeholders import PlaceholderIds, expand
from sensorium.multimodal.processor import PlacedItem
from tests.checkpoints.common import write_json
from tests.checkpoints.hf import MEDIA_TOKENS, make_hf
from tests.models.harness import picture, text_ids


def processor_at(folder: Path) -> HfProcessor:
    loaded = loader.read_config(str(folder))
    processor = resolve(loaded.config).build_processor(loaded)
    assert isinstance(processor, HfProcessor)
    return processor


def sound(seconds: float) -> Audio:
    samples = np.random.default_rng(1).normal(0, 0.2, int(16000 * seconds))
    return Audio(samples.astype(np.float32), 16000)


def test_an_image_of_tiles(tmp_path: Path) -> None:
    processor = processor_at(make_hf("idefics3", tmp_path))
    assert processor.modalities == ("image",)
    features = processor.process("image", picture(100, 60, seed=1), {})
    assert features.num_embeds == 4 * 5, "2 x 2 tiles and the whole"
    replacement = processor.replacement(features)
    assert len(replacement.runs) == 5
    assert sum(length for _, length in replacement.runs) == features.num_embeds
    assert 1 not in replacement.token_ids, "the tokenizer's BOS is not the placeholder's"
    with pytest.raises(InvalidEmbeddingsError, match="do not stand side by side"):
        processor.embeddings("image", torch.zeros(1, 4, 64), "image")
    fewer = processor.process("image", picture(100, 60, seed=1), {"do_image_splitting": False})
    assert fewer.num_embeds == 4


def test_what_stands_around_embeddings(tmp_path: Path) -> None:
    processor = processor_at(make_hf("gemma3", tmp_path))
    (given,) = processor.embeddings("image", [torch.zeros(6, 64)], "image")
    own = processor.process("image", picture(30, 30, seed=1), {})
    as_given, as_made = processor.replacement(given), processor.replacement(own)
    assert as_given.runs == ((2, 6),)
    assert as_made.runs == ((2, 4),)
    assert as_given.token_ids[:2] == as_made.token_ids[:2]
    assert as_given.token_ids[8:] == as_made.token_ids[6:]


def test_line_ends_that_meet_are_one_token(tmp_path: Path) -> None:
    processor = processor_at(make_hf("gemma3", tmp_path))
    features = processor.process("image", picture(30, 30, seed=1), {})
    item = MediaItem("image", bytes(32), features)
    boi, eoi, soft, *ends = (text_ids(tmp_path, text)[-1] for text in MEDIA_TOKENS["gemma3"])
    ends = [text_ids(tmp_path, "\n")[-1], *ends]
    inside = [boi, soft, soft, soft, soft, eoi]
    short = [ends[0], boi, boi, ends[1], 7]
    found = expand(short, [item, item], processor)
    assert list(found.token_ids) == [ends[2], *inside, ends[3], *inside, ends[3], 7]
    assert [placed.runs for placed in found.items] == [((2, 4),), ((9, 4),)]
    full = [ends[0], ends[1], *inside, ends[1], 7]
    assert list(expand(full, [item], processor).token_ids) == full, "as it stands"


def test_bidirectional_spans_as_positions(tmp_path: Path) -> None:
    processor = processor_at(make_hf("gemma3", tmp_path / "items"))
    features = processor.process("image", picture(30, 30, seed=1), {})
    item = MediaItem("image", bytes(32), features)
    placed = [PlacedItem(item, ((2, 4),)), PlacedItem(item, ((8, 2),))]
    found = processor.positions(range(12), placed)
    assert found is not None
    rows, delta = found
    assert delta == 0
    assert rows.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 1, 2, 2, 2, 2, 6, 7, 8, 8, 10, 11],
        [0, 1, 5, 5, 5, 5, 6, 7, 9, 9, 10, 11],
    ]
    whole = processor_at(make_hf("paligemma", tmp_path / "prompt")).positions(range(5), placed)
    assert whole is not None
    assert whole[0].tolist() == [[0, 1, 2, 3, 4], [0] * 5, [4] * 5]


@pytest.mark.parametrize(
    ("family", "seconds", "rows"),
    [("qwen2_audio", 2.0, 1), ("voxtral", 2.0, 1), ("voxtral", 31.0, 2)],
)
def test_sounds(tmp_path: Path, family: str, seconds: float, rows: int) -> None:
    processor = processor_at(make_hf(family, tmp_path))
    assert processor.decoding("audio", {}) == 16000
    features = processor.process("audio", sound(seconds), {})
    assert features.num_embeds == {"qwen2_audio": 50, "voxtral": 375 * rows}[family]
    assert features.arrays["input_features"].shape == (rows, 16, 3000)


def test_it_can_be_pickled_and_tells_configurations_apart(tmp_path: Path) -> None:
    processor = processor_at(make_hf("internvl", tmp_path))
    again = pickle.loads(pickle.dumps(processor))
    image = picture(50, 90, seed=3)
    first, second = (p.process("image", image, {}).arrays for p in (processor, again))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert processor.identity("image", {}) == again.identity("image", {})
    assert processor.identity("image", {"max_patches": 2}) != again.identity("image", {})
    path = tmp_path / "preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | {"max_patches": 3})
    assert processor_at(tmp_path).identity("image", {}) != again.identity("image", {})


def test_a_placeholder_that_is_no_token_is_found_in_the_text(tmp_path: Path) -> None:
    processor = processor_at(make_hf("idefics3", tmp_path))
    (place,) = processor.places
    several = processing.Place("image", "<a picture>", processing.marked("image"), place.fill, None)
    own = HfProcessor("", "", "", 64, (several,))
    assert own.markup is not None
    stretches, found = PlaceholderIds(own, own.markup).split("see <a picture>!")
    assert stretches == ["see ", "!"]
    assert [hit.ids for hit in found] == [own.placeholder("image")]


def test_options_are_checked_by_name_and_by_the_processor(tmp_path: Path) -> None:
    processor = processor_at(make_hf("internvl", tmp_path))
    processor.check_options({"max_patches": 2})
    for name in ("tiles", "return_tensors", "device"):
        with pytest.raises(InvalidRequestError, match=f"no option '{name}'"):
            processor.check_options({name: 1})
    with pytest.raises(InvalidRequestError, match="does not take this image"):
        processor.process("image", picture(9, 9, seed=0), {"size": {"depth": 1}})


HUGE = [
    ("internvl", {"max_patches": 5}, "max_patches may be from 0 to 4"),
    ("internvl", {"size": {"height": 10**6, "width": 56}}, "size may be from 0 to 56"),
    ("internvl", {"size": float("inf")}, "got inf"),
    ("internvl", {"max_patches": -1}, "got -1"),
    ("gemma3", {"pan_and_scan_max_num_crops": 257}, "from 0 to 256"),
    ("mistral3", {"patch_size": 1}, "no option 'patch_size'"),
    ("llava_next", {"crop_size": {"height": 1, "width": 1}}, "no option 'crop_size'"),
    ("llava_next", {"image_grid_pinpoints": [[10**5, 10**5]]}, "from 0 to 112"),
    ("glm4v", {"size": {"shortest_edge": 784, "longest_edge": 9409}}, "from 0 to 9408"),
]


@pytest.mark.parametrize(("kind", "options", "pattern"), HUGE)
def test_options_cannot_make_images_larger(
    tmp_path: Path, kind: str, options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(InvalidRequestError, match=pattern) as caught:
        processor_at(make_hf(kind, tmp_path)).check_options(options)
    assert caught.value.param == f"mm_processor_kwargs.{next(iter(options))}"


def test_options_that_change_no_size_are_free(tmp_path: Path) -> None:
    processor = processor_at(make_hf("llava_next", tmp_path))
    options = {"image_mean": [100.0, 100.0, 100.0], "resample": 3, "do_pad": True}
    processor.check_options(options)
    processor.check_options({"image_grid_pinpoints": [[56, 112]]})
    assert processor.process("image", picture(30, 40, seed=0), options).num_embeds > 0


def test_an_option_that_divides_by_nothing_is_the_callers_mistake(tmp_path: Path) -> None:
    processor = processor_at(make_hf("idefics3", tmp_path))
    options = {"size": {"longest_edge": 0}}
    processor.check_options(options)
    with pytest.raises(InvalidRequestError, match="does not take this image"):
        processor.process("image", picture(30, 40, seed=0), options)


def test_a_line_of_pixels_is_refused(tmp_path: Path) -> None:
    processor = processor_at(make_hf("llava_next", tmp_path))
    assert processor.process("image", picture(1, 200, seed=0), {}).num_embeds > 0
    with pytest.raises(InvalidRequestError, match="aspect ratio of 201"):
        processor.process("image", picture(1, 201, seed=0), {})


def test_what_foreign_code_says_names_no_files() -> None:
    error = OSError(
        "cannot read /srv/models/one/tokenizer.json of a/b at 0x7f00aa, see https://a.b/c/d"
    )
    assert (
        adapter.error_text(error) == "OSError: cannot read a local file of a/b, see https://a.b/c/d"
    )


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    folder = make_hf("idefics3", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"Idefics3Processor\) cannot be built") as caught:
        processor_at(folder)
    assert str(tmp_path) not in caught.value.message


class _Silent(adapter.HfProcessorAdapter):
    """A processor that returns the text as it is."""

    def __init__(self) -> None:
        self._hears_at = None

    def placeholders(self, modality: Any) -> list[str]:
        return ["<one>", "<two>"]

    @property
    def rate(self) -> int:
        return 0

    def call(self, modality: Any, text: str, data: Any, options: Any) -> adapter.Arrays:
        if text == "<one>":
            raise ValueError("no <one> at 0x7f001234")
        return {"input_ids": np.array([[5, 6]])}

    def expanded(self, ids: Any) -> list[int]:
        return list(ids)


def test_a_processor_that_expands_nothing_is_refused() -> None:
    class Config:
        model_type = "strange"
        image_token_id = 9

    with pytest.raises(
        UnsupportedModelError, match=r"'strange'.*'<one>': ValueError: no <one>; '<two>'"
    ):
        processing.find_place(_Silent(), "image", Config())
    with pytest.raises(ConfigError, match="no audio_token_id or audio_token_index"):
        processing.fill_id(Config(), "audio")
