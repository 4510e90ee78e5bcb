"""Greedy tokens equal those of ``transformers``, however the work is cut up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, SamplingParams
from tests import checkpoints
from tests.e2e.prompts import (
    MixedPrompt,
    llava_inputs,
    mixed_prompts,
    qwen2_vl_inputs,
    reference_tokens,
)
from tests.parts import patient_llm

NUM_PROMPTS = 40
NUM_TOKENS = 12
LLAVA_CHAT = ("USER: ", " ASSISTANT:")
QWEN_CHAT = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


@dataclass(frozen=True)
class Case:
    """A checkpoint, its prompts and what the reference answers."""

    folder: Path
    prompts: list[MixedPrompt]
    tokens: list[list[int]]


def _case(
    folder: Path,
    make: Callable[[Path], Any],
    inputs: Callable[[Path, list[MixedPrompt]], list[dict[str, Any]]],
    placeholder: str,
    chat: tuple[str, str],
) -> Case:
    make(folder)
    prompts = mixed_prompts(NUM_PROMPTS, placeholder, chat=chat)
    return Case(folder, prompts, reference_tokens(folder, inputs(folder, prompts), NUM_TOKENS))


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "qwen2_5_vl"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        return _case(folder, checkpoints.make_llava, llava_inputs, "<image>", LLAVA_CHAT)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    make = getattr(checkpoints, f"make_{request.param}")
    return _case(folder, make, qwen2_vl_inputs, placeholder, QWEN_CHAT)


# Block sizes and budgets so small that prompts are cut inside images, and so few blocks that
# sequences push each other out.
SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {"num_kv_blocks": 2000, "block_size": 16, "max_num_seqs": 40},
    "alone": {"num_kv_blocks": 200, "block_size": 16, "max_num_seqs": 1},
    "chunked": {"num_kv_blocks": 2000, "block_size": 8, "max_num_batched_tokens": 7},
    "preempted": {"num_kv_blocks": 40, "block_size": 8, "max_num_batched_tokens": 64},
    "no prefix cache": {
        "num_kv_blocks": 60,
        "block_size": 8,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 33,
    },
    "small encoder cache": {
        "num_kv_blocks": 500,
        "block_size": 16,
        "mm_encoder_cache_gb": 0.001,
        "mm_processor_cache_gb": 0.0,
    },
}


@pytest.fixture(params=SETTINGS)
def llm(request: pytest.FixtureRequest, case: Case) -> Iterator[LLM]:
    with patient_llm(str(case.folder), max_model_len=300, **SETTINGS[request.param]) as llm:
        yield llm


def answers(llm: LLM, prompts: list[MixedPrompt]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    asked = [
        {"prompt": p.text, "multi_modal_data": {"image": p.images} if p.images else {}}
        for p in prompts
    ]
    return [out.outputs[0].token_ids for out in llm.generate(asked, params, use_tqdm=False)]


@pytest.mark.slow
def test_equal_to_the_reference_cold_and_warm(
    llm: LLM, case: Case, request: pytest.FixtureRequest
) -> None:
    setting = request.node.callspec.params["llm"]
    assert answers(llm, case.prompts) == case.tokens
    cold = llm.stats()
    assert answers(llm, case.prompts) == case.tokens
    warm = llm.stats()
    if setting == "preempted":
        assert cold.num_preemptions > 0
    if setting in ("roomy", "chunked"):
        assert warm.prefix_hits > cold.prefix_hits
        for name in ("decode_count", "preprocess_count"):
            assert warm.media[name] == cold.media[name], (
                "a picture seen before is not processed again"
            )
    assert warm.kv_blocks_used == 0
    assert warm.held_features == 0
