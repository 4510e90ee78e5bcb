"""Two ranks give the tokens of one process, with prompts in chunks, preempted and from caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sensorium import LLM, SamplingParams
from tests.e2e.test_invariance import FAMILIES, THROUGH_TRANSFORMERS, Prompts, make_prompts
from tests.parts import build_patient
from tests.ranks import in_threads

NATIVE = [f for f in FAMILIES if f not in (*THROUGH_TRANSFORMERS, "mistral, windowed")]
SIZE = 16
"""Tokens of a block."""
NUM_TOKENS = 2 * SIZE
"""Every sequence grows by two blocks."""


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        in_threads(patch)
        yield


def answers(llm: LLM, prompts: Prompts, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def scarce(lengths: list[int]) -> dict[str, int]:
    """Return options with which two prompts of these lengths, cut up, displace each other."""
    num_blocks = sum(-(-length // SIZE) for length in lengths)
    return {
        "block_size": SIZE,
        "num_kv_blocks": num_blocks + 1,
        "max_model_len": max(lengths) + NUM_TOKENS,
        "max_num_batched_tokens": sum(lengths) // 3,
    }


@pytest.mark.parametrize("family", NATIVE)
def test_every_family(family: str, tmp_path: Path, threads: None) -> None:
    make, modality, placeholder = FAMILIES[family]
    make(tmp_path)
    prompts = make_prompts(modality, placeholder, count=7)
    prompts = prompts[1:3] if modality else [prompts[3], prompts[6]]
    with LLM(str(tmp_path), dtype="float32", num_kv_blocks=400, max_model_len=512) as llm:
        expected = answers(llm, prompts)
        outs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    options = scarce([len(out.prompt_token_ids) for out in outs])
    with build_patient(tmp_path, dtype="float32", tensor_parallel_size=2, **options) as parts:
        assert answers(parts.llm, prompts) == expected
        assert parts.engine.stats().num_preemptions
        assert answers(parts.llm, prompts, 3) == [tokens[:3] for tokens in expected]
        assert parts.engine.stats().prefix_hits
