"""Fewer threads while other processes take the cores.

All threads of a step wait for the last one at every layer. When another process runs on the core of
one, the system lets that thread wait for some milliseconds, and the others wait with it, dozens of
times in a step: on two cores that others use too, two threads were two to six times slower than one
(``benchmarks.threads``). How long threads that could run had to wait is what Linux tells in
``schedstat`` (https://docs.kernel.org/scheduler/sched-stats.html). It is used
where the number of threads decides no bit of a result: it may change between any two steps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
MOST_COST = 0.005
"""Part of the time that looking may take."""
CROWDED, FREE = 0.3, 0.1
"""Parts of the time for which the thread that is worst off waits for a core. A server's own HTTP
process and its clients stay below the first."""
_PAUSE_SECONDS = 2.0
"""After so long without a step what was counted before says nothing."""
_ACTIVE = 0.05
_PATIENCE, _MOST_PATIENCE, _PROVEN, _SURE = 4, 60, 8, 2
_TASKS = Path("/proc/self/task")

Times = Mapping[str, tuple[int, int]]
"""By thread: nanoseconds that it ran, and that it waited for a core."""


def read_times(folder: Path = _TASKS) -> Times:
    """Return the times of all threads of this process; empty where the system does not tell."""
    found = {}
    try:
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                ran, waited, _ = (folder / name / "schedstat").read_text().split()
                found[name] = (int(ran), int(waited))
    except (OSError, ValueError):  # another kind of system
        return {}
    return found


class ThreadAdapter:
    """Adapts the number of threads between 1 and ``most``; call ``after_step`` after each step.

    ``apply`` sets the number. It falls by as many threads as wait on average, when two looks in
    turn find them waiting. It grows again when none has waited for a while, or not for long for a
    long while. An attempt that fails doubles the time until the next one.
    """

    def __init__(
        self,
        most: int,
        apply: Callable[[int], object],
        *,
        read: Callable[[], Times] = read_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.number = most
        self._most = most
        self._apply, self._read, self._clock = apply, read, clock
        self._before: Times = {}
        self._looked, self._next = clock(), 0.0
        self._patience, self._since_growth = _PATIENCE, _PROVEN
        self._num_crowded = self._num_free = self._num_calm = 0
        self._is_told = False

    def after_step(self) -> None:
        """Look at the waiting times, if it is time, and change the number of threads."""
        now = self._clock()
        if now < self._next or self._most == 1:
            return
        times, before, elapsed = self._read(), self._before, now - self._looked
        cost = self._clock() - now
        self._before, self._looked = times, now
        self._next = now + max(LOOK_SECONDS, cost / MOST_COST)
        if before and elapsed < _PAUSE_SECONDS + (self._next - now):
            self._decide(*_waiting(before, times, elapsed))

    def _decide(self, worst: float, num_waiting: float) -> None:
        self._since_growth += 1
        if self._since_growth == _PROVEN:
            self._patience = _PATIENCE
        self._num_crowded = self._num_crowded + 1 if worst > CROWDED else 0
        self._num_calm = self._num_calm + 1 if worst <= CROWDED else 0
        self._num_free = self._num_free + 1 if worst < FREE else 0
        if self._num_crowded >= _SURE and self.number > 1:
            if self._since_growth < _PROVEN:
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
            self._since_growth = _PROVEN
            self._change(max(1, self.number - max(1, round(num_waiting))))
        elif self.number < self._most and (
            self._num_free >= self._patience or self._num_calm >= _MOST_PATIENCE
        ):
            self._since_growth = 0
            self._change(min(self._most, 2 * self.number))

    def _change(self, number: int) -> None:
        self._num_crowded = self._num_free = self._num_calm = 0
        logger.log(
            logging.DEBUG if self._is_told else logging.INFO,
            "threads of the engine: %d instead of %d, as other work %s the cores",
            number,
            self.number,
            "takes" if number < self.number else "leaves",
        )
        self._is_told = True
        self.number = number
        self._apply(number)


def _waiting(before: Times, now: Times, elapsed: float) -> tuple[float, float]:
    """Return the waiting part of the thread that is worst off, and how many wait on average."""
    worst = total = 0.0
    for name, (ran, waited) in now.items():
        if name not in before:
            continue
        run, wait = (ran - before[name][0]) / 1e9, (waited - before[name][1]) / 1e9
        total += wait
        if run + wait > _ACTIVE * elapsed:
            worst = max(worst, wait / (run + wait))
    return worst, total / elapsed
