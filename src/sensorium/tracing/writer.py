"""Writing of ended traces in a thread, so that serving never waits for it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod

from sensorium.tracing.stations import RequestTrace, logger

MAX_WAITING = 1024
"""Ended requests that wait for a writer; further ones are dropped and counted."""
CLOSING_SECONDS = 5.0
REPORT_SECONDS = 60.0
"""Seconds between two lines of the log on traces that could not be written."""


class QueueWriter(ABC):
    """Handles ended traces one after the other, in a thread of its own; ``put`` never waits.

    A trace that cannot be handled is lost, and counted; later ones are not.

    ``reason``: the cause of dropped traces, for the log.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.num_dropped = 0
        self.num_failed = 0
        self._reported_at = float("-inf")
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
            try:
                self._handle(trace)
            except Exception as error:
                self._failed(error)
        try:
            self._finish()
        except Exception:
            logger.exception("the last traces may be lost")

    def _failed(self, error: Exception) -> None:
        """Count a trace that is lost, and say so now and then."""
        self.num_failed += 1
        now = time.monotonic()
        if now >= self._reported_at + REPORT_SECONDS:
            self._reported_at = now
            logger.error(
                "a trace could not be written (%d so far)", self.num_failed, exc_info=error
            )

    @abstractmethod
    def _handle(self, trace: RequestTrace) -> None:
        """Write a trace."""

    @abstractmethod
    def _finish(self) -> None:
        """End what is open, after the last trace."""
