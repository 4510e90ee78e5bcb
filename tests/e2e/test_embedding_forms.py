"""Precomputed embeddings in every documented form, of every family.

The answer is that to the items themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidEmbeddingsError
from tests import checkpoints
from tests.checkpoints.hf import make_hf
from tests.parts import Parts, build_llm
from tests.reliability.media import picture

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Extra = Callable[[list[Any]], dict[str, Any]]


def grids(modality: str) -> Extra:
    return lambda found: {f"{modality}_grid_thw": torch.tensor([f.meta["grid"] for f in found])}


def listed_grids(found: list[Any]) -> dict[str, Any]:
    return {"image_grid_thw": [torch.tensor(f.meta["grid"]) for f in found]}


def sizes(found: list[Any]) -> dict[str, Any]:
    return {"image_sizes": [tuple(reversed(f.meta["original_size"])) for f in found]}


def alone(found: list[Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, its placeholder of the second and of the first item, and what its
    embeddings need beside them: nothing when they may come bare.
    """

    make: Callable[[Path], Any]
    modality: str
    placeholders: tuple[str, str]
    extras: tuple[Extra, ...] = ()


def twice(text: str) -> tuple[str, str]:
    return text, text


IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
CASES = {
    "llava": Case(checkpoints.make_llava, "image", twice("<image>")),
    "phi3_v": Case(checkpoints.make_phi3_v, "image", ("<|image_1|>", "<|image_2|>")),
    "onevision": Case(checkpoints.make_llava_onevision, "image", twice("<image>")),
    "onevision video": Case(checkpoints.make_llava_onevision, "video", twice("<video>")),
    "qwen2_vl": Case(
        checkpoints.make_qwen2_vl, "image", twice(IMAGE), (grids("image"), listed_grids)
    ),
    "qwen2_vl video": Case(checkpoints.make_qwen2_vl, "video", twice(VIDEO), (grids("video"),)),
    "qwen2_5_vl": Case(checkpoints.make_qwen2_5_vl, "image", twice(IMAGE), (grids("image"),)),
    "qwen3_vl": Case(checkpoints.make_qwen3_vl, "image", twice(IMAGE), (grids("image"),)),
    "minicpmv": Case(checkpoints.make_minicpmv, "image", twice("(<image>./</image>)"), (sizes,)),
    "minicpmv video": Case(checkpoints.make_minicpmv, "video", twice("(<video>./</video>)")),
    "ultravox": Case(checkpoints.make_ultravox, "audio", twice("<|audio|>")),
    "transformers": Case(
        lambda folder: make_hf("gemma3", folder), "image", twice("<start_of_image>")
    ),
}


def items_of(modality: str) -> list[Any]:
    """Two items of one size."""
    if modality == "audio":
        rng = np.random.default_rng(0)
        return [(rng.standard_normal(8000).astype(np.float32) / 10, 16000) for _ in range(2)]
    seeds = (range(4), range(4, 8)) if modality == "video" else ((0,), (1,))
    pictures = [[np.asarray(picture(56, 56, seed)) for seed in some] for some in seeds]
    if modality == "video":
        return [np.stack(frames) for frames in pictures]
    return [Image.fromarray(frames[0]) for frames in pictures]


@dataclass
class Asked:
    llm: LLM
    case: Case
    items: list[Any]
    features: list[Any]
    embeds: list[torch.Tensor]
    alone: torch.Tensor
    """Embeddings of the first item where there is no second: of LLaVA-OneVision others."""

    def tokens(self, value: Any, num_items: int = 2) -> tuple[list[int], list[int]]:
        prompt = " and ".join(self.case.placeholders[:num_items]) + " so?"
        data = {self.case.modality: value}
        (out,) = self.llm.generate([{"prompt": prompt, "multi_modal_data": data}], GREEDY)
        return list(out.prompt_token_ids or ()), list(out.outputs[0].token_ids)

    def wrapped(self, embeds: Any, extra: Extra, items: slice = slice(None)) -> dict[str, Any]:
        return {f"{self.case.modality}_embeds": embeds, **extra(self.features[items])}


@pytest.fixture(scope="module", params=sorted(CASES))
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asked]:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    case.make(folder)
    room = {"num_kv_blocks": 200, "max_model_len": 1024}
    with build_llm(folder, enable_mm_embeds=True, **room) as parts:
        items = items_of(case.modality)
        features, embeds = encoded(parts, case, items)
        _, (first,) = encoded(parts, case, items[:1])
        yield Asked(parts.llm, case, items, features, embeds, first)


def encoded(parts: Parts, case: Case, items: list[Any]) -> tuple[list[Any], list[torch.Tensor]]:
    """Features and embeddings of the items of a prompt."""
    text = " ".join(case.placeholders[: len(items)])
    prompt = {"prompt": text, "multi_modal_data": {case.modality: items}}
    prepared = parts.prepare(prompt)
    features = [item.features for item in prepared.items]
    with torch.inference_mode():
        return features, [made.clone() for made in parts.runner.model.encode(features)]


def test_every_form_of_two_items(asked: Asked) -> None:
    expected = asked.tokens(asked.items)
    assert expected != asked.tokens(asked.items[::-1])
    stacked = torch.stack(asked.embeds)
    forms: list[Any] = []
    for extra in asked.case.extras or (alone,):
        forms += [asked.wrapped(stacked, extra), asked.wrapped(asked.embeds, extra)]
        forms.append(asked.wrapped([embeds[None] for embeds in asked.embeds], extra))
        forms.append(
            [asked.wrapped(e[None], extra, slice(i, i + 1)) for i, e in enumerate(stacked)]
        )
    if not asked.case.extras:
        forms += [stacked, asked.embeds]
    for number, form in enumerate(forms):
        assert asked.tokens(form) == expected, number


def test_every_form_of_one_item(asked: Asked) -> None:
    first = asked.alone
    expected = asked.tokens(asked.items[0], 1)
    forms: list[Any] = []
    for extra in asked.case.extras or (alone,):
        forms += [asked.wrapped(e, extra, slice(1)) for e in (first, first[None], [first])]
    if not asked.case.extras:
        forms += [first, first[None], [first]]
    for number, form in enumerate(forms):
        assert asked.tokens(form, 1) == expected, number


def test_raw_items_and_embeddings_in_one_prompt(asked: Asked) -> None:
    expected = asked.tokens(asked.items)
    extra = (asked.case.extras or (alone,))[0]
    first, second = (
        asked.wrapped(embeds, extra, slice(i, i + 1)) for i, embeds in enumerate(asked.embeds)
    )
    assert asked.tokens([asked.items[0], second]) == expected
    assert asked.tokens([first, asked.items[1]]) == expected
    if not asked.case.extras:
        assert asked.tokens([asked.items[0], asked.embeds[1]]) == expected
        if asked.case.modality != "video":  # of three dimensions is a frame there
            assert asked.tokens([asked.embeds[0][None], asked.items[1]]) == expected


def test_an_item_of_another_width_is_named(asked: Asked) -> None:
    """It never reaches the engine, and the message says which it is."""
    extra = (asked.case.extras or (alone,))[0]
    wrong = [asked.embeds[0], asked.embeds[1][:, :-1]]
    with pytest.raises(InvalidEmbeddingsError, match="hidden size") as caught:
        asked.tokens(asked.wrapped(wrong, extra))
    modality = asked.case.modality
    assert caught.value.param == f"prompt.multi_modal_data.{modality}.{modality}_embeds[1]"
