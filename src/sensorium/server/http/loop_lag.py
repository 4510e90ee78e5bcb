"""How late the event loop does what is due: what everything that holds it costs each request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SAMPLE_SECONDS = 0.05
"""Between two samples, where nothing else is asked for."""

_MOST_MISSED = 1024
"""Timers that one stall counts for; it bounds the work after a machine was suspended."""


class LagSampler:
    """Sets a timer of the running loop every ``interval`` seconds and reports how many seconds late each one fires;
    use it as a context manager.

    The timers that fall due within a stall count too, each with its own lateness: else a stall of a second would weigh
    as much as one of a millisecond, though it meets a thousand times as many requests. Linux waits in whole
    milliseconds, so an idle loop is up to one late.
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
        num_missed = min(int(late / self._interval), _MOST_MISSED)
        for number in range(num_missed + 1):
            self._observe(late - number * self._interval)
        self._set(max(self._due + (num_missed + 1) * self._interval, self._loop.time()))
