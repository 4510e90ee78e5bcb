"""Stations of sequences inside the engine, for traces: scheduled, encoded and prefilled."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sensorium import tracing
from sensorium.core.plan import EncodeReport, StepPlan
from sensorium.core.request import SequenceUpdate


@dataclass(slots=True)
class _Sequence:
    """A sequence that runs. ``encoded``: begin, end and items of each batch of its items."""

    request_id: str
    arrival: float
    is_prefilled: bool = False
    encoded: tuple[tuple[float, float, int], ...] = ()


class EngineStations:
    """Logs the stations of sequences, and stamps updates with times that the frontend cannot see.

    With ``traces`` updates are stamped even when the log level is not debug.
    """

    def __init__(self, *, traces: bool) -> None:
        self._traces = traces
        self._began = 0.0
        self._sequences: dict[str, _Sequence] = {}
        self._by_number: dict[int, _Sequence] = {}

    @property
    def wanted(self) -> bool:
        """Return True if stations are logged or traced."""
        return self._traces or tracing.logger.isEnabledFor(logging.DEBUG)

    def scheduled(self, plan: StepPlan) -> None:
        """Log the sequences that a plan starts; call it before the plan is executed."""
        self._began = time.monotonic()
        starts = {span.seq_id: span.start for span in plan.spans}
        for number in plan.dropped:
            self._by_number.pop(number, None)
        for new in plan.new:
            request = new.request
            known = self._sequences.get(request.request_id)
            name = "scheduled" if known is None else "resumed"
            if known is None:
                known = _Sequence(request.request_id, request.arrival_time)
                self._sequences[request.request_id] = known
            self._by_number[new.seq_id] = known
            facts: dict[str, tracing.Fact] = {
                "tokens": len(new.token_ids),
                "cached_tokens": starts.get(new.seq_id, 0),
            }
            tracing.log_station(known.request_id, name, known.arrival, None, self._began, facts)

    def committed(
        self, plan: StepPlan, encoded: EncodeReport, updates: Sequence[SequenceUpdate]
    ) -> list[SequenceUpdate]:
        """Return the updates of a step, with the times in those that complete a prompt.

        Encoding is the first thing that a step does. Where its time is known late, as on a GPU, it
        is no station: it may be the time of another step.
        """
        now = time.monotonic()
        if plan.encode and encoded.seconds > 0 and not encoded.is_late:
            self._encoded(plan, min(now, self._began + encoded.seconds))
        return [self._stamped(update, now) for update in updates]

    def discard(self, request_id: str) -> None:
        """Drop a sequence that has ended."""
        self._sequences.pop(request_id, None)

    def clear(self) -> None:
        """Drop all sequences."""
        self._sequences.clear()
        self._by_number.clear()

    def _encoded(self, plan: StepPlan, end: float) -> None:
        """Log the batch of a step for each sequence that had items in it."""
        numbers = [job.seq_id for job in plan.encode]
        for number in dict.fromkeys(numbers):
            known = self._by_number.get(number)
            if known is not None:
                batch = self._began, end, numbers.count(number)
                if not known.is_prefilled:  # later ones repeat what a preemption lost
                    known.encoded = (*known.encoded, batch)
                facts: dict[str, tracing.Fact] = {"items": batch[2]}
                tracing.log_station(
                    known.request_id, "encoded", known.arrival, self._began, end, facts
                )

    def _stamped(self, update: SequenceUpdate, now: float) -> SequenceUpdate:
        known = self._sequences.get(update.request_id)
        is_computed = update.sample is not None or update.embedding is not None
        if is_computed and known is not None and not known.is_prefilled:
            known.is_prefilled = True
            tracing.log_station(known.request_id, "prefilled", known.arrival, None, now, {})
            update = dataclasses.replace(update, prefilled_time=now, encoded=known.encoded)
        if update.finish_reason is not None:
            self.discard(update.request_id)
        return update
