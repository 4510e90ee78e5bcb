"""Requests whose result is a vector: how they are made of prompts, and what is collected of them."""

from __future__ import annotations

import time

import numpy as np

from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine.outputs.stream import failure
from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.errors import InvalidRequestError, located
from sensorium.models.embedder import GENERATES, Embedder
from sensorium.outputs import PoolingRequestOutput, RequestMetrics
from sensorium.params import PoolingParams, SamplingParams
from sensorium.tracing import RequestTrace

_NOT_SAMPLED = SamplingParams()


def resolved(embedder: Embedder | None, params: PoolingParams) -> PoolingParams:
    """The parameters with nothing left open. Raises InvalidRequestError when the model has no such vectors."""
    if embedder is None:
        raise InvalidRequestError(GENERATES)
    return embedder.resolve(params)


def pooling_request(
    prepared: PreparedPrompt,
    params: PoolingParams,
    request_id: str,
    priority: int,
    arrival_time: float,
) -> EngineRequest:
    """The engine's request for the vector of a prompt; ``params`` are resolved."""
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
    """Waits for the one piece of news of a pooling request: its vector, float32, as ``output.outputs``."""

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
        """Whether the vector is there."""
        return self.output.finished

    def accept(self, update: SequenceUpdate) -> bool:
        """Take in the vector; False, for there is nothing to be aborted.

        Raises RequestError at the prompt when it has no vector, UnavailableError when the engine could not
        compute it.
        """
        if update.error is not None:
            with located(self._param):
                raise failure(update.error)
        if update.vector is None:
            raise ValueError("the news of a pooling request bring its vector")
        output = self.output
        output.outputs = np.frombuffer(update.vector, "<f4").astype(np.float32)
        output.num_cached_tokens = update.num_cached_tokens
        output.finished = True
        self.metrics.first_scheduled_time = update.first_scheduled_time
        self.metrics.finished_time = time.monotonic()
        if self.trace is not None:
            self.trace.prefilled(update.first_scheduled_time, update.prefilled_time)
            self.trace.end("finished")
        return False
