"""Histogram of the tokens per step of an engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.metrics.families import ITERATION_TOKENS


class IterationTokens:
    """Counts steps by their tokens.

    A prompt counts whole in the step that completes it, a generated token in its own. ``counts``
    has a number for each bucket of ``ITERATION_TOKENS`` and one for what is beyond; steps without
    tokens are not counted. ``num_tokens`` is the sum.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(ITERATION_TOKENS.buckets) + 1)
        self.num_tokens = 0
        self._prompts: dict[str, int] = {}

    def admitted(self, request: EngineRequest) -> None:
        """Note the prompt of a sequence that was admitted."""
        self._prompts[request.request_id] = len(request.token_ids)

    def discard(self, request_id: str) -> None:
        """Drop a sequence that has ended."""
        self._prompts.pop(request_id, None)

    def forget(self) -> None:
        """Drop all sequences, but no counts."""
        self._prompts.clear()

    def count(self, updates: Iterable[SequenceUpdate]) -> None:
        """Count a step by its updates."""
        num_tokens = 0
        for update in updates:
            if update.sample is not None or update.embedding is not None:
                num_tokens += self._prompts.pop(update.request_id, 0)
                num_tokens += update.sample is not None
            elif update.finish_reason is not None:
                self.discard(update.request_id)
        if num_tokens:
            self.counts[bisect_left(ITERATION_TOKENS.buckets, num_tokens)] += 1
            self.num_tokens += num_tokens
