"""Sequences whose layers all have a sliding window give their blocks back while they run."""

from __future__ import annotations

from pathlib import Path

from sensorium import LLM, SamplingParams
from tests.checkpoints import make_text

NUM_TOKENS = 330
BLOCKS = 24
"""More than windows of 20 tokens take, fewer than two sequences of so many tokens would."""


def test_long_sequences_need_no_more_room_than_their_windows(tmp_path: Path) -> None:
    folder = make_text("mistral", tmp_path, sliding_window=20)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(first, first + 12))} for first in (20, 40)]
    found = []
    for num_blocks in (BLOCKS, 400):
        with LLM(str(folder), num_kv_blocks=num_blocks, max_model_len=380) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
            assert llm.stats().num_preemptions == 0
    assert found[0] == found[1]
    assert 2 * NUM_TOKENS > BLOCKS * 16
