"""Timing of work on a device without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTimer:
    """Sums the seconds of work within ``measured``; work that raises is not counted.

    On a GPU, events in the stream mark begin and end of the work, and its time is known once the
    GPU has passed them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_late = device.type == "cuda"
        """Seconds may be known only some time after their work was enqueued."""
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the work that is done, or enqueued on the device, within the block."""
        if self.is_late:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._pending.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def pop_seconds(self) -> float:
        """Return the seconds of work that has completed since the last call."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._seconds += begin.elapsed_time(end) / 1000.0
        seconds, self._seconds = self._seconds, 0.0
        return seconds
