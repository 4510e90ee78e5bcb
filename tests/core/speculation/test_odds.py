"""Probabilities of proposed tokens, by what became of others like them."""

from __future__ import annotations

import random

import pytest

from sensorium.core.speculation.odds import FIRST_SHARE, HIGHEST, Odds


def test_probabilities_are_those_of_tokens_alike() -> None:
    draw, odds = random.Random(1), Odds()
    for _ in range(2000):
        for length, probability in ((3, 0.4), (8, 0.8), (20, 0.95)):
            odds.observe(length, 0.7, int(right := draw.random() < probability), failed=not right)
    found = [odds.of(length, 0.7) for length in (3, 8, 20)]
    assert found == pytest.approx([0.4, 0.8, 0.95], abs=0.12)


def test_a_lucky_sequence_is_not_believed() -> None:
    """Half of all tokens are right; by chance, some sequences have had many lately."""
    draw, odds = random.Random(2), Odds()
    shares = [odds.new_sequence()] * 200
    for _ in range(100):
        for index, share in enumerate(shares):
            right = draw.random() < 0.5
            shares[index] = odds.observe(3, share, int(right), failed=not right)
    assert max(shares) > 0.8
    assert odds.of(3, max(shares)) == pytest.approx(0.5, abs=0.15)


def test_a_sequence_begins_as_most_are() -> None:
    odds = Odds()
    assert odds.new_sequence() == FIRST_SHARE
    for _ in range(300):
        odds.observe(3, 0.9, 8, failed=False)
    assert odds.new_sequence() > 0.95
    assert odds.of(4, 0.99) <= HIGHEST


def test_the_first_outcomes_count_most() -> None:
    odds = Odds()
    for _ in range(10):
        odds.observe(3, 0.1, 0, failed=True)
    assert odds.of(3, 0.1) < 0.05
