"""Deprecated kinds of images with the shapes that older scripts pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError, InvalidEmbeddingsError
from sensorium.multimodal.decode.image import ImageFeatureData, ImagePixelData
from tests.checkpoints import make_llava
from tests.parts import Parts, build_llm, processor_of
from tests.reliability.media import picture

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ROOM = {"num_kv_blocks": 200, "max_model_len": 512, "enable_mm_embeds": True}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    make_llava(folder)
    return folder


@pytest.fixture(scope="module")
def parts(folder: Path) -> Iterator[Parts]:
    with build_llm(folder, **ROOM) as parts:
        yield parts


@pytest.fixture(scope="module")
def llm(parts: Parts) -> LLM:
    return parts.llm


def seen(data: Any) -> dict[str, Any]:
    return {"prompt": "<image> what?", "multi_modal_data": data}


def tokens(llm: LLM, data: Any) -> list[int]:
    return list(llm.generate([seen(data)], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def test_pixels_of_the_shape_that_the_argument_names(llm: LLM) -> None:
    image = picture(56, 56)
    expected = tokens(llm, {"image": image})
    chw = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    for tensor in (chw, chw[None], chw[None].float(), chw[None].float() / 255):
        assert tokens(llm, ImagePixelData(tensor)) == expected
    assert tokens(llm, ImagePixelData(image)) == expected


def test_the_shape_is_checked_against_the_model(folder: Path) -> None:
    pixels = processor_of(folder).process("image", np.zeros((9, 7, 3), np.uint8), {})
    height, width = pixels.arrays["pixels"].shape[:2]
    with LLM(str(folder), image_input_shape=f"1,3,{height},{width}", **ROOM):
        pass
    with pytest.raises(ConfigError, match=f"makes {width} x {height} of every image") as caught:
        LLM(str(folder), image_input_shape="1,3,224,224", **ROOM)
    assert caught.value.param == "image_input_shape"


def test_features_are_what_the_projector_makes(llm: LLM, parts: Parts) -> None:
    hidden = parts.runner.model.shape.hidden_size
    [output] = llm.generate([seen({"image": picture()})], GREEDY, use_tqdm=False)
    embeds = torch.randn(1, output.num_item_tokens["image"], hidden)
    assert tokens(llm, ImageFeatureData(embeds)) == tokens(llm, {"image": embeds})
    assert "not the features of its tower" in " ".join(str(ImageFeatureData.__doc__).split())
    with pytest.raises(InvalidEmbeddingsError, match=f"hidden size {hidden}"):
        tokens(llm, ImageFeatureData(embeds[..., :-1]))
