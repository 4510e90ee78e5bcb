"""Requests for embeddings: the engine's request of a prompt, and the collector of its result."""

from __future__ import annotations

import time

import numpy as np

from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine.outputs.stream import failure
from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.errors import located
from sensorium.outputs import PoolingRequestOutput, RequestMetrics
from sensorium.params import PoolingParams, SamplingParams
from sensorium.tracing import RequestTrace

_NOT_SAMPLED = SamplingParams()


def pooling_request(
    prepared: PreparedPrompt,
    params: PoolingParams,
    request_id: str,
    priority: int,
    arrival_time: float,
) -> EngineRequest:
    """Return the engine's request for the embedding of a prompt; ``params`` are resolved."""
    return prepared.request(
        0,
        known_length=True,
        request_id=request_id,
        params=_NOT_SAMPLED,
        priority=priority,
        arrival_time=arrival_time,
        pooling=params,
    )


class PoolingCollector:
    """Collector of the only update of a pooling request: its float32 embedding."""

    def __init__(self, request_id: str, prepared: PreparedPrompt, request: EngineRequest) -> None:
        self.engine_id = request.request_id
        self._param = prepared.param
        self.metrics = RequestMetrics(request.arrival_time)
        self.trace: RequestTrace | None = None
        self.output: PoolingRequestOutput[np.ndarray] = PoolingRequestOutput(
            request_id=request_id,
            outputs=np.empty(0, np.float32),
            prompt_token_ids=list(prepared.token_ids),
            finished=False,
            prompt=prepared.text,
            num_item_tokens=prepared.num_item_tokens,
            metrics=self.metrics,
        )

    @property
    def finished(self) -> bool:
        """Return True once the embedding is there."""
        return self.output.finished

    def apply(self, update: SequenceUpdate) -> bool:
        """Take the embedding over, and return False: there is nothing left to abort.

        Raises RequestError when the prompt has no usable embedding, UnavailableError when the
        engine could not compute it.
        """
        if update.error is not None:
            with located(self._param):
                raise failure(update.error)
        if update.embedding is None:
            raise ValueError("the update of a pooling request has its embedding")
        output = self.output
        output.outputs = np.frombuffer(update.embedding, "<f4").astype(np.float32)
        output.num_cached_tokens = update.num_cached_tokens
        output.finished = True
        self.metrics.first_scheduled_time = update.first_scheduled_time
        self.metrics.finished_time = time.monotonic()
        if self.trace is not None:
            self.trace.prefilled(update.first_scheduled_time, update.prefilled_time, update.encoded)
            self.trace.end("finished")
        return False
