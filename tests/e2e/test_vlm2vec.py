"""VLM2Vec's way to vectors, by its template, against a plain implementation.

Pictures, texts and both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sensorium import LLM, PoolingParams
from sensorium.errors import InvalidRequestError
from tests.checkpoints import make_phi3_v
from tests.models.harness import picture
from tests.models.plain_phi3_v import PlainPhi3V

TEMPLATE = Path(__file__).parents[2] / "examples" / "templates" / "vlm2vec.jinja"
SMALL, WIDE = picture(40, 51, 0), picture(31, 130, 1)
QUESTION = "Represent the given image with the following question: What is in the image"
CAPTION = "Find me an everyday image that matches the given caption: A cat and a dog."
INPUTS: list[tuple[str, list[np.ndarray]]] = [
    (QUESTION, [SMALL]),
    ("Represent the given image.", [WIDE]),
    ("Which is larger?", [WIDE, SMALL]),
    (CAPTION, []),
    ("A cat and a dog", []),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phi3_v(tmp_path_factory.mktemp("vlm2vec"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """The reference's vectors of ``INPUTS``, the texts behind numbered tags of their pictures."""
    plain = PlainPhi3V(folder)
    return np.array([vector(plain, text, images) for text, images in INPUTS])


@torch.inference_mode()
def vector(plain: PlainPhi3V, text: str, images: Sequence[np.ndarray]) -> np.ndarray:
    """The last hidden state after the final norm at the last token, to length 1."""
    views = [plain.embeds(image) for image in images]
    tags = " ".join(f"<|image_{number}|>" for number in range(1, len(images) + 1))
    ids = torch.tensor(plain.ids(f"{tags} {text}" if images else text, views))
    embeds = plain.model.model.embed_tokens(ids.clamp_min(0))
    for number, view in enumerate(views, start=1):
        embeds[ids == -number] = view
    states = plain.model.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
    return F.normalize(states[0, -1], dim=-1).numpy()


@pytest.fixture(scope="module", params=[7, 512])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(
        str(folder),
        runner="pooling",
        chat_template=str(TEMPLATE),
        max_model_len=512,
        num_kv_blocks=200,
        block_size=16,
        max_num_batched_tokens=request.param,
        max_num_seqs=4,
    ) as llm:
        yield llm


def test_messages_by_the_template(llm: LLM, expected: np.ndarray) -> None:
    prompts = []
    for text, images in INPUTS:
        parts: list[dict[str, Any]] = [
            {"type": "image_pil", "image_pil": Image.fromarray(image)} for image in images
        ]
        parts.append({"type": "text", "text": text})
        prompts.append({"messages": [{"role": "user", "content": parts}]})
    for _ in ("cold", "warm"):
        outputs = llm.embed(prompts, use_tqdm=False)
        found = [output.outputs.embedding for output in outputs]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert outputs[0].prompt == f"<s><|image_1|> {QUESTION}"
    two = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(InvalidRequestError, match="one message at a time"):
        llm.embed(two)


def test_raw_prompts(llm: LLM, expected: np.ndarray) -> None:
    prompts = [
        {
            "prompt": " ".join([*(f"<|image_{i + 1}|>" for i in range(len(images))), text]),
            "multi_modal_data": {"image": images} if images else {},
        }
        for text, images in INPUTS
    ]
    outputs = llm.embed(prompts, use_tqdm=False)
    np.testing.assert_allclose(
        [output.outputs.embedding for output in outputs], expected, atol=1e-4
    )
    [raw] = llm.embed(INPUTS[4][0], pooling_params=PoolingParams(normalize=False), use_tqdm=False)
    assert np.linalg.norm(raw.outputs.embedding) > 2
