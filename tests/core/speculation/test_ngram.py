"""The n-gram index, beside a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.core.speculation import ngram
from sensorium.core.speculation.ngram import BARRIER, NOTHING, NgramIndex, Proposal, with_barriers

texts = st.lists(st.sampled_from([0, 1, 2, BARRIER]), max_size=60)


def searched(text: list[int], shortest: int, longest: int, most: int) -> Proposal:
    """What the index is to find, by comparing every earlier end with the last tokens."""
    best, best_length = 0, shortest - 1
    for end in range(len(text) - 1, 0, -1):
        length = 0
        while (
            length < min(longest, end)
            and text[end - 1 - length] == text[len(text) - 1 - length] != BARRIER
        ):
            length += 1
        if length > best_length:
            best, best_length = end, length
    if not best:
        return NOTHING
    whole = list(text)
    for place in range(best, best + most):
        if whole[place] == BARRIER:
            break
        whole.append(whole[place])
    return Proposal(tuple(whole[len(text) :]), best_length)


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(1, 4), st.integers(0, 6), st.integers(1, 9), st.data())
def test_the_longest_and_then_the_latest_repetition_is_found(
    text: list[int], shortest: int, more: int, most: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "MOST_PLACES", 1000)
        patch.setattr(ngram, "LEAST_SIZE", data.draw(st.sampled_from([1, 4, 256])))
        index = NgramIndex(shortest, shortest + more)
        known = 0
        while known < len(text):
            step = data.draw(st.integers(1, 25))
            index.extend(text[known : known + step])
            index.catch_up(100)
            known = min(len(text), known + step)
            wanted = searched(text[:known], shortest, shortest + more, most)
            assert index.propose(most) == wanted


def test_a_repetition_that_reaches_the_end_goes_on_with_itself() -> None:
    index = NgramIndex(2, 8)
    index.extend([7, 8, 9, 7, 8, 9, 7, 8])
    index.catch_up(8)
    assert index.propose(7) == Proposal((9, 7, 8, 9, 7, 8, 9), 5)


def test_a_look_up_costs_a_bounded_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts made to have many places to look at, and long ones at once."""
    index = NgramIndex(2, 64)
    best = [1, 2, 3, 5, 5, 7]
    index.extend(best + [token for i in range(400) for token in (1000 + i, 5, 5)] + best[:5])
    num_tokens = len(index)
    for wanted in range(100, num_tokens + 100, 100):
        index.catch_up(100)
        assert index.num_indexed == min(wanted, num_tokens - 1)
    assert index.propose(2).token_ids == (1, 2), "the best place is too far back"
    monkeypatch.setattr(ngram, "MOST_PLACES", 1000)
    assert index.propose(2) == Proposal((7, 1000), 5)


def test_memory_is_a_few_bytes_a_token_however_the_text_comes() -> None:
    index = NgramIndex(3, 16)
    num_entered = 0
    for start in range(0, 20_000, 50):
        index.extend(token * token % 997 for token in range(start, start + 50))
        num_entered += index.catch_up(1000)
        assert index.nbytes <= 24 * len(index) + 4 * (ngram.LEAST_SIZE + 1)
    assert num_entered == len(index) - 1, "none is entered again when the tables grow"


def test_items_are_barriers() -> None:
    assert with_barriers([1, 9, 9, 2, 9, 3], [(1, 2), (4, 1)]) == [1, -1, -1, 2, -1, 3]


def test_senseless_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="n-grams of 3 to 2 tokens"):
        NgramIndex(3, 2)
