"""Writing of ended traces in a thread, so that serving never waits for it."""

from __future__ import annotations

import contextlib
import queue
import threading
from abc import ABC, abstractmethod

from sensorium.tracing.stations import RequestTrace, logger

MAX_WAITING = 1024
"""Ended requests that wait for a writer; further ones are dropped and counted."""
CLOSING_SECONDS = 5.0


class QueueWriter(ABC):
    """Handles ended traces one after the other, in a thread of its own; ``put`` never waits.

    ``reason``: the cause of dropped traces, for the log.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.num_dropped = 0
        self._reason = reason
        self._queue: queue.Queue[RequestTrace | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, trace: RequestTrace) -> None:
        """Have a trace written; drop it when the writer is too far behind."""
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what is left, for at most ``CLOSING_SECONDS``."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSING_SECONDS)
            self._thread.join(CLOSING_SECONDS)
        if self.num_dropped:
            logger.warning("%d traces were dropped: %s", self.num_dropped, self._reason)

    def _run(self) -> None:
        while (trace := self._queue.get()) is not None:
            self._handle(trace)
        self._finish()

    @abstractmethod
    def _handle(self, trace: RequestTrace) -> None:
        """Write a trace."""

    @abstractmethod
    def _finish(self) -> None:
        """End what is open, after the last trace."""
