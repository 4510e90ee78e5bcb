"""Decode steps that are moved on and replayed whole: the tokens and numbers of launched ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium import RequestOutput, SamplingParams
from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import floats
from sensorium.models.parts.decoder import DecoderModel
from sensorium.runtime import inputs
from tests import checkpoints
from tests.parts import Parts, build_patient

pytestmark = pytest.mark.skipif(
    not floats.available("float16"), reason="this processor has none of the kernels to capture"
)
OPTIONS: dict[str, Any] = {
    "num_kv_blocks": 60,
    "block_size": 16,
    "max_model_len": 512,
    "dtype": "float32",
    "enable_prefix_caching": False,
}
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=300)
KINDS = [
    GREEDY,
    GREEDY.replace(max_tokens=90, logprobs=2),
    GREEDY.replace(max_tokens=200, temperature=0.9, seed=4, top_p=0.9),
    GREEDY.replace(max_tokens=120, repetition_penalty=1.2, bad_words=["the"]),
]
PROMPTS: list[Any] = [{"prompt_token_ids": [5 + i, 9, 11 + i, 20][: 4 - i % 2]} for i in range(4)]


class Moves:
    """How often inputs were built, and how often they were moved on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_built = self.num_moved = 0
        self._build, self._advance = inputs.build, ops.advance
        monkeypatch.setattr(inputs, "build", self.build)
        monkeypatch.setattr(ops, "advance", self.advance)

    def build(self, *args: Any) -> Any:
        self.num_built += 1
        return self._build(*args)

    def advance(self, batch: Any) -> bool:
        moved = self._advance(batch)
        self.num_moved += moved
        return moved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_text(
        "qwen2", tmp_path_factory.mktemp("qwen2"), tie_word_embeddings=False
    )


@pytest.fixture(scope="module")
def parts(folder: Path) -> Iterator[Parts]:
    with build_patient(folder, **OPTIONS) as parts:
        yield parts


@pytest.fixture(scope="module")
def eager(folder: Path) -> Iterator[Parts]:
    with build_patient(folder, enforce_eager=True, **OPTIONS) as parts:
        yield parts


def numbers(outputs: list[RequestOutput]) -> list[Any]:
    found = [output.outputs[0] for output in outputs]
    return [(list(one.token_ids), one.logprobs, one.finish_reason) for one in found]


def test_sequences_that_end_one_by_one_have_the_numbers_of_launched_steps(
    parts: Parts, eager: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four kinds of sampling together, until one is left; 300 tokens pass the end of a part."""
    expected = numbers(eager.llm.generate(PROMPTS, KINDS, use_tqdm=False))
    moves = Moves(monkeypatch)
    assert numbers(parts.llm.generate(PROMPTS, KINDS, use_tqdm=False)) == expected
    model = parts.runner.model
    assert isinstance(model, DecoderModel)
    assert list(model.decoder.whole_steps.captured) == [4, 3, 2, 1]
    assert moves.num_moved > 250
    assert moves.num_built < 50


def test_sequences_that_are_preempted_have_the_numbers_of_those_that_are_not(
    parts: Parts, eager: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sequences of 300 tokens need more than the 60 blocks that there are."""
    params = [GREEDY.replace(logprobs=1)] * 4
    before = parts.llm.stats().num_preemptions
    found = numbers(parts.llm.generate(PROMPTS, params, use_tqdm=False))
    assert parts.llm.stats().num_preemptions > before
    moves = Moves(monkeypatch)
    assert found == numbers(eager.llm.generate(PROMPTS, params, use_tqdm=False))
    assert moves.num_moved == 0, "launched steps are built"


def test_a_number_that_is_not_finite_fails_its_sequence_alone(parts: Parts) -> None:
    """The embedding of one token is spoilt after its sequence has begun."""
    expected = numbers(parts.llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    spoilt = next(t for t in expected[0][0][20:] if t not in expected[1][0] + [5, 9, 11, 20, 6, 12])
    first = expected[0][0].index(spoilt)
    model = parts.runner.model
    assert isinstance(model, DecoderModel)
    table = model.decoder.embedding.weight
    assert isinstance(table, torch.Tensor)
    kept = table[spoilt].clone()
    table[spoilt] = torch.nan
    try:
        requests = {}
        for number, prompt in enumerate(PROMPTS[:2]):
            prepared = parts.prepare(prompt)
            requests[str(number)] = parts.processor.requests(
                prepared, GREEDY, str(number), 0, 0.0, None
            )[0]
            parts.engine.add(requests[str(number)])
        ended: dict[str, tuple[int, str | None]] = {}
        counts = {"0": 0, "1": 0}
        while len(ended) < 2:
            for update in parts.engine.step():
                counts[update.request_id] += update.sample is not None
                if update.finish_reason is not None:
                    ended[update.request_id] = counts[update.request_id], update.error
        assert ended["0"][0] == first + 1
        assert "infinite or undefined" in (ended["0"][1] or "")
        assert ended["1"] == (300, None)
    finally:
        table[spoilt] = kept
        parts.engine.reset()


def test_steps_beyond_a_window_are_built_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept once where they cannot be moved on, and until the next sequences not again."""
    folder = checkpoints.make_text("mistral", tmp_path, sliding_window=40)
    kept: list[int] = []
    steps_left = ops.steps_left

    def noted(lengths: Iterable[int]) -> int:
        kept.append(steps_left(lengths))
        return kept[-1]

    monkeypatch.setattr(ops, "steps_left", noted)
    params = GREEDY.replace(max_tokens=150)
    with build_patient(folder, enforce_eager=True, **OPTIONS) as parts:
        expected = numbers(parts.llm.generate(PROMPTS[:2], params, use_tqdm=False))
    assert not kept
    moves = Moves(monkeypatch)
    with build_patient(folder, **OPTIONS) as parts:
        for _ in range(2):
            assert numbers(parts.llm.generate(PROMPTS[:2], params, use_tqdm=False)) == expected
    assert moves.num_moved > 40, "up to the window"
    assert len(kept) <= 6


def test_factors_are_computed_up_to_the_next_part() -> None:
    assert ops.steps_left([1]) == 256
    assert ops.steps_left([300, 255, 40]) == 2
    assert ops.steps_left([256, 40]) == 1
