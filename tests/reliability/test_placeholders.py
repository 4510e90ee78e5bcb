"""Prompts whose placeholders do not fit their items.

Found before anything runs, and the message names this model's placeholder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidEmbeddingsError, InvalidRequestError, PlaceholderMismatchError
from tests import checkpoints
from tests.checkpoints.hf import make_hf
from tests.parts import build_llm
from tests.reliability.media import picture

GREEDY = SamplingParams(temperature=0, max_tokens=4)
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "llava": (checkpoints.make_llava, "<image>", "<image>"),
    "phi3_v": (checkpoints.make_phi3_v, "<|image_1|>", "<|image_2|>"),
    "qwen2_5_vl": (checkpoints.make_qwen2_5_vl, QWEN, QWEN),
    "minicpmv": (checkpoints.make_minicpmv, "(<image>./</image>)", "(<image>./</image>)"),
    "onevision": (checkpoints.make_llava_onevision, "<image>", "<image>"),
    "transformers": (
        lambda folder: make_hf("gemma3", folder),
        "<start_of_image>",
        "<start_of_image>",
    ),
}
ROOM = {"num_kv_blocks": 200, "max_model_len": 1024, "enable_mm_embeds": True}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    make, first, second = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder)
    with LLM(str(folder), **ROOM) as llm:
        yield llm, first, second


def refused(llm: LLM, *prompts: Any) -> PlaceholderMismatchError:
    """The error of a list of prompts, of which the first is good.

    Nothing has run and no picture was loaded.
    """
    before = llm.stats().media
    good = {"prompt": "Hello"}
    with pytest.raises(PlaceholderMismatchError) as caught:
        llm.generate([good, *prompts], GREEDY, use_tqdm=False)
    assert caught.value.outputs is None, "found before anything ran"
    assert caught.value.index == 1
    assert caught.value.param == "prompt"
    assert llm.stats().media == before
    return caught.value


def prompt(text: str, num_images: int) -> dict[str, Any]:
    return {
        "prompt": text,
        "multi_modal_data": {"image": [picture(40, 40, i) for i in range(num_images)]},
    }


def test_the_message_names_the_placeholder(model: tuple[LLM, str, str]) -> None:
    llm, first, second = model
    error = refused(llm, prompt("What is it?", 1))
    assert "0 image placeholders for 1 image item." in error.message
    assert repr(first) in error.message
    error = refused(llm, prompt("What are they?", 2))
    assert repr(second) in error.message


def test_too_few_and_too_many(model: tuple[LLM, str, str]) -> None:
    llm, first, second = model
    few = refused(llm, prompt(f"{first} and?", 2))
    many = refused(llm, prompt(f"{first} and {second}?", 1))
    none = refused(llm, {"prompt": f"{first} and?"})
    assert all(repr(first) in error.message for error in (few, many))
    assert "for 0 image items. Pass the image in multi_modal_data" in none.message


def test_placeholders_in_full_length_pass(model: tuple[LLM, str, str]) -> None:
    """Ids that a caller has expanded hold none of the placeholders that a prompt would have, or
    many.
    """
    llm, first, second = model
    asked = prompt(f"{first} and {second}?", 2)
    (out,) = llm.generate([asked], GREEDY, use_tqdm=False)
    expanded = {**asked, "prompt_token_ids": list(out.prompt_token_ids or ())}
    del expanded["prompt"]
    (again,) = llm.generate([expanded], GREEDY, use_tqdm=False)
    assert again.prompt_token_ids == out.prompt_token_ids
    assert again.outputs[0].token_ids == out.outputs[0].token_ids


def test_the_guides_first_example(tmp_path: Path) -> None:
    """LLaVA's placeholder for Qwen2.5-VL."""
    checkpoints.make_qwen2_5_vl(tmp_path)
    with LLM(str(tmp_path), **ROOM) as llm, pytest.raises(PlaceholderMismatchError) as caught:
        llm.generate(prompt("USER: <image>\nWhat is it?\nASSISTANT:", 1), GREEDY)
    assert caught.value.message == (
        "The prompt has 0 image placeholders for 1 image item. Write "
        "'<|vision_start|><|image_pad|><|vision_end|>' where each image goes."
    )


def test_sounds_and_videos_likewise(tmp_path: Path) -> None:
    checkpoints.make_ultravox(tmp_path)
    sound = (np.zeros(800, np.float32), 16000)
    with LLM(str(tmp_path), num_kv_blocks=200, max_model_len=512) as llm:
        asked = {"prompt": "Hm?", "multi_modal_data": {"audio": sound}}
        assert "Write '<|audio|>' where each audio goes." in refused(llm, asked).message
        asked["prompt"] = "<|audio|> <|audio|>"
        assert "2 audio placeholders for 1 audio item" in refused(llm, asked).message


def test_two_images_in_one_part_of_embeddings(tmp_path: Path) -> None:
    checkpoints.make_llava(tmp_path)
    with build_llm(tmp_path, **ROOM) as parts:
        llm = parts.llm
        prompt = {"prompt": "<image>", "multi_modal_data": {"image": picture()}}
        [output] = llm.generate([prompt], GREEDY, use_tqdm=False)
        size = output.num_item_tokens["image"], parts.runner.model.shape.hidden_size
        two = torch.zeros(2, *size)
        for value in (two, {"image_embeds": two}, {"image_embeds": list(two)}):
            content = [
                {"type": "image_embeds", "image_embeds": value},
                {"type": "text", "text": "?"},
            ]
            with pytest.raises(
                InvalidEmbeddingsError, match="2 image items; send one part per"
            ) as e:
                llm.chat([{"role": "user", "content": content}], GREEDY)
            assert e.value.param == "messages[0].content[0].image_embeds"
        parts = [{"type": "image_embeds", "image_embeds": one} for one in (two[0], two[1:])]
        assert llm.chat([{"role": "user", "content": parts}], GREEDY)


@pytest.mark.parametrize(
    ("data", "uuids", "param", "message"),
    [
        ({"image": picture()}, {}, "prompt.multi_modal_uuids", "There is no entry 'image'; every "),
        ({}, {"image": "a"}, "prompt.multi_modal_uuids.image", "There are ids for 'image', but "),
        (
            {"image": [picture()] * 2},
            {"image": ["a"]},
            "prompt.multi_modal_uuids.image",
            "There is 1 id for 2 image items; pass one per item",
        ),
        (
            {"image": picture()},
            {"image": ["a", "b"]},
            "prompt.multi_modal_uuids.image",
            "There are 2 ids for 1 image item; pass",
        ),
        ([], None, "prompt.multi_modal_data", "prompt.multi_modal_data must be a mapping"),
    ],
)
def test_places_stand_once_in_a_message(data: Any, uuids: Any, param: str, message: str) -> None:
    from sensorium.engine.prompts.types import parse_prompt

    value = {"prompt": "x", "multi_modal_data": data, "multi_modal_uuids": uuids}
    with pytest.raises(InvalidRequestError) as caught:
        parse_prompt(value, enable_mm_embeds=False)
    assert caught.value.param == param
    assert caught.value.message.startswith(message)
    assert caught.value.message.count(param) <= 1


def test_a_chat_template_without_placeholders_is_named(tmp_path: Path) -> None:
    """Who writes a chat cannot write placeholders, which are text there: the template is at fault."""
    checkpoints.make_llava(tmp_path)
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    image = {"type": "image_pil", "image_pil": picture(40, 40, 1)}
    message = {"role": "user", "content": [image, {"type": "text", "text": "<image> What is it?"}]}
    with LLM(str(tmp_path), chat_template=template, **ROOM) as llm:
        for asked, several in (([message], ""), ([[message]], "Prompt 0: ")):
            with pytest.raises(PlaceholderMismatchError) as caught:
                llm.chat(asked, GREEDY, use_tqdm=False)
            assert caught.value.message == (
                f"{several}The prompt has 0 image placeholders for 1 image item. In a chat the "
                "template writes them, "
                "and this one does not write the model's own for each item: give another one "
                "(--chat-template "
                "FILE_OR_TEXT; in Python chat_template=…)."
            )
            assert caught.value.param == "messages"
