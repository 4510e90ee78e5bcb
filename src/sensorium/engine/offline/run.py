"""The run of one call of ``LLM``: prompts are prepared ahead and submitted, outputs are yielded."""

from __future__ import annotations

import concurrent.futures
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from sensorium import forks, tracing
from sensorium.engine.engine import Engine
from sensorium.engine.offline.batch import BatchInput, BatchPrompt
from sensorium.engine.outputs.pooling import PoolingCollector, pooling_request
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.errors import EngineDeadError, SensoriumError, located
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.outputs import PoolingRequestOutput, RequestOutput
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.grammar.library import Grammar

PooledOutput = PoolingRequestOutput[np.ndarray]
Output = RequestOutput | PooledOutput

AHEAD = 2
"""Most prompts that are held with their media, pending or running, as a multiple of
max_num_seqs."""

READING_SECONDS = 0.01
"""Most time for reading the caller's iterator between two steps; at least one prompt is read."""


@dataclass(slots=True)
class PendingPrompt:
    """A prompt that is being prepared for the engine."""

    index: int
    params: SamplingParams | PoolingParams
    prepared: concurrent.futures.Future[tuple[PreparedPrompt, Grammar | None, tuple[int, ...]]]
    arrival_time: float
    request_id: str
    priority: int = 0
    trace: tracing.RequestTrace | None = None


class BatchRun:
    """Runs the prompts of one call on the engine, in the caller's thread.

    A generator of ``outputs`` that is left early must be closed. A run that was interrupted during
    its clean-up is not ``is_clean``; it must be cleaned up again before the engine is used.
    ``numbers`` gives the ids of requests.
    """

    def __init__(
        self,
        batch: BatchInput,
        engine: Engine,
        input_processor: InputProcessor,
        loop: LoopThread,
        numbers: Iterator[int],
        tracer: tracing.Tracer,
        *,
        max_num_seqs: int,
    ) -> None:
        self.is_clean = False
        self._made_in = forks.generation()
        self._engine = engine
        self._input_processor = input_processor
        self._loop = loop
        self._numbers = numbers
        self._tracer = tracer
        self._traces: dict[int, tracing.RequestTrace] = {}
        self._batch = batch
        self._is_read_late = batch.total is None
        self._most_held = AHEAD * max_num_seqs
        self._prompts: Iterator[BatchPrompt] | None = batch.prompts
        self._num_read = 0
        self._ready: deque[PendingPrompt] = deque()
        self._streams: dict[str, tuple[int, OutputCollector | PoolingCollector]] = {}
        self._errors: list[SensoriumError] = []
        self._reading_error: Exception | None = None

    def outputs(self) -> Generator[tuple[int, Output], None, None]:
        """Yield (index, output) whenever an output grows; closing the generator ends all work.

        After an error of one prompt no more are started. Those that run are finished, and then it
        is raised.
        """
        whole = False
        try:
            while self._is_open:
                forks.check_owner(self._made_in, "stream of outputs")
                if not self._errors:
                    self._prepare_ahead()
                    self._admit()
                for index, stream in self._step():
                    yield index, stream.output
            whole = True
            if self._errors:
                raise self._errors[0]
            if self._reading_error is not None:
                raise self._reading_error
        except (SensoriumError, GeneratorExit) as error:
            whole = not isinstance(error, EngineDeadError)  # it came in the middle of a step
            raise
        finally:
            self.clean_up(whole=whole)

    def clean_up(self, *, whole: bool) -> None:
        """End all work that is left.

        ``whole`` is False when an interrupt came in the middle of a step or of bookkeeping: the
        engine is reset then.
        """
        for pending in self._ready:
            pending.prepared.cancel()
        self._prompts = None
        if not whole:
            self._engine.reset()
        for engine_id in self._streams:
            self._engine.abort(engine_id)
        for trace in self._traces.values():
            trace.end("aborted")
        self._traces.clear()
        self._ready.clear()
        self._streams.clear()
        self.is_clean = True

    @property
    def _is_open(self) -> bool:
        left = self._prompts is not None or bool(self._ready)
        return bool(self._streams) or (left and not self._errors)

    def _prepare_ahead(self) -> None:
        """Keep just enough prompts in preparation that the engine need not wait."""
        ends = time.monotonic() + READING_SECONDS
        while len(self._ready) + len(self._streams) < self._most_held:
            began = time.monotonic()
            prompt = self._next_prompt()
            if prompt is None:
                return
            index = self._batch.index_of(self._num_read - 1)
            request_id = str(next(self._numbers))
            arrival = time.monotonic()
            trace = self._trace(index, request_id, began, arrival, prompt)
            future = self._loop.submit(self._prepared(prompt, trace))
            priority = self._batch.priority_of(index)
            self._ready.append(
                PendingPrompt(index, prompt.params, future, arrival, request_id, priority, trace)
            )
            if self._is_read_late and time.monotonic() > ends:
                return

    def _next_prompt(self) -> BatchPrompt | None:
        """Return the next prompt, or None at the end.

        An error of it, or of the caller's iterator, is kept until the prompts before are finished.
        """
        if self._prompts is None:
            return None
        try:
            prompt = next(self._prompts)
        except StopIteration:
            self._prompts = None
            return None
        except Exception as error:
            self._prompts = None
            self._reading_error = error
            return None
        self._num_read += 1
        return prompt

    def _trace(
        self, index: int, request_id: str, began: float, arrival: float, prompt: BatchPrompt
    ) -> tracing.RequestTrace | None:
        """Begin the trace, if any, of a prompt rendered between ``began`` and ``arrival``."""
        given = prompt.prompt
        pools = isinstance(prompt.params, PoolingParams)
        trace = self._tracer.request(
            request_id,
            arrival,
            operation="embeddings" if pools else given.operation,
            adapter=given.media.adapter,
        )
        if trace is not None:
            self._traces[index] = trace
            rendered = prompt.rendered
            if rendered is not None:
                trace.station(
                    "rendered",
                    began,
                    arrival,
                    tokens=len(rendered.token_ids),
                    items=len(rendered.refs),
                )
        return trace

    async def _prepared(
        self, given: BatchPrompt, trace: tracing.RequestTrace | None
    ) -> tuple[PreparedPrompt, Grammar | None, tuple[int, ...]]:
        """Prepare a prompt with its media, its constraint and the answer that is expected."""
        processor, params = self._input_processor, given.params
        with tracing.active(trace):
            grammar: Grammar | None = None
            predicted_ids: tuple[int, ...] = ()
            if not isinstance(params, PoolingParams):
                grammar = await processor.grammar(params)
                predicted_ids = await processor.predicted_ids(params)
            if given.rendered is None:
                prepared = await processor.prepare(given.prompt)
            else:
                prepared = await processor.complete(given.prompt, given.rendered)
            return prepared, grammar, predicted_ids

    def _admit(self) -> None:
        """Submit prepared prompts in order; wait for one only when the engine is idle."""
        while self._ready and not self._errors:
            pending = self._ready[0]
            if not pending.prepared.done() and self._engine.has_work:
                return
            self._ready.popleft()
            try:
                with located(prompt=self._batch.error_index(pending.index)):
                    self._start(pending)
            except SensoriumError as error:
                self._drop(pending.index)
                self._errors.append(error)

    def _start(self, pending: PendingPrompt) -> None:
        (prepared, grammar, predicted_ids), params = pending.prepared.result(), pending.params
        request_id = pending.request_id
        stream: OutputCollector | PoolingCollector
        if isinstance(params, PoolingParams):
            requests = [
                pooling_request(
                    prepared, params, request_id, pending.priority, pending.arrival_time
                )
            ]
            stream = PoolingCollector(request_id, prepared, requests[0])
        else:
            requests = self._input_processor.requests(
                prepared,
                params,
                request_id,
                pending.priority,
                pending.arrival_time,
                grammar,
                predicted_ids,
            )
            stream = OutputCollector.for_requests(
                request_id, prepared, requests, params, self._input_processor.tokenizer
            )
            if grammar is not None:
                stream.output.warnings = grammar.warnings
        stream.output.index = pending.index
        stream.trace = pending.trace
        if pending.trace is not None:
            pending.trace.station("submitted", sequences=len(requests))
        features = tuple(item.features for item in prepared.items)
        for request in requests:
            self._streams[request.request_id] = (pending.index, stream)
            self._engine.add(request, features)

    def _drop(self, index: int) -> None:
        """Abort the sequences of a prompt."""
        trace = self._traces.pop(index, None)
        if trace is not None:
            trace.end("failed")
        for engine_id in [i for i, (owner, _) in self._streams.items() if owner == index]:
            self._engine.abort(engine_id)
            del self._streams[engine_id]

    def _step(self) -> list[tuple[int, OutputCollector | PoolingCollector]]:
        """Run one step and return the collectors that grew; failed requests are left out."""
        if not self._engine.has_work:
            return []
        moved: dict[int, OutputCollector | PoolingCollector] = {}
        for update in self._engine.step():
            entry = self._streams.get(update.request_id)
            if entry is None:
                continue
            index, stream = entry
            try:
                with located(prompt=self._batch.error_index(index)):
                    stopped = stream.apply(update)
            except SensoriumError as error:
                self._drop(index)
                moved.pop(index, None)
                self._errors.append(error)
                continue
            if stopped:
                self._engine.abort(update.request_id)
            if stopped or update.finish_reason is not None:
                del self._streams[update.request_id]
            moved[index] = stream
            if stream.finished:
                self._traces.pop(index, None)
        return list(moved.items())
