"""Deprecated keywords that described images by hand.

Accepted where they are right, refused where they are wrong.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.config import engine_config
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.errors import ConfigError
from sensorium.multimodal.decode.image import ImageFeatureData, ImagePixelData
from tests.checkpoints import make_llava, make_phi3_v, make_qwen2_vl, make_text

RIGHT: dict[str, Any] = {
    "image_input_type": "pixel_values",
    "image_input_shape": "1,3,56,56",
    "image_feature_size": 16,
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def prepare(folder: Path, **older: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = engine_config(model=str(folder), **older)
    InputProcessor(config).close()


def test_right_ones_are_accepted(llava: Path) -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
        engine_config(model=str(llava), **RIGHT)
    assert len(caught) == len(RIGHT)
    prepare(llava, **RIGHT)
    prepare(llava, image_input_shape=(1, 3, 56, 56), image_feature_size=16)
    features = {"image_input_type": "image_features", "image_input_shape": "1,16,64"}
    prepare(llava, **features, image_feature_size=16)


def test_of_placeholders_that_are_no_tokens_the_filling_counts(tmp_path: Path) -> None:
    """Of Phi-3.5-Vision; the number of embeddings follows the options that the model is started
    with.
    """
    folder = make_phi3_v(tmp_path)
    token_id = json.loads((folder / "config.json").read_text())["image_token_id"]
    shape = {"image_token_id": token_id, "image_input_shape": "1,3,168,224"}
    prepare(folder, **shape, image_feature_size=27)
    more = {"mm_processor_kwargs": {"num_crops": 16}}
    prepare(folder, **shape, **more, image_feature_size=(3 * 4 + 1) * 4 + 1 + (3 + 1) * 2)
    with pytest.raises(ConfigError, match=f"is 7, but the model's is {token_id}"):
        prepare(folder, image_token_id=7)


@pytest.mark.parametrize(
    ("older", "message"),
    [
        ({"image_token_id": 7}, "image_token_id: is 7, but the model's is"),
        ({**RIGHT, "image_feature_size": 576}, "has 16 embeddings in this model"),
        ({"image_input_shape": "1,4,56,56"}, "must be 1,3,height,width"),
        ({"image_input_shape": "1,3,336,336"}, "this model makes 56 x 56 of every image"),
        ({"image_input_shape": "1,3,65000,65000"}, "more than 178956970 pixels"),
        ({"image_feature_size": 576}, "says 576, but an image has 16 embeddings"),
        ({"image_input_shape": "1,576,64"}, "says 576, but an image has 16 embeddings"),
        (
            {"image_input_type": "image_features", "image_input_shape": "1,1,576,64"},
            "image_input_shape: says 576, but an image has 16",
        ),
        ({"image_input_shape": "1,16,64", "image_feature_size": 5}, "says 16"),
    ],
)
def test_wrong_ones_are_refused(llava: Path, older: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(llava, **older)


def test_sizes_depend_on_the_picture_where_the_model_says_so(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    prepare(folder, image_input_shape="1,3,56,84", image_feature_size=6)
    prepare(folder, image_feature_size=576)
    prepare(folder, image_input_shape="1,576,64")
    with pytest.raises(ConfigError, match="has 6 embeddings"):
        prepare(folder, image_input_shape="1,3,56,84", image_feature_size=7)


def test_a_text_model_has_no_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no images"):
        prepare(make_text("llama", tmp_path), image_token_id=5)


@pytest.mark.parametrize("shape", ["336", "1,3,336,0", "a,b,c", "1,3,336,336,1", ""])
def test_shapes_that_are_none(shape: str) -> None:
    with pytest.raises(ConfigError, match="three or four sizes"):
        engine_config(image_input_shape=shape)


def test_wrapped_pictures_and_embeddings(llava: Path) -> None:
    """The wrappers of the early API give what the plain values give."""
    picture, prompt = Image.new("RGB", (60, 40), (200, 40, 90)), "USER: <image>\nWhat?\nASSISTANT:"
    embeds = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0, max_tokens=6)
    with LLM(model=str(llava), enable_mm_embeds=True, num_kv_blocks=64) as llm:
        for wrap, value in ((ImagePixelData, picture), (ImageFeatureData, embeds)):
            plain = {"prompt": prompt, "multi_modal_data": {"image": value}}
            with pytest.warns(DeprecationWarning, match="multi_modal_data="):
                older = {"prompt": prompt, "multi_modal_data": wrap(value)}
            [a], [b] = (llm.generate(p, params, use_tqdm=False) for p in (plain, older))
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
