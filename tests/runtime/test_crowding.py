"""The number of threads falls while other work takes the cores, and grows again afterwards."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sensorium.runtime.crowding import LOOK_SECONDS, ThreadAdapter, read_times


@dataclass
class Machine:
    """A machine with ``cores`` cores, of which ``taken`` are another program's.

    A thread on a core that is taken runs half of the time.
    """

    cores: int
    taken: int = 0
    now: float = 0.0
    numbers: list[int] = field(default_factory=list)
    times: dict[str, tuple[int, int]] = field(default_factory=dict)

    def adapter(self) -> ThreadAdapter:
        return ThreadAdapter(
            self.cores, self.numbers.append, read=lambda: dict(self.times), clock=lambda: self.now
        )

    def run(self, adapter: ThreadAdapter, looks: int) -> None:
        """Let time pass, with a step at each look."""
        for _ in range(looks):
            num_waiting = max(0, adapter.number + self.taken - self.cores)
            for index in range(adapter.number):
                ran, waited = self.times.get(str(index), (0, 0))
                part = 0.5 if index < num_waiting else 0.0
                nanoseconds = int(LOOK_SECONDS * 1e9)
                self.times[str(index)] = (
                    ran + int((1 - part) * nanoseconds),
                    waited + int(part * nanoseconds),
                )
            self.now += LOOK_SECONDS
            adapter.after_step()


def test_alone_nothing_changes() -> None:
    machine = Machine(8)
    machine.run(machine.adapter(), 1000)
    assert machine.numbers == []


@pytest.mark.parametrize(("cores", "taken"), [(2, 1), (4, 1), (16, 2), (16, 15), (128, 3)])
def test_as_many_threads_as_cores_are_free(cores: int, taken: int) -> None:
    machine = Machine(cores, taken)
    adapter = machine.adapter()
    machine.run(adapter, 40)
    settled = [adapter.number]
    for _ in range(2000):
        machine.run(adapter, 1)
        settled.append(adapter.number)
    free = cores - taken
    # An attempt to grow fails after a few looks, and attempts become rare.
    assert settled.count(free) > 0.85 * len(settled)
    assert statistics.median(settled) == free


def test_what_was_taken_and_left_is_used_again() -> None:
    machine = Machine(4, 3)
    adapter = machine.adapter()
    machine.run(adapter, 20)
    assert 1 in machine.numbers
    machine.taken = 0
    machine.run(adapter, 300)
    assert adapter.number == 4
    assert machine.numbers[-1] == 4


def test_a_share_too_small_to_matter_changes_nothing() -> None:
    machine = Machine(2)
    adapter = machine.adapter()
    for _ in range(200):
        machine.now += LOOK_SECONDS
        ran, waited = machine.times.get("0", (0, 0))
        machine.times["0"] = (ran + 200_000_000, waited + 30_000_000)
        adapter.after_step()
    assert machine.numbers == []


def crowd(machine: Machine, adapter: ThreadAdapter, waited: int, looks: int = 1) -> None:
    """Let the first thread wait for so many milliseconds of each look."""
    for _ in range(looks):
        machine.now += LOOK_SECONDS
        ran, before = machine.times.get("0", (0, 0))
        machine.times["0"] = (ran + (250 - waited) * 10**6, before + waited * 10**6)
        adapter.after_step()


def test_one_bad_moment_changes_nothing() -> None:
    machine = Machine(2)
    adapter = machine.adapter()
    for _ in range(50):
        crowd(machine, adapter, 200)
        crowd(machine, adapter, 0)
    assert machine.numbers == []
    crowd(machine, adapter, 200, looks=2)
    assert machine.numbers == [1]


def test_what_waits_a_little_for_long_is_tried_again() -> None:
    machine = Machine(2)
    adapter = machine.adapter()
    crowd(machine, adapter, 200, looks=3)
    assert machine.numbers == [1]
    crowd(machine, adapter, 50, looks=100)
    assert machine.numbers == [1, 2]


def test_looking_is_rare_and_never_on_one_thread() -> None:
    looks: list[float] = []
    now = 0.0

    def read() -> dict[str, tuple[int, int]]:
        looks.append(now)
        return {}

    adapter = ThreadAdapter(2, looks.append, read=read, clock=lambda: now)
    for step in range(1000):
        now = step * 0.001
        adapter.after_step()
    assert 3 <= len(looks) <= 5
    ThreadAdapter(1, looks.append, read=lambda: pytest.fail("looked")).after_step()


def test_after_a_pause_the_old_counts_do_not_count() -> None:
    machine = Machine(2)
    adapter = machine.adapter()
    machine.run(adapter, 2)
    machine.now += 60
    machine.times["0"] = (machine.times["0"][0], machine.times["0"][1] + int(50e9))
    adapter.after_step()
    assert machine.numbers == []


def test_where_the_system_does_not_tell_nothing_changes(tmp_path: Path) -> None:
    assert read_times(tmp_path / "none") == {}
    (tmp_path / "1").mkdir()
    assert read_times(tmp_path) == {}
    (tmp_path / "1" / "schedstat").write_text("12 three 4\n")
    assert read_times(tmp_path) == {}
    now = iter(range(1000))
    adapter = ThreadAdapter(4, pytest.fail, read=dict, clock=lambda: next(now))
    for _ in range(100):
        adapter.after_step()
    assert adapter.number == 4


def test_times_of_this_process() -> None:
    """Those of the main thread grow with what it does."""
    before = read_times()
    if not before:
        pytest.skip("this system has no schedstat files")
    main, end = str(os.getpid()), time.monotonic() + 60
    while read_times()[main][0] <= before[main][0]:
        assert time.monotonic() < end
