"""LLaVA-OneVision in the engine.

Images, clips and embeddings together, cut up, preempted and cached; its templates.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidEmbeddingsError
from sensorium.multimodal.items import Decoded, Video
from tests.checkpoints import make_llava_onevision
from tests.checkpoints.llava_onevision import OLDER_TEMPLATE
from tests.e2e.settings import settings
from tests.models.harness import Running, picture, text_ids
from tests.models.onevision import OnevisionReference, clip
from tests.parts import patient_llm

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
WIDE, TALL, SQUARE = picture(52, 130, 1), picture(88, 50, 2), picture(44, 44, 3)
PROMPTS: list[tuple[str, list[Decoded]]] = [
    ("How many birds are there?", []),
    ("<image>\nWhat is shown?", [WIDE]),
    ("<image>\nor<image>?", [WIDE, TALL]),
    ("<image><image><image>\nWhich?", [TALL, SQUARE, WIDE]),
    ("<video>\nWhat happens?", [clip(5, 33, 70)]),
    ("Is <image> in <video>?", [SQUARE, clip(3, 70, 33, 1)]),
    ("<video>\nand then <video>", [clip(3, 33, 70, 2), clip(3, 20, 20, 3)]),
]
SETTINGS = settings(scarce_blocks=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_model_len=180, enable_mm_embeds=True, **SETTINGS["roomy"]) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(folder: Path, roomy: LLM) -> list[list[int]]:
    """The reference's answers to the prompts as ``roomy`` expands them."""
    reference, found = OnevisionReference(folder), []
    for out, (_, media) in zip(answers(roomy), PROMPTS, strict=True):
        seq = Running(list(out.prompt_token_ids), [], None, 0, [])
        found.append(reference.greedy(seq, GREEDY.max_tokens, media))
    assert len(set(map(tuple, found))) == len(PROMPTS), "answers must vary"
    return found


def asked(text: str, media: list[Decoded]) -> dict[str, Any]:
    data: dict[str, list[Any]] = {"image": [], "video": []}
    for item in media:
        if isinstance(item, Video):
            data["video"].append(item.frames)
        else:
            data["image"].append(Image.fromarray(item))
    return {"prompt": text, "multi_modal_data": {key: own for key, own in data.items() if own}}


def answers(llm: LLM) -> list[Any]:
    return llm.generate([asked(*prompt) for prompt in PROMPTS], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_to_the_reference(folder: Path, expected: list[list[int]], setting: str) -> None:
    with patient_llm(str(folder), max_model_len=180, **SETTINGS[setting]) as llm:
        for _ in range(2):
            assert [out.outputs[0].token_ids for out in answers(llm)] == expected
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
        if setting == "preempted":
            assert stats.num_preemptions > 0
        if setting == "roomy":
            # Of the three pictures two stand alone somewhere; in company all of them look
            # different.
            assert stats.media["preprocess_count"] == 2 + 3 + 4


def test_embeddings_in_place_of_items(roomy: LLM, folder: Path) -> None:
    """Of one image, of several and of a clip, as the reference's encoder makes them."""
    reference = OnevisionReference(folder).model.model
    for index in (1, 3, 4):
        text, media = PROMPTS[index]
        plain = answers(roomy)[index]
        seq = Running(list(plain.prompt_token_ids), [], None, 0, [])
        inputs = OnevisionReference(folder).inputs(seq, media)
        with torch.inference_mode():
            if "pixel_values_videos" in inputs:
                embeds = reference.get_video_features(inputs["pixel_values_videos"]).pooler_output
                data: dict[str, Any] = {"video": embeds}
            else:
                names = ("pixel_values", "image_sizes", "batch_num_images")
                own = {name: inputs[name] for name in names}
                embeds = list(reference.get_image_features(**own).pooler_output)
                data = {"image": {"image_embeds": embeds, "image_sizes": inputs["image_sizes"]}}
        (out,) = roomy.generate({"prompt": text, "multi_modal_data": data}, GREEDY, use_tqdm=False)
        assert out.outputs[0].token_ids == plain.outputs[0].token_ids


def test_embeddings_of_several_images_are_found_by_their_ids(roomy: LLM) -> None:
    """Given as one tensor, and then by their ids alone."""
    embeds = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for data in (embeds, [None, None]):
        ids = {"image": ["left", "right"]}
        prompt = {"prompt": "<image><image>?", "multi_modal_uuids": ids}
        (out,) = roomy.generate(
            {**prompt, "multi_modal_data": {"image": data}}, GREEDY, use_tqdm=False
        )
        found.append(out.outputs[0].token_ids)
    assert found[0] == found[1]


def test_embeddings_of_nothing_are_refused(roomy: LLM) -> None:
    data = {"image": torch.zeros(1, 0, 64)}
    with pytest.raises(InvalidEmbeddingsError, match="at least one embedding"):
        roomy.generate({"prompt": "<image>?", "multi_modal_data": data}, GREEDY, use_tqdm=False)


GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' "
    "}}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + "
    "part['text'] }}"
    "{% endfor %}{% else %}{% for part in message['content'] | selectattr('type', 'equalto', "
    "'text') %}"
    "{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% "
    "endif %}"
)
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "left"},
            {"type": "image_pil", "image_pil": Image.fromarray(WIDE)},
            {"type": "text", "text": "right"},
            {"type": "image_pil", "image_pil": Image.fromarray(TALL)},
        ],
    },
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Why <image>?"},
]
NEWER = (
    "<|im_start|>user {0}{0}\nleft\nright<|im_end|><|im_start|>assistant \nyes<|im_end|>"
    "<|im_start|>user \nWhy {1}?<|im_end|><|im_start|>assistant\n"
)
OLDER = (
    "<|im_start|>user\n{0}\n{0}\nleftright<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    "<|im_start|>user\nWhy {1}?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("template", "rendered"), [(None, NEWER), (GENERATION, NEWER), (OLDER_TEMPLATE, OLDER)]
)
def test_both_revisions_of_the_template(
    tmp_path: Path, template: str | None, rendered: str
) -> None:
    """Images stand before the texts; what a user spells like a placeholder stays text."""
    folder = make_llava_onevision(tmp_path, template=template)
    with LLM(str(folder), max_model_len=256, **SETTINGS["roomy"]) as llm:
        (out,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False)
    image_id = text_ids(folder, "<image>")[0]
    ids = list(out.prompt_token_ids)
    assert ids.count(image_id) == 2 * (9 + 1)
    before, _, after = rendered.format("<image>" * 10, "\0").partition("\0")
    before_ids = text_ids(folder, before)
    assert ids[: len(before_ids)] == before_ids
    assert ids[-len(text_ids(folder, after)) :] == text_ids(folder, after)
