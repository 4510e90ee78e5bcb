"""Estimates of a step's time by its rows."""

from __future__ import annotations

import pytest

from sensorium.core.speculation.costs import FORGOTTEN_AFTER, StepCosts, rounded


def test_without_measurements_more_rows_cost_a_little_more() -> None:
    costs = StepCosts()
    assert 1.0 < costs.seconds(1, 9) / costs.seconds(1, 1) < 1.5


def test_between_measured_steps_is_a_line_and_beyond_a_guess() -> None:
    costs = StepCosts()
    costs.observe(2, 4, 0.010)
    costs.observe(2, 8, 0.020)
    assert costs.seconds(2, 6) == pytest.approx(0.015, rel=0.01)
    assert 0.020 < costs.seconds(2, 10) < 0.022
    assert costs.seconds(2, 2) < 0.010, "unknown, and soon measured"
    assert costs.seconds(64, 8) > 0.1, "others have other times"


def test_noise_adds_little_and_a_faster_step_counts_at_once() -> None:
    costs = StepCosts()
    for seconds in (0.1, 0.01, 0.01, 0.01, 0.01, 0.01):
        costs.observe(1, 1, seconds)
    assert costs.seconds(1, 1) < 0.014
    costs.observe(1, 1, 9.0)
    assert costs.seconds(1, 1) < 0.03


def test_what_was_not_measured_for_long_counts_for_less_but_for_half_at_least() -> None:
    costs = StepCosts()
    costs.observe(1, 9, 0.030)
    for _ in range(FORGOTTEN_AFTER):
        costs.observe(1, 1, 0.010)
    assert costs.seconds(1, 9) == pytest.approx(0.0225)
    for _ in range(20 * FORGOTTEN_AFTER):
        costs.observe(1, 1, 0.010)
    assert costs.seconds(1, 9) == pytest.approx(0.015)
    assert costs.seconds(1, 1) == pytest.approx(0.010)


def test_a_clock_that_stands_still_measures_nothing() -> None:
    costs = StepCosts()
    costs.observe(1, 1, 0.0)
    assert costs.seconds(1, 1) == StepCosts().seconds(1, 1)


def test_numbers_of_rows_share_estimates_where_they_are_many() -> None:
    assert [rounded(rows) for rows in (1, 7, 16, 17, 18, 31, 33, 64, 65, 2048)] == [
        *(1, 7, 16, 18, 18, 32, 36, 64, 72, 2048)
    ]
    assert len({rounded(rows) for rows in range(1, 4097)}) < 100
