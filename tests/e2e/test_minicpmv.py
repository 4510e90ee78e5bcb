"""MiniCPM-V 2.6 through the offline API.

Placeholders that are no tokens, videos, chats, embeddings; against the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidEmbeddingsError, InvalidRequestError, PlaceholderMismatchError
from tests.checkpoints import make_minicpmv
from tests.models.harness import picture
from tests.models.plain_minicpmv import Item, PlainReference
from tests.parts import patient_llm

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ROOM = {"max_model_len": 400, "block_size": 8, "enable_mm_embeds": True}
IMAGE, VIDEO = "(<image>./</image>)", "(<video>./</video>)"
SMALL, WIDE, TALL = picture(40, 51, 0), picture(31, 130, 1), picture(200, 53, 2)
CLIP = [picture(60, 90, seed) for seed in range(3)]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS: list[tuple[str, list[Item]]] = [
    (user("How many birds?"), []),
    (user(f"{IMAGE}\nWhat is shown?"), [SMALL]),
    (f"first {IMAGE} and then{IMAGE}?", [WIDE, TALL]),
    (user(f"{VIDEO}\nWhat moves?"), [CLIP]),
    (f"{IMAGE}{VIDEO}({IMAGE})", [WIDE, CLIP, SMALL]),
    (f"(<video>/</video>) is none, {IMAGE} is one", [TALL]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minicpmv(tmp_path_factory.mktemp("minicpmv"), template=None)


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainReference:
    return PlainReference(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), num_kv_blocks=600, **ROOM) as llm:
        yield llm


def asked(text: str, items: list[Item], **more: Any) -> dict[str, Any]:
    images = [item for item in items if not isinstance(item, list)]
    videos = [item for item in items if isinstance(item, list)]
    data = {"image": images} if images else {}
    return {
        "prompt": text,
        "multi_modal_data": data | ({"video": videos} if videos else {}),
        **more,
    }


def answers(llm: LLM, prompts: list[dict[str, Any]]) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


def expected(plain: PlainReference, text: str, items: list[Item], **options: Any) -> list[int]:
    return plain.greedy(*plain.prompt(text, items, **options), NUM_TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_blocks": 600},
        {"num_kv_blocks": 600, "max_num_batched_tokens": 7},
        {"num_kv_blocks": 18, "max_num_batched_tokens": 64, "max_model_len": 128},
    ],
    ids=["roomy", "chunked", "preempted"],
)
def test_generate(folder: Path, plain: PlainReference, settings: dict[str, Any]) -> None:
    """Cold and warm."""
    right = [expected(plain, *prompt) for prompt in PROMPTS]
    with patient_llm(str(folder), **{**ROOM, **settings}) as llm:
        prompts = [asked(*prompt) for prompt in PROMPTS]
        assert answers(llm, prompts) == right
        assert answers(llm, prompts) == right
        if settings["num_kv_blocks"] == 18:
            assert llm.stats().num_preemptions > 0


def test_options_of_a_prompt(llm: LLM, plain: PlainReference) -> None:
    options = {"max_slice_nums": 2, "use_image_id": False}
    text, items = PROMPTS[4]
    found = answers(llm, [asked(text, items, mm_processor_kwargs=options)])
    assert found == [expected(plain, text, items, most=2, ids=False)]


def test_prompts_that_are_expanded_already(llm: LLM, plain: PlainReference) -> None:
    text, items = PROMPTS[2]
    ids, views = plain.prompt(text, items)
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": items}}
    assert answers(llm, [prompt]) == [plain.greedy(ids, views, NUM_TOKENS)]


def chat(llm: LLM, *parts: Any) -> tuple[str, list[int]]:
    (out,) = llm.chat([{"role": "user", "content": list(parts)}], GREEDY, use_tqdm=False)
    return out.prompt or "", out.outputs[0].token_ids


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def pil_part(image: np.ndarray) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": Image.fromarray(image)}


def test_chat_keeps_the_order_of_the_parts(llm: LLM, plain: PlainReference) -> None:
    prompt, tokens = chat(llm, text_part("one"), pil_part(WIDE), text_part("two"), pil_part(SMALL))
    text = SYSTEM + user(f"one\n{IMAGE}\ntwo\n{IMAGE}")
    assert prompt == text
    assert tokens == expected(plain, text, [WIDE, SMALL])


@pytest.mark.parametrize("interleaved", [False, True])
def test_templates_that_take_strings(
    tmp_path: Path, plain: PlainReference, interleaved: bool
) -> None:
    """As the published one: placeholders stand where the parts stand, or in front if that is
    asked for.
    """
    folder = make_minicpmv(tmp_path)
    options = {} if interleaved else {"interleave_mm_strings": False}
    with LLM(str(folder), num_kv_blocks=50, **options, **ROOM) as llm:
        prompt, tokens = chat(llm, text_part("one"), pil_part(SMALL), text_part("two"))
    text = f"one\n{IMAGE}\ntwo" if interleaved else f"{IMAGE}\none\ntwo"
    assert prompt == user(text)
    assert tokens == expected(plain, prompt, [SMALL])


def test_a_typed_placeholder_is_plain_text(llm: LLM) -> None:
    prompt, _ = chat(llm, text_part(f"What is {IMAGE} and <image> here?"))
    assert IMAGE in prompt
    (out,) = llm.chat([{"role": "user", "content": f"{IMAGE} <slice>"}], GREEDY, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    assert not {tokenizer.token_id(t) for t in ("<image>", "<slice>")} & set(out.prompt_token_ids)


def embeds_of(plain: PlainReference, image: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return plain.model.embeddings(plain.views(image)).flatten(0, 1)


@pytest.mark.parametrize("key", ["image_sizes", "image_size_list"])
@pytest.mark.filterwarnings("ignore:image_size_list:DeprecationWarning")
def test_embeddings_in_place_of_images(llm: LLM, plain: PlainReference, key: str) -> None:
    text, images = PROMPTS[2]
    pictures = [Image.fromarray(image) for image in images]
    source = {
        "image_embeds": [embeds_of(plain, image) for image in images],
        key: [image.size for image in pictures],
    }
    found = answers(llm, [{"prompt": text, "multi_modal_data": {"image": source}}])
    assert found == [expected(plain, text, images)]


def test_embeddings_in_a_chat(llm: LLM, plain: PlainReference) -> None:
    source = {"image_embeds": embeds_of(plain, TALL), "image_sizes": [TALL.shape[1::-1]]}
    part = {"type": "image_embeds", "image_embeds": source}
    _, tokens = chat(llm, part, text_part("What?"))
    assert tokens == expected(plain, SYSTEM + user(f"{IMAGE}\nWhat?"), [TALL])


def test_embeddings_of_a_video(llm: LLM, plain: PlainReference) -> None:
    views = [view for frame in CLIP for view in plain.views(frame, 1)]
    with torch.inference_mode():
        embeds = plain.model.embeddings(views).flatten(0, 1)
    text, items = PROMPTS[3]
    right = expected(plain, text, items)
    for source in (embeds[None], {"video_embeds": embeds, "num_frames": 3}):
        assert answers(llm, [{"prompt": text, "multi_modal_data": {"video": source}}]) == [right]


def test_refused_prompts(llm: LLM) -> None:
    with pytest.raises(PlaceholderMismatchError, match="1 image placeholder for 2 image items"):
        answers(llm, [asked(f"{IMAGE}?", [SMALL, WIDE])])
    with pytest.raises(PlaceholderMismatchError, match="1 image placeholder for 0 image items"):
        answers(llm, [asked(f"{IMAGE}?", [])])
    with pytest.raises(PlaceholderMismatchError, match="0 video placeholders for 1 video item"):
        answers(llm, [asked("no?", [CLIP])])
    with pytest.raises(InvalidRequestError, match="max_slice_nums must be"):
        answers(llm, [asked(*PROMPTS[1], mm_processor_kwargs={"max_slice_nums": -1})])
    source = {"image_embeds": torch.zeros(1, 20, 256), "image_sizes": [(9, 9)]}
    with pytest.raises(InvalidEmbeddingsError, match="9 x 9 pixels has 1 views") as caught:
        answers(llm, [{"prompt": f"{IMAGE}?", "multi_modal_data": {"image": source}}])
    assert caught.value.param == "prompt.multi_modal_data.image.image_embeds[0]"
