"""Which tokens may be tried: in a time of its own, and without a trace in the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llguidance
import numpy as np
import pytest

from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import (
    STARTING_SECONDS,
    TRIAL_SECONDS,
    TRIAL_TOKEN_SECONDS,
    Budget,
    GrammarMatcher,
    GrammarVocabulary,
    compile_grammar,
)
from sensorium.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def vocabulary(chatml: Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(chatml, chatml.max_token_id + 1)


def following(vocabulary: GrammarVocabulary, pattern: str) -> GrammarMatcher:
    return vocabulary.matcher(compile_grammar(StructuredOutputs(regex=pattern)).text)


def letters(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.encode(letter)[0] for letter in "ab"]


def allows_something(matcher: GrammarMatcher, vocabulary: GrammarVocabulary) -> bool:
    mask = np.zeros((vocabulary.vocab_size + 31) // 32, dtype=np.int32)
    matcher.mask(mask)
    return bool(mask.any())


def trials_that(monkeypatch: pytest.MonkeyPatch, taking: Callable[[], float]) -> None:
    """Let a token take so much processor time on a copy of a matcher, and none elsewhere."""
    now, real = 0.0, llguidance.LLMatcher

    class Matcher:
        grammar_from_regex = staticmethod(real.grammar_from_regex)
        validate_grammar = staticmethod(real.validate_grammar)

        def __init__(self, *args: Any, copied: Any = None, **options: Any) -> None:
            self.is_copy = copied is not None
            self.inner = copied if self.is_copy else real(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def deep_copy(self) -> Matcher:
            return Matcher(copied=self.inner.deep_copy())

        def consume_token(self, token_id: int) -> bool:
            nonlocal now
            if self.is_copy:
                now += taking()
            return bool(self.inner.consume_token(token_id))

    monkeypatch.setattr(llguidance, "LLMatcher", Matcher)
    monkeypatch.setattr("sensorium.text.grammar.grammar.time.thread_time", lambda: now)


def test_trying_tokens_leaves_the_state_as_it_is(
    vocabulary: GrammarVocabulary, chatml: Tokenizer
) -> None:
    matcher = following(vocabulary, "aab")
    a, b = letters(chatml)
    assert matcher.num_allowed([]) == 0
    for _ in range(2):
        assert matcher.num_allowed([a, a, b, b]) == 3
        assert matcher.num_allowed([b]) == 0
    assert matcher.accept(a)
    assert matcher.num_allowed([a, a]) == 1
    assert matcher.error is None


def test_nothing_may_be_tried_after_the_end_or_an_error(
    vocabulary: GrammarVocabulary, chatml: Tokenizer
) -> None:
    a, b = letters(chatml)
    ended = following(vocabulary, "ab")
    for token_id in (a, b):
        assert ended.accept(token_id)
    for _ in range(2):
        assert ended.num_allowed([a, b]) == 0
        assert ended.error is None
        assert allows_something(ended, vocabulary), "it may end"
    assert ended.accept(chatml.eos_token_ids[0])
    assert ended.num_allowed([a]) == 0
    assert ended.error is None
    failed = following(vocabulary, "ab")
    assert not failed.accept(b)
    assert failed.num_allowed([a, b]) == 0
    assert failed.error is not None


def test_trials_that_take_too_long_end_and_the_sequence_goes_on(
    vocabulary: GrammarVocabulary, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = letters(chatml)
    trials_that(monkeypatch, lambda: 0.4 * TRIAL_SECONDS)
    matcher = following(vocabulary, "[ab]+")
    assert matcher.num_allowed([a] * 16) == 3, "the third used it up"
    for _ in range(400):
        assert matcher.accept(b)
        assert matcher.num_allowed([a]) == 0, "for ever"
    assert matcher.error is None
    trials_that(monkeypatch, lambda: 2 * STARTING_SECONDS)
    budget = Budget()
    matcher = following(vocabulary, "[ab]+").fresh(budget)
    assert matcher.num_allowed([a, a]) == 1
    assert matcher.error is None, "the budget of the request is another"
    assert not budget.is_used_up
    assert matcher.fresh().num_allowed([a]) == 0, "as little when it starts again"
    assert matcher.fresh(Budget()).num_allowed([a]) == 1, "another sequence"


def test_trials_that_take_little_time_go_on(
    vocabulary: GrammarVocabulary, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = letters(chatml)
    trials_that(monkeypatch, lambda: 0.9 * TRIAL_TOKEN_SECONDS)
    matcher = following(vocabulary, "[ab]+")
    for _ in range(3 * int(TRIAL_SECONDS / TRIAL_TOKEN_SECONDS)):
        assert matcher.num_allowed([a]) == 1
        assert matcher.accept(b)


def test_a_library_that_raises_is_not_asked_again(
    vocabulary: GrammarVocabulary, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = letters(chatml)

    def fail() -> float:
        raise RuntimeError("a bug of the library")

    trials_that(monkeypatch, fail)
    matcher = following(vocabulary, "[ab]+")
    with pytest.raises(RuntimeError, match="a bug"):
        matcher.num_allowed([a, b])
    for _ in range(200):
        assert matcher.num_allowed([a, b]) == 0
        assert matcher.accept(a)
    assert matcher.error is None
    assert allows_something(matcher, vocabulary)
