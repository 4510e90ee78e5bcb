"""Stations of sequences inside the engine, for traces: scheduled, and prefilled."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

from sensorium import tracing
from sensorium.core.plan import StepPlan
from sensorium.core.request import SequenceUpdate


class EngineStations:
    """Logs the stations of sequences, and stamps updates with times that the frontend cannot see.

    With ``traces`` updates are stamped even when the log level is not debug.
    """

    def __init__(self, *, traces: bool) -> None:
        self._traces = traces
        self._arrivals: dict[str, float] = {}
        self._prefilled: set[str] = set()

    @property
    def wanted(self) -> bool:
        """Return True if stations are logged or traced."""
        return self._traces or tracing.logger.isEnabledFor(logging.DEBUG)

    def scheduled(self, plan: StepPlan) -> None:
        """Log the sequences that a plan starts; call it before the plan is executed."""
        now = time.monotonic()
        starts = {span.seq_id: span.start for span in plan.spans}
        for new in plan.new:
            request = new.request
            known = request.request_id in self._arrivals
            self._arrivals[request.request_id] = request.arrival_time
            facts: dict[str, tracing.Fact] = {
                "tokens": len(new.token_ids),
                "cached_tokens": starts.get(new.seq_id, 0),
            }
            tracing.log_station(
                request.request_id,
                "resumed" if known else "scheduled",
                request.arrival_time,
                None,
                now,
                facts,
            )

    def committed(self, updates: Sequence[SequenceUpdate]) -> list[SequenceUpdate]:
        """Return the updates of a step, with the time in those that complete a prompt."""
        now = time.monotonic()
        return [self._stamped(update, now) for update in updates]

    def discard(self, request_id: str) -> None:
        """Drop a sequence that has ended."""
        self._arrivals.pop(request_id, None)
        self._prefilled.discard(request_id)

    def clear(self) -> None:
        """Drop all sequences."""
        self._arrivals.clear()
        self._prefilled.clear()

    def _stamped(self, update: SequenceUpdate, now: float) -> SequenceUpdate:
        request_id = update.request_id
        arrival = self._arrivals.get(request_id)
        is_computed = update.sample is not None or update.embedding is not None
        if is_computed and arrival is not None and request_id not in self._prefilled:
            self._prefilled.add(request_id)
            tracing.log_station(request_id, "prefilled", arrival, None, now, {})
            update = dataclasses.replace(update, prefilled_time=now)
        if update.finish_reason is not None:
            self.discard(request_id)
        return update
