"""A KV cache in int8 in an engine: size, what is said of it, and the same bits in any batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM
from sensorium.errors import ConfigError
from tests import checkpoints
from tests.checkpoints.hf import make_hf_text
from tests.e2e.test_invariance import CHANGED, alone, ask, bits, make_prompts, sampling
from tests.parts import patient_llm

INT8 = {"dtype": "float32", "kv_cache_dtype": "int8"}
SOME = ("in chunks", "in other chunks", "preempted", "on three threads")


@pytest.mark.parametrize(
    ("make", "family", "options"),
    [
        (checkpoints.make_text, "qwen2", {}),
        (checkpoints.make_text, "mistral", {"sliding_window": 17}),
        (make_hf_text, "gemma2", {}),
    ],
    ids=["qwen2", "mistral, windowed", "gemma2"],
)
def test_tokens_and_log_probabilities_are_the_same_however_they_are_computed(
    tmp_path: Path, make: Callable[..., Any], family: str, options: dict[str, Any]
) -> None:
    """Alone, in chunks, in batches, preempted, and from the prefix cache."""
    folder, prompts = str(make(family, tmp_path, **options)), make_prompts("", "", 6)
    expected = alone(folder, "int8 cache", prompts)
    everything = list(range(len(prompts)))
    for name in SOME if make is checkpoints.make_text else SOME[:1]:
        with patient_llm(folder, **INT8, **CHANGED[name]) as llm:
            assert ask(llm, prompts, everything) == expected, name
            assert ask(llm, prompts, everything[::-1]) == expected[::-1], f"{name}, from caches"


def test_it_is_another_cache_and_close_to_the_models_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = str(checkpoints.make_text("qwen2", tmp_path))
    (prompt,) = make_prompts("", "", 1)
    found = []
    for kept in ("auto", "int8"):
        with LLM(folder, dtype="float32", num_kv_blocks=40, kv_cache_dtype=kept) as llm:
            (out,) = llm.generate([prompt], [sampling(1)], use_tqdm=False)
            found.append(bits(out)[1][0])
    assert found[0] != found[1]
    differences = [abs(found[0][token] - found[1][token]) for token in {*found[0]} & {*found[1]}]
    assert max(differences) < 0.2
    assert "KV cache: 1280 tokens (40 blocks of 32) in float32" in caplog.text
    assert "KV cache: 1280 tokens (40 blocks of 32) in int8" in caplog.text


def test_as_many_bytes_hold_more_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = str(checkpoints.make_text("llama", tmp_path))
    for kept in ("bfloat16", "int8"):
        options: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 20, "kv_cache_dtype": kept}
        LLM(folder, dtype="bfloat16", max_model_len=64, **options).close()
    half, own = map(int, re.findall(r"KV cache: (\d+) tokens", caplog.text))
    assert own > 1.6 * half, "heads are small here, so that scales count"


def test_another_floating_point_type_than_the_models_is_refused(tmp_path: Path) -> None:
    folder = str(checkpoints.make_text("llama", tmp_path))
    with pytest.raises(ConfigError, match="kv_cache_dtype is bfloat16, but the model runs in floa"):
        LLM(folder, dtype="float32", kv_cache_dtype="bfloat16")
