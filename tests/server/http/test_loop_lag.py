"""Samples of the loop's lag, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sensorium.server.http import loop_lag
from sensorium.server.http.loop_lag import LagSampler


class Timer:
    """What ``call_at`` gives back."""

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due, self.callback, self.cancelled = due, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop with one timer."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(due, callback))
        return self.timers[-1]

    def fire(self, late: float) -> None:
        """Let the last timer fire that many seconds late."""
        timer = self.timers[-1]
        assert not timer.cancelled
        self.now = timer.due + late
        timer.callback()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


def test_each_timer_is_reported_by_its_lateness(loop: Loop) -> None:
    seen: list[float] = []
    with LagSampler(seen.append, 0.5):
        assert loop.timers[-1].due == 100.5
        loop.fire(0.0)
        loop.fire(0.25)
        loop.fire(0.125)
        assert loop.timers[-1].due == 102.0  # of the grid, whatever was late
    assert seen == [0.0, 0.25, 0.125]
    assert loop.timers[-1].cancelled


def test_a_stall_counts_for_every_timer_that_it_swallowed(loop: Loop) -> None:
    seen: list[float] = []
    with LagSampler(seen.append, 0.5):
        loop.fire(1.75)
        assert seen == [1.75, 1.25, 0.75, 0.25]
        assert loop.timers[-1].due == 102.5
        assert loop.timers[-1].due > loop.now


def test_a_suspended_machine_costs_little(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "MOST_MISSED", 3)
    seen: list[float] = []
    with LagSampler(seen.append, 0.5):
        loop.fire(3600.0)
        assert seen == [3600.0, 3599.5, 3599.0, 3598.5]
        assert loop.timers[-1].due == loop.now
        loop.fire(0.0)
    assert seen[-1] == 0.0


def test_a_timer_that_is_early_is_not_late(loop: Loop) -> None:
    seen: list[float] = []
    with LagSampler(seen.append, 0.5):
        loop.fire(-1e-9)
    assert seen == [0.0]


def test_the_interval_may_be_set_before_the_start(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_lag, "SAMPLE_SECONDS", 0.25)
    with LagSampler(lambda seconds: None):
        assert loop.timers[-1].due == 100.25


@pytest.mark.parametrize("interval", [0, -1.0, float("nan")])
def test_intervals_that_are_none(interval: float) -> None:
    with pytest.raises(ValueError, match=str(interval)):
        LagSampler(lambda seconds: None, interval)


async def test_on_a_real_loop() -> None:
    done = asyncio.Event()
    seen: list[float] = []

    def observe(seconds: float) -> None:
        seen.append(seconds)
        if len(seen) == 3:
            done.set()

    with LagSampler(observe, 0.001):
        await asyncio.wait_for(done.wait(), 60)
    assert min(seen) >= 0
