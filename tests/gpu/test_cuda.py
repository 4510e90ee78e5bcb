"""The engine on an NVIDIA GPU gives the tokens of the engine on the CPU.

Skipped, with the reason, without one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium import LLM, SamplingParams
from tests import checkpoints
from tests.e2e.prompts import mixed_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

PLACEHOLDERS = {"llava": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
MAKERS: dict[str, Callable[[Path], Any]] = {
    "llava": checkpoints.make_llava,
    "qwen2_vl": checkpoints.make_qwen2_vl,
}


def answers(folder: Path, device: str, placeholder: str) -> list[list[int]]:
    prompts = [
        {"prompt": p.text, "multi_modal_data": {"image": p.images} if p.images else {}}
        for p in mixed_prompts(16, placeholder, chat=("", ""))
    ]
    options = {"num_kv_blocks": 100, "block_size": 16, "max_model_len": 300}
    with LLM(str(folder), device=device, max_num_batched_tokens=64, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("family", MAKERS)
def test_same_tokens_as_on_the_cpu(family: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    placeholder = PLACEHOLDERS[family]
    assert answers(tmp_path, "cuda", placeholder) == answers(tmp_path, "cpu", placeholder)
