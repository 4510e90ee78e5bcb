"""The place of an answer in a text that is expected."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.core.speculation.ngram import NOTHING
from sensorium.core.speculation.prediction import NEAR, PredictedText

PROMPT = [7, 7, 7]
TEXT = list(range(100, 200))


def predicted(text: Sequence[int], answer: Sequence[int] = ()) -> PredictedText:
    found = PredictedText(text, answer, 3, 16)
    found.index.catch_up(1000)
    return found


def after(answer: Sequence[int], text: Sequence[int] = TEXT, most: int = 4) -> list[int]:
    """What is proposed after an answer, of which one token comes after the other."""
    found = predicted(text)
    for end in range(1, len(answer) + 1):
        found.follow([*PROMPT, *answer[:end]], len(PROMPT))
    at_once = predicted(text)
    at_once.follow([*PROMPT, *answer], len(PROMPT))
    proposal = found.propose(most)
    assert at_once.propose(most) == proposal
    assert proposal == NOTHING or proposal.predicted
    return list(proposal.token_ids)


def test_an_answer_begins_as_expected() -> None:
    assert predicted(TEXT).propose(3).token_ids == (100, 101, 102)
    assert after(TEXT[:10]) == TEXT[10:14]
    assert after(TEXT[:98]) == TEXT[98:]
    assert after(TEXT) == []


def test_it_goes_on_behind_what_was_changed() -> None:
    assert after([*TEXT[:10], 5]) == TEXT[11:15], "one token may stand for one"
    assert after([*TEXT[:10], 5, 6]) == [], "nothing is known"
    assert after([*TEXT[:10], 5, 6, 111]) == TEXT[12:16]
    assert after([*TEXT[:10], 5, 6, *TEXT[11:15]]) == TEXT[15:19]
    assert after([*TEXT[:10], 111]) == TEXT[12:16], "a token was left out"
    assert after([5, 6, 100]) == TEXT[1:5], "words before"


def test_a_few_tokens_find_any_place() -> None:
    far = 12 + NEAR
    assert after([*TEXT[:5], 5, TEXT[far]]) == []
    assert after([*TEXT[:5], *TEXT[far : far + 3]]) == TEXT[far + 3 : far + 7]
    assert after([*TEXT[60:70], *TEXT[20:23]]) == TEXT[23:27], "parts have changed places"


def test_a_common_token_does_not_hide_the_longer_repetition() -> None:
    text = [1, 2, 3, 4, 9, 5, 6, 7, 9, 8, 1, 2]
    assert after([1, 2, 3, 4, 0, 6, 7, 9], text) == [8, 1, 2]


def test_one_that_begins_in_the_middle_is_found_by_its_next_tokens() -> None:
    """As after a preemption."""
    assert predicted(TEXT, TEXT[:7]).propose(2).token_ids == (107, 108)
    answer = [*TEXT[:7], 5, *TEXT[8:12]]
    found = predicted(TEXT, answer)
    assert found.propose(2) == NOTHING
    found.follow([*PROMPT, *answer, TEXT[12]], len(PROMPT))
    assert found.propose(2).token_ids == (113, 114)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_what_is_proposed_stands_in_the_text(text: list[int], answer: list[int]) -> None:
    found = after(answer, text)
    assert any(found == text[start : start + len(found)] for start in range(len(text) + 1))
