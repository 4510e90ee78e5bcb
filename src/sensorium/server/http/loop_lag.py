"""Lag of the event loop: the delay that anything blocking it adds to each request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SAMPLE_SECONDS = 0.05
"""Default time between two samples."""

MOST_MISSED = 1024
"""Samples that one stall may count as; bounds the work after a machine was suspended."""


class LagSampler:
    """Context manager that reports how many seconds late timers of the running loop fire.

    A timer is set every ``interval`` seconds. Timers that fall due within a stall are reported,
    too, each with its own lag: else a stall of a second would weigh as much as one of a
    millisecond, though it delays a thousand times as many requests. Linux waits in whole
    milliseconds, so an idle loop has a lag of up to one.
    """

    def __init__(self, observe: Callable[[float], None], interval: float | None = None) -> None:
        self._observe = observe
        self._interval = SAMPLE_SECONDS if interval is None else interval
        if not self._interval > 0:
            raise ValueError(f"interval must be above 0 seconds, got {interval}")

    def __enter__(self) -> LagSampler:
        self._loop = asyncio.get_running_loop()
        self._set(self._loop.time() + self._interval)
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def _set(self, due: float) -> None:
        self._due = due
        self._timer = self._loop.call_at(due, self._fire)

    def _fire(self) -> None:
        late = max(0.0, self._loop.time() - self._due)
        num_missed = min(int(late / self._interval), MOST_MISSED)
        for number in range(num_missed + 1):
            self._observe(late - number * self._interval)
        self._set(max(self._due + (num_missed + 1) * self._interval, self._loop.time()))
