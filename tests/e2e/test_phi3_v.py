"""Phi-3.5-Vision through the offline API: numbered placeholders, several images, chats, embeddings.

Against a plain implementation.
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
from sensorium.errors import (
    InvalidEmbeddingsError,
    InvalidRequestError,
    PlaceholderMismatchError,
    PromptTooLongError,
)
from tests.checkpoints import make_phi3_v
from tests.models.harness import picture
from tests.models.plain_phi3_v import PlainPhi3V
from tests.parts import patient_llm

NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ROOM = {"max_model_len": 512, "block_size": 8, "enable_mm_embeds": True}
VLM2VEC = Path(__file__).parents[2] / "examples" / "templates" / "vlm2vec.jinja"
SMALL, WIDE, TALL = picture(40, 51, 0), picture(31, 130, 1), picture(200, 33, 2)
PROMPTS: list[tuple[str, list[np.ndarray]]] = [
    ("<|user|>\nHow many birds?<|end|>\n<|assistant|>\n", []),
    ("<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n", [SMALL]),
    ("<|image_1|><|image_2|>", [WIDE, TALL]),
    ("first <|image_2|> and then <|image_1|>?", [WIDE, TALL]),
    ("<|image_1|> or <|image_2|> or <|image_1|> again", [TALL, SMALL]),
    ("this <|image|> is a token of its own <|image_1|>", [SMALL]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phi3_v(tmp_path_factory.mktemp("phi3_v"), layout="resaved")


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainPhi3V:
    return PlainPhi3V(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), num_kv_blocks=600, **ROOM) as llm:
        yield llm


def asked(text: str, images: list[np.ndarray], **more: Any) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": images} if images else {}, **more}


def answers(llm: LLM, prompts: list[dict[str, Any]]) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_blocks": 600},
        {"num_kv_blocks": 600, "max_num_batched_tokens": 7},
        {"num_kv_blocks": 22, "max_num_batched_tokens": 64},
    ],
    ids=["roomy", "chunked", "preempted"],
)
def test_generate(folder: Path, plain: PlainPhi3V, settings: dict[str, Any]) -> None:
    """Cold and warm; an item that stands in two places of a prompt is encoded once and cut by
    chunks in both.
    """
    expected = [plain.greedy(text, images, NUM_TOKENS) for text, images in PROMPTS]
    with patient_llm(str(folder), **{**ROOM, "max_model_len": 144, **settings}) as llm:
        prompts = [asked(*prompt) for prompt in PROMPTS]
        assert answers(llm, prompts) == expected
        assert answers(llm, prompts) == expected
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
        assert stats.held_features == 0
        if settings["num_kv_blocks"] == 22:
            assert stats.num_preemptions > 0


def test_the_prompt_in_ids(llm: LLM, plain: PlainPhi3V) -> None:
    """A BOS begins every stretch of text, also an empty one.

    Ids expanded by the caller stand as they are.
    """
    views = [plain.embeds(image) for image in (WIDE, TALL)]
    (out,) = llm.generate(asked(*PROMPTS[2]), GREEDY, use_tqdm=False)
    image = plain.config["image_token_id"]
    assert out.prompt_token_ids == [1, *[image] * len(views[0]), 1, *[image] * len(views[1]), 1]
    again = {"prompt_token_ids": out.prompt_token_ids, "multi_modal_data": {"image": [WIDE, TALL]}}
    assert answers(llm, [again]) == [out.outputs[0].token_ids]


def test_other_numbers_of_crops(llm: LLM, plain: PlainPhi3V) -> None:
    text, images = PROMPTS[1]
    for num_crops in (1, 9):
        options = {"num_crops": num_crops}
        found = answers(llm, [asked(text, images, mm_processor_kwargs=options)])
        assert found == [plain.greedy(text, images, NUM_TOKENS, num_crops)]
    with pytest.raises(InvalidRequestError, match="num_crops must be an integer"):
        answers(llm, [asked(text, images, mm_processor_kwargs={"num_crops": 0})])


def part(image: np.ndarray) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": Image.fromarray(image)}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def chatted(llm: LLM, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
    (out,) = llm.chat(messages, GREEDY, use_tqdm=False, **options)
    return out.prompt, out.outputs[0].token_ids


def test_chat_with_two_images(llm: LLM, plain: PlainPhi3V) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [text("Which is larger?"), part(WIDE), part(TALL)]},
    ]
    prompt, tokens = chatted(llm, messages)
    assert prompt == (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nWhich is "
        "larger?\n<|image_1|>\n<|image_2|><|end|>\n<|assistant|>\n"
    )
    assert tokens == plain.greedy(prompt, [WIDE, TALL], NUM_TOKENS)


def test_chat_numbers_images_through_the_conversation(folder: Path, plain: PlainPhi3V) -> None:
    messages = [
        {"role": "user", "content": [text("Look:"), part(WIDE), text("What?")]},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": [text("And"), part(TALL)]},
    ]
    with LLM(str(folder), num_kv_blocks=600, **ROOM) as llm:
        prompt, tokens = chatted(llm, messages)
    assert prompt == (
        "<|user|>\nLook:\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\nA fox.<|end|>\n"
        "<|user|>\nAnd\n<|image_2|><|end|>\n<|assistant|>\n"
    )
    assert tokens == plain.greedy(prompt, [WIDE, TALL], NUM_TOKENS)


def test_a_template_may_number_the_images_in_another_order(folder: Path, plain: PlainPhi3V) -> None:
    template = "<|image_2|> after <|image_1|>: {{ messages[0].content[-1].text }}"
    options = {"chat_template": template, "chat_template_content_format": "openai"}
    messages = [{"role": "user", "content": [part(WIDE), part(TALL), text("so?")]}]
    with LLM(str(folder), num_kv_blocks=600, **options, **ROOM) as llm:
        prompt, tokens = chatted(llm, messages)
    assert prompt == "<|image_2|> after <|image_1|>: so?"
    assert tokens == plain.greedy(prompt, [WIDE, TALL], NUM_TOKENS)


def test_typed_placeholders_are_text_in_chats(llm: LLM, plain: PlainPhi3V) -> None:
    """Of the user's own, neither numbers in use nor others act; nor do role tokens."""
    typed = "is <|image_1|> like <|image_2|>, <|image_99999|> or <|end|>?"
    (out,) = llm.chat(
        [{"role": "user", "content": [part(SMALL), text(typed)]}], GREEDY, use_tqdm=False
    )
    image = plain.config["image_token_id"]
    assert out.prompt_token_ids.count(image) == len(plain.embeds(SMALL))
    assert out.prompt_token_ids.count(1) == 2
    assert out.prompt_token_ids.count(plain.tokenizer.token_to_id("<|end|>")) == 1
    assert typed in out.prompt
    alone = llm.chat([{"role": "user", "content": typed}], GREEDY, use_tqdm=False)[0]
    assert image not in alone.prompt_token_ids


def test_the_vlm2vec_template(folder: Path, plain: PlainPhi3V) -> None:
    """One message, its parts joined by spaces, no generation prompt."""
    with LLM(str(folder), num_kv_blocks=600, chat_template=str(VLM2VEC), **ROOM) as llm:
        parts = [part(WIDE), text("or"), part(TALL), text("<|image_1|>?")]
        prompt, tokens = chatted(llm, [{"role": "user", "content": parts}])
        assert prompt == "<s><|image_1|> or <|image_2|> <|image_1|>?"
        parts[-1] = text("which?")
        prompt, tokens = chatted(llm, [{"role": "user", "content": parts}])
        wanted = "<|image_1|> or <|image_2|> which?"  # the tokenizer writes the BOS itself
        assert prompt == "<s>" + wanted
        assert tokens == plain.greedy(wanted, [WIDE, TALL], NUM_TOKENS)
        prompt, tokens = chatted(llm, [{"role": "user", "content": "A cat and a dog"}])
        assert prompt == "<s>A cat and a dog"
        assert tokens == plain.greedy("A cat and a dog", [], NUM_TOKENS)
        with pytest.raises(InvalidRequestError, match="one message at a time"):
            chatted(llm, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_embeddings_in_place_of_images(llm: LLM, plain: PlainPhi3V) -> None:
    prompt, images = PROMPTS[3]
    views = [plain.embeds(image) for image in images]
    expected = [plain.greedy(prompt, images, NUM_TOKENS)]
    assert answers(llm, [asked(prompt, views)]) == expected  # type: ignore[arg-type]
    alike = torch.stack([plain.embeds(SMALL), plain.embeds(picture(50, 50, 9))])
    sized = {"image_embeds": alike, "image_sizes": torch.tensor([[112, 112]] * 2)}
    found = answers(llm, [{"prompt": prompt, "multi_modal_data": {"image": sized}}])
    assert found == [plain.greedy(prompt, [SMALL, picture(50, 50, 9)], NUM_TOKENS)]
    sized["image_sizes"] = torch.tensor([[112, 112], [56, 112]])
    with pytest.raises(InvalidEmbeddingsError, match="56 x 112") as caught:
        answers(llm, [{"prompt": prompt, "multi_modal_data": {"image": sized}}])
    assert caught.value.param == "prompt.multi_modal_data.image.image_embeds[1]"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<|image_1|> alone", "name the items 1, but there are 2"),
        ("<|image_1|><|image_3|>", "name the items 1, 3, but there are 2"),
        ("<|image_0|><|image_1|><|image_2|>", "name the items 0, 1, 2, but"),
        ("none", "0 image placeholders for 2 image items"),
        (f"<|image_{'9' * 5000}|>", "a number of 5000 digits"),
    ],
)
def test_wrong_placeholders(llm: LLM, prompt: str, message: str) -> None:
    with pytest.raises(PlaceholderMismatchError, match=message) as caught:
        answers(llm, [asked(prompt, [WIDE, TALL])])
    assert caught.value.param == "prompt"


def test_an_image_named_too_often_is_refused_before_it_is_placed(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError, match=f"{100 * 27} tokens"):
        answers(llm, [asked("<|image_1|>" * 100, [SMALL])])


def test_placeholders_without_end_are_refused_before_their_texts_are_tokenized(llm: LLM) -> None:
    """A thousand placeholders, and a BOS after each: the first that are too many end the search."""
    with pytest.raises(PromptTooLongError, match="has 513 tokens") as caught:
        answers(llm, [asked("<|image_1|>" * 1000, [SMALL])])
    assert caught.value.param == "prompt"


def test_the_end_of_a_turn_ends_an_answer(folder: Path) -> None:
    """The files name ``</s>`` only."""
    end = PlainPhi3V(folder).tokenizer.token_to_id("<|end|>")
    params = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[end])
    with LLM(str(folder), num_kv_blocks=100, **ROOM) as llm:
        (out,) = llm.generate("Hello", params, use_tqdm=False)
    assert out.outputs[0].finish_reason == "stop"
    assert out.outputs[0].token_ids == [end]
