"""Estimates of a step's time by its rows."""

from __future__ import annotations

import random

import pytest

from sensorium.core.speculation.costs import LIFETIME, StepCosts


def measured(costs: StepCosts, *times: tuple[int, float], repeats: int = 20) -> StepCosts:
    for _ in range(repeats):
        for num_rows, seconds in times:
            costs.observe(1, num_rows, seconds)
    return costs


def test_without_measurements_more_rows_cost_a_little_more() -> None:
    costs = StepCosts()
    assert 1.0 < costs.seconds(1, 9) / costs.seconds(1, 1) < 1.5
    measured(costs, (1, 0.010))
    assert 0.010 < costs.seconds(1, 9) < 0.015


def test_times_lie_on_a_line() -> None:
    costs = measured(StepCosts(), (1, 0.010), (9, 0.018))
    for num_rows, seconds in ((1, 0.010), (5, 0.014), (9, 0.018), (17, 0.026)):
        assert costs.seconds(1, num_rows) == pytest.approx(seconds, rel=0.03)
    assert costs.seconds(64, 9) > 0.1, "others have other times"


def test_disturbed_steps_hardly_count() -> None:
    draw = random.Random(3)
    costs = StepCosts()
    for _ in range(200):
        num_rows = draw.choice((8, 8, 8, 16))
        seconds = 0.001 * (10 + 2 * num_rows) * draw.choice((1, 1, 1, 1.1, 1.2, 3, 50))
        costs.observe(8, num_rows, seconds)
    assert costs.seconds(8, 16) / costs.seconds(8, 8) == pytest.approx(42 / 26, rel=0.1)


def test_the_cost_of_a_row_is_forgotten_where_rows_do_not_differ() -> None:
    costs = measured(StepCosts(), (1, 0.010), (9, 0.090))
    assert costs.seconds(1, 9) > 4 * costs.seconds(1, 1)
    measured(costs, (1, 0.010), repeats=LIFETIME - 30)
    assert costs.seconds(1, 9) > 4 * costs.seconds(1, 1)
    assert costs.is_settled(1)
    measured(costs, (1, 0.010), repeats=30)
    assert costs.seconds(1, 9) < 1.5 * costs.seconds(1, 1)
    assert not costs.is_settled(1)


def test_a_time_in_which_all_steps_are_slow_is_no_cost_of_rows() -> None:
    costs = measured(StepCosts(), (1, 0.010), (9, 0.018))
    measured(costs, (1, 0.030), (9, 0.054))
    measured(costs, (1, 0.010), repeats=1)
    measured(costs, (9, 0.018), repeats=2)
    assert costs.seconds(1, 9) == pytest.approx(0.018, rel=0.03)


def test_estimates_are_positive_and_never_fall_with_the_rows() -> None:
    costs = measured(StepCosts(), (4, 0.050), (8, 0.010))
    times = [costs.seconds(1, num_rows) for num_rows in range(1, 200)]
    assert min(times) > 0.0
    assert times == sorted(times)


def test_a_clock_that_stands_still_measures_nothing() -> None:
    costs = StepCosts()
    costs.observe(1, 1, 0.0)
    assert costs.seconds(1, 1) == StepCosts().seconds(1, 1)


def test_the_cost_of_a_row_stays_where_all_steps_get_slower_or_faster() -> None:
    """Steps with and without tried tokens are compared with those around them."""
    costs = measured(StepCosts(), (1, 0.010), (9, 0.018))
    measured(costs, (1, 0.030), repeats=10)
    assert costs.seconds(1, 9) == pytest.approx(0.054, rel=0.03)
    measured(costs, (9, 0.018), repeats=3)  # it has just got faster again
    measured(costs, (1, 0.010), repeats=1)
    assert costs.seconds(1, 9) == pytest.approx(0.018, rel=0.03)


def test_costs_are_settled_by_several_steps_of_both_kinds() -> None:
    costs = StepCosts()
    measured(costs, (9, 0.018), repeats=5)
    assert not costs.is_settled(1)
    measured(costs, (1, 0.010), repeats=2)
    assert not costs.is_settled(1)
    measured(costs, (1, 0.010), repeats=1)
    assert costs.is_settled(1)


def test_the_first_step_of_all_may_be_slow() -> None:
    costs = StepCosts()
    measured(costs, (9, 0.030), (1, 0.030), repeats=1)
    measured(costs, (9, 0.018), (1, 0.010), repeats=2)
    assert costs.is_settled(1)
    assert costs.seconds(1, 9) == pytest.approx(0.018, rel=0.03)
