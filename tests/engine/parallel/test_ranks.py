"""Ranks as processes: what each holds, the end of one, and what they refuse."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, SamplingParams
from sensorium.engine.parallel.group import RankGroup
from sensorium.engine.parallel.model import shares_of
from sensorium.errors import ConfigError, EngineDeadError
from sensorium.models.loading.fill import weight_bytes
from tests import checkpoints
from tests.checkpoints.hf import make_hf_text
from tests.parts import build_llm
from tests.ranks import in_threads

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 8, "max_model_len": 64}
PROMPTS = ["one two three", "four five six seven eight"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def answers(llm: LLM) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.mktemp("llama")
    checkpoints.make_text("llama", own)
    return own


def test_a_process_that_ends_takes_the_engine_along(folder: Path) -> None:
    with build_llm(folder, **OPTIONS) as whole:
        expected, num_bytes = answers(whole.llm), weight_bytes(whole.runner.model)  # type: ignore[arg-type]
    with build_llm(folder, tensor_parallel_size=2, **OPTIONS) as parts:
        assert answers(parts.llm) == expected
        group: RankGroup = parts.engine.release.__self__  # type: ignore[attr-defined]
        assert group.weight_bytes[0] <= 0.55 * num_bytes
        (process,) = group.processes
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        process.wait()
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="start the engine again"):
                answers(parts.llm)
    assert not group.processes


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "4 heads, 2 of keys.*: use 2 or 4"),
        ({"tensor_parallel_size": 2, "enable_lora": True}, "enable_lora", "merge the adapter"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, options: dict[str, Any], param: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)
    with pytest.raises(ConfigError, match=words) as caught:
        LLM(str(folder), **options, **OPTIONS)
    assert caught.value.param == param


def test_models_of_transformers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch)
    make_hf_text("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="cannot be divided here") as caught:
        LLM(str(tmp_path), tensor_parallel_size=2, **OPTIONS)
    assert caught.value.param == "tensor_parallel_size"


def test_shares_of_items() -> None:
    assert shares_of([4, 4, 4], 2) == [[0, 2], [1]]
    assert shares_of([10, 1, 1, 7, 2], 2) == [[0, 2], [3, 4, 1]]
    assert shares_of([5, 5], 3) == [[0], [1], []]
