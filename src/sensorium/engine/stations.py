"""The stations of sequences inside the engine: when each is first computed, and when its prompt is."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

from sensorium import tracing
from sensorium.core.plan import StepPlan
from sensorium.core.request import SequenceUpdate


class EngineStations:
    """Writes the lines of sequences that are being computed, and gives the frontend the times that it cannot see.

    ``traces``: times are wanted also where the log has no lines of level debug.
    """

    def __init__(self, *, traces: bool) -> None:
        self._traces = traces
        self._arrivals: dict[str, float] = {}
        self._prefilled: set[str] = set()

    @property
    def wanted(self) -> bool:
        """Whether anybody reads stations."""
        return self._traces or tracing.logger.isEnabledFor(logging.DEBUG)

    def scheduled(self, plan: StepPlan) -> None:
        """A plan is about to be run."""
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
        """Return the updates of a step, those that say that a prompt is computed with the time of it."""
        now = time.monotonic()
        return [self._stamped(update, now) for update in updates]

    def discard(self, request_id: str) -> None:
        """Forget a sequence that has ended."""
        self._arrivals.pop(request_id, None)
        self._prefilled.discard(request_id)

    def clear(self) -> None:
        """Forget all sequences."""
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
