"""The runner with tokens that are tried: what spoils them leaves the sequence as it is without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import sensorium
from sensorium.core.plan import UNUSABLE, NewSequence, Span, StepPlan, StepResult
from sensorium.core.request import EngineRequest
from sensorium.kernels.batch import AttentionBatch
from sensorium.params import SamplingParams, StructuredOutputs
from sensorium.runtime import sampler
from sensorium.runtime.encoder import FeatureStore
from sensorium.runtime.runner import ModelRunner
from sensorium.text.grammar.grammar import GrammarMatcher, GrammarVocabulary, compile_grammar
from sensorium.text.tokenizer import Tokenizer

DEMO = Path(sensorium.__file__).parent / "demo"
POISON, FLAWED = 8, 26
"""Tokens that spoil all rows of their sequence; whose logits have a flaw."""


class Counting:
    """A model that counts: the next token is the last one plus 1. It attends to nothing."""

    shape: Any = None
    dtype = torch.float32
    device = torch.device("cpu")
    has_encoder = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.flaw = 1.0
        self.seen: list[list[int]] = []

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()[:, None].repeat(1, 2)

    def rotary(self, positions: torch.Tensor, lengths: Any = ()) -> Any:
        return torch.zeros(len(positions), 1), torch.zeros(len(positions), 1)

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        ids = embeds[:, 0].long().tolist()
        self.seen.append(ids)
        first = 0
        for length in batch.query_lens:
            if POISON in ids[first : first + length]:
                embeds[first : first + length] = torch.nan
            first += length
        return embeds

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), self.vocab_size)
        last = hidden[:, 0].nan_to_num().long()
        logits[torch.arange(len(hidden)), (last + 1) % self.vocab_size] = 5.0
        logits[last == FLAWED] = self.flaw
        logits[hidden[:, 0].isnan()] = torch.nan
        return logits

    def decode(self, ids: torch.Tensor, batch: AttentionBatch) -> None:
        pass


class Rig:
    """A runner whose sequences have computed their prompts, and got a token each."""

    def __init__(
        self, *prompts: Sequence[int], vocab_size: int = 64, grammar: Any = None, **params: Any
    ) -> None:
        self.model = Counting(vocab_size)
        model: Any = self.model
        self.runner = ModelRunner(model, [], FeatureStore())
        self.known = [list(prompt) for prompt in prompts]
        wanted = SamplingParams(temperature=0.0, max_tokens=50, **params)
        new = [
            NewSequence(
                seq_id,
                EngineRequest(str(seq_id), tuple(prompt), wanted, 50, grammar=grammar),
                tuple(prompt),
            )
            for seq_id, prompt in enumerate(prompts)
        ]
        spans = [
            Span(seq_id, 0, len(prompt), (seq_id,), samples=True)
            for seq_id, prompt in enumerate(prompts)
        ]
        self._execute(StepPlan(0, new=tuple(new), spans=tuple(spans)))

    def attempt(self, *drafts: Sequence[int]) -> StepResult:
        """Run a step in which the sequences try these tokens beside their next one."""
        spans = [
            Span(seq_id, len(known) - 1, 1, (), samples=True).with_drafts(tuple(tried), ())
            for seq_id, (known, tried) in enumerate(zip(self.known, drafts, strict=True))
        ]
        return self._execute(StepPlan(0, spans=tuple(spans)))

    def _execute(self, plan: StepPlan) -> StepResult:
        result = self.runner.execute(plan)
        for seq_id in result.samples:
            self.known[seq_id] += tokens(result, seq_id)
        return result


def tokens(result: StepResult, seq_id: int) -> list[int]:
    return [sample.token_id for sample in result.samples[seq_id]]


def test_right_tokens_come_with_the_next_one() -> None:
    rig = Rig([1, 2, 3], [31, 32])
    assert rig.known == [[1, 2, 3, 4], [31, 32, 33]]
    result = rig.attempt([5, 6, 60], [])
    assert (tokens(result, 0), tokens(result, 1)) == ([5, 6, 7], [34])
    assert result.num_drafts == {0: 3, 1: 0}
    assert not result.repeated


def test_a_tried_token_that_spoils_numbers_is_computed_without() -> None:
    rig = Rig([1, 2, 3], [31, 32])
    result = rig.attempt([5, POISON], [34, 35])
    assert sorted(rig.model.seen[-2]) == [4, 5, POISON, 33, 34, 35]
    assert sorted(rig.model.seen[-1]) == [4, 33]
    assert (tokens(result, 0), tokens(result, 1)) == ([5], [34])
    assert (result.failed, result.unsound) == ({}, set())
    assert result.num_drafts == {0: 0, 1: 0}
    assert result.repeated
    result = rig.attempt([6, 7], [35])
    assert (tokens(result, 0), tokens(result, 1)) == ([6, 7, 8], [35, 36])


def test_a_known_token_that_spoils_numbers_fails_alone() -> None:
    rig = Rig([5, 6, 7], [31, 32])
    assert rig.known[0][-1] == POISON
    result = rig.attempt([9, 10], [34, 35])
    assert list(result.failed) == [0]
    assert result.failed[0].startswith(UNUSABLE)
    assert list(result.samples) == [1]
    assert tokens(result, 1) == [34]
    assert result.num_drafts == {0: 0, 1: 0}


@pytest.mark.parametrize("how", ["token_samples", "sample"])
def test_an_exception_amid_tried_tokens_leaves_those_before(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sampler of plain requests, and that of others."""
    rig = Rig([1, 2, 3], [31, 32], logprobs=None if how == "token_samples" else 1)
    own = getattr(sampler, how)

    def failing(*args: Any) -> Any:
        if any(slot.token_ids[slot.num_tokens - 1] == 6 for slot in args[-1]):
            raise RuntimeError("an index is out of range")
        return own(*args)

    monkeypatch.setattr(sampler, how, failing)
    result = rig.attempt([5, 6, 7], [34, 35, 36])
    assert (tokens(result, 0), tokens(result, 1)) == ([5, 6], [34, 35])
    assert result.failed == {}
    assert not result.repeated
    assert "tokens that were tried could not be sampled" in caplog.text
    monkeypatch.undo()
    result = rig.attempt([7, 40], [])
    assert (tokens(result, 0), tokens(result, 1)) == ([7, 8], [36])


@pytest.mark.parametrize("flaw", [1.0, torch.inf, torch.nan])
def test_a_flaw_amid_tried_tokens_leaves_those_before(flaw: float) -> None:
    rig = Rig([22, 23], [31, 32])
    rig.model.flaw = flaw
    result = rig.attempt([25, FLAWED, 27], [34, 35, 36])
    assert (tokens(result, 0), tokens(result, 1)) == ([25, FLAWED], [34, 35, 36, 37])
    assert result.failed == {}
    result = rig.attempt([27], [38])
    assert list(result.failed) == [0], "by its own next token"
    assert result.failed[0].startswith(UNUSABLE)
    assert tokens(result, 1) == [38, 39]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def grammar(tokenizer: Tokenizer) -> GrammarMatcher:
    outputs = StructuredOutputs(regex="[a-f]{30}")
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.max_token_id + 1)
    return vocabulary.matcher(compile_grammar(outputs).text)


def ids(tokenizer: Tokenizer, letters: str) -> list[int]:
    return [tokenizer.encode(letter)[-1] for letter in letters]


def test_tokens_that_a_grammar_forbids_are_not_computed(
    tokenizer: Tokenizer, grammar: GrammarMatcher
) -> None:
    rig = Rig([0, 1], vocab_size=tokenizer.max_token_id + 1, grammar=grammar)
    result = rig.attempt(ids(tokenizer, "abzc"))
    assert rig.model.seen[-1][1:] == ids(tokenizer, "ab")
    assert result.num_drafts == {0: 2}
    assert not result.repeated


def test_a_grammar_that_cannot_tell_which_tokens_it_forbids_lets_none_be_tried(
    tokenizer: Tokenizer,
    grammar: GrammarMatcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(matcher: GrammarMatcher, token_ids: Sequence[int]) -> int:
        raise RuntimeError("a bug of the library")

    rig = Rig([0, 1], vocab_size=tokenizer.max_token_id + 1, grammar=grammar)
    monkeypatch.setattr(GrammarMatcher, "num_allowed", failing)
    result = rig.attempt(ids(tokenizer, "abc"))
    assert len(rig.model.seen[-1]) == 1
    assert result.num_drafts == {0: 0}
    assert result.failed == {}
    assert len(tokens(result, 0)) == 1
    assert "which tokens may be tried" in caplog.text
