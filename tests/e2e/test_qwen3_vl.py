"""Qwen3-VL in the engine: what its first layers add is cut up, preempted and cached like the
embeddings themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError, InvalidEmbeddingsError
from sensorium.models import loader
from tests.checkpoints import make_qwen3_vl
from tests.e2e.settings import settings
from tests.models.harness import Harness, Reference, Running, picture
from tests.parts import patient_llm

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
HERE = "<|vision_start|><|image_pad|><|vision_end|>"
WIDE, TALL, SMALL = picture(70, 200, 1), picture(170, 65, 2), picture(3, 5, 3)
PROMPTS: list[tuple[str, list[np.ndarray]]] = [
    ("How many birds are there?", []),
    (f"{HERE}What is shown?", [WIDE]),
    (f"Is {HERE} left of {HERE}?", [TALL, WIDE]),
    (f"{HERE}{HERE}{HERE}", [SMALL, TALL, SMALL]),
]
SETTINGS = settings(scarce_blocks=17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


def asked(text: str, images: list[np.ndarray]) -> dict[str, Any]:
    data = {"image": [Image.fromarray(image) for image in images]} if images else {}
    return {"prompt": text, "multi_modal_data": data}


def answers(llm: LLM) -> list[Any]:
    return llm.generate([asked(*prompt) for prompt in PROMPTS], GREEDY, use_tqdm=False)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """The reference's answers to the prompts as they are expanded here."""
    with LLM(str(folder), max_model_len=128, **SETTINGS["roomy"]) as llm:
        ids = [list(out.prompt_token_ids) for out in answers(llm)]
    reference = Reference(folder)
    found = [
        reference.greedy(Running(own, [], None, 0, []), GREEDY.max_tokens or 0, images)
        for own, (_, images) in zip(ids, PROMPTS, strict=True)
    ]
    assert len(set(map(tuple, found))) == len(PROMPTS), "answers must vary"
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_to_the_reference(folder: Path, expected: list[list[int]], setting: str) -> None:
    with patient_llm(str(folder), max_model_len=128, **SETTINGS[setting]) as llm:
        for _ in range(2):
            assert [out.outputs[0].token_ids for out in answers(llm)] == expected
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
        if setting == "preempted":
            assert stats.num_preemptions > 0


def test_embeddings_in_place_of_images(folder: Path, expected: list[list[int]]) -> None:
    """They are as wide as what the encoder makes.

    With what the first layers add beside what they begin with.
    """
    harness = Harness(loader.load(str(folder), device="cpu"))
    text, images = PROMPTS[2]
    features = harness.process(images)
    with torch.inference_mode():
        embeds = torch.cat(harness.model.encode(features))
    assert embeds.shape[1] == 3 * 64
    data = {
        "image_embeds": embeds,
        "image_grid_thw": torch.tensor([f.meta["grid"] for f in features]),
    }
    options = {"enable_mm_embeds": True, **SETTINGS["cut up"]}
    with LLM(str(folder), max_model_len=128, **options) as llm:
        prompt = {"prompt": text, "multi_modal_data": {"image": data}}
        (out,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert out.outputs[0].token_ids == expected[2]
        data["image_embeds"] = embeds[:, :64]
        with pytest.raises(InvalidEmbeddingsError, match="hidden size 192"):
            llm.generate(prompt, GREEDY, use_tqdm=False)


def test_without_images_the_stream_is_plain(folder: Path, expected: list[list[int]]) -> None:
    options = {"limit_mm_per_prompt": {"image": 0}, **SETTINGS["roomy"]}
    with LLM(str(folder), max_model_len=128, **options) as llm:
        (out,) = llm.generate(PROMPTS[0][0], GREEDY, use_tqdm=False)
    assert out.outputs[0].token_ids == expected[0]


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"deepstack_visual_indexes": [0, 3]}, {}, "different indices below 3, got"),
        ({"deepstack_visual_indexes": [0, 0]}, {}, "different indices below 3, got"),
        ({"deepstack_visual_indexes": 1}, {}, "different indices below 3, got 1"),
        ({"num_position_embeddings": 35}, {}, "35 is no square"),
        ({"out_hidden_size": 60}, {}, "output size 60 is not the decoder's hidden size"),
        ({}, {"num_hidden_layers": 1}, "there are 2 of them, but only 1 layers"),
        ({}, {"rope_scaling": "interleaved"}, "text_config.rope_scaling must be a mapping"),
    ],
)
def test_impossible_configurations(
    folder: Path, vision: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    overrides = {"vision_config": vision, "text_config": text}
    with pytest.raises(ConfigError, match=message):
        loader.load(str(folder), device="cpu", hf_overrides=overrides)
