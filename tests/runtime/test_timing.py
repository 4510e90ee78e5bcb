"""Seconds of a device: summed per piece of work, taken once, never waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from sensorium.runtime.timing import DeviceTimer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What ``perf_counter`` says, one after the other."""
    times: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: times.pop(0))
    yield times
    assert not times


def test_pieces_of_work_are_summed_and_taken_once(clock: list[float]) -> None:
    clock += [1.0, 1.5, 10.0, 12.0]
    timer = DeviceTimer(torch.device("cpu"))
    assert timer.pop_seconds() == 0.0
    for _ in range(2):
        with timer.measured():
            pass
    assert (timer.pop_seconds(), timer.pop_seconds()) == (2.5, 0.0)


def test_what_failed_has_no_time(clock: list[float]) -> None:
    clock += [1.0]
    timer = DeviceTimer(torch.device("cpu"))
    with pytest.raises(KeyError), timer.measured():
        raise KeyError
    assert timer.pop_seconds() == 0.0


class Event:
    """An event of a GPU whose stream has come as far as ``passed`` says."""

    passed = 0
    made: list[Event] = []  # noqa: RUF012

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.number = len(Event.made)
        Event.made.append(self)

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"

    def query(self) -> bool:
        return self.number < Event.passed

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end.number - self.number) + 10.0 * self.number


def test_on_a_gpu_time_is_known_when_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timer = DeviceTimer(torch.device("cuda:1"))
    for _ in range(2):
        with timer.measured():
            pass
    assert timer.pop_seconds() == 0.0, "nothing has run yet, and nobody waits for it"
    monkeypatch.setattr(Event, "passed", 3)
    assert timer.pop_seconds() == pytest.approx(1.0)
    assert timer.pop_seconds() == 0.0
    monkeypatch.setattr(Event, "passed", 4)
    assert timer.pop_seconds() == pytest.approx(1.02)


def test_what_failed_on_a_gpu_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(Event, "passed", 9)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timer = DeviceTimer(torch.device("cuda:1"))
    with pytest.raises(KeyError), timer.measured():
        raise KeyError
    assert timer.pop_seconds() == 0.0
