"""The frontend of a server: it prepares prompts, submits requests and collects their outputs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import numpy as np

from sensorium import tracing
from sensorium.config import EngineConfig
from sensorium.engine.outputs.pooling import PoolingCollector, pooling_request
from sensorium.engine.outputs.request_metrics import (
    Metrics,
    report_embedding,
    report_end,
    report_tokens,
)
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.prompts.adapters import KnownAdapters
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import Prompt
from sensorium.engine.serving.adapters import AdapterChanges
from sensorium.engine.serving.client import OutputQueue
from sensorium.engine.serving.engines import EngineDoor, Engines, ReplicaStats
from sensorium.engine.serving.process import EngineProcess
from sensorium.engine.serving.stats_log import log_stats
from sensorium.engine.serving.supervisor import EngineSupervisor
from sensorium.engine.stats import EncodersApart, EngineStats
from sensorium.errors import EngineDeadError, SensoriumError
from sensorium.multimodal.cache.features import NamedFeatures
from sensorium.outputs import FinishReason, PoolingRequestOutput, RequestOutput
from sensorium.params import PoolingParams, SamplingParams

logger = logging.getLogger(__name__)

SUBMITTED_TOKENS = 1 << 16
"""Prompt tokens that are sent, for the samples of a request, before other tasks get a turn."""

SAMPLE_TOKENS = 1 << 10
"""Tokens that a sample counts for besides its prompt."""

STATS_SECONDS = 2.0
"""Timeout of a request for the engine's counters, which it answers between two steps."""


async def started(engine: Engines, new_processor: Callable[[], InputProcessor]) -> InputProcessor:
    """Start engines, and return the input processor that is made meanwhile and knows their facts.

    ``new_processor`` is called in another thread. Raises ConfigError when either cannot be had;
    nothing is left of both then.
    """
    starting = asyncio.create_task(engine.start())
    # Reading the tokenizer goes on while the engine's process loads the weights.
    making = asyncio.create_task(asyncio.to_thread(new_processor))
    try:
        input_processor = await asyncio.shield(making)
        await starting
        engine.watch(input_processor.set_facts)
    except BaseException:
        starting.cancel()
        # A thread cannot be cancelled: what it makes is closed when it is whole.
        _, made = await asyncio.gather(starting, making, return_exceptions=True)
        await engine.stop()
        if not isinstance(made, BaseException):
            made.close()
        raise
    return input_processor


class Frontend:
    """Prepares prompts in this process and runs them on an engine in another.

    All methods are called on one event loop.

    Attributes:
        input_processor: Prepares the prompts; it knows the model's tokenizer, modalities and
            defaults.
        metrics: Where requests are reported; None for nowhere.
    """

    def __init__(
        self,
        config: EngineConfig,
        input_processor: InputProcessor,
        engine: Engines,
        tracer: tracing.Tracer | None = None,
    ) -> None:
        self.config = config
        self.metrics: Metrics | None = None
        self.input_processor = input_processor
        self._engine = engine
        self._stats = EngineStats()
        self._num_generated = 0
        self._changes = AdapterChanges(engine, input_processor, config.model.download_dir)
        self._num_embeddings = 0
        self._log_task: asyncio.Task[None] | None = None
        self._tracer = tracer or tracing.Tracer(None)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        trust_request_chat_template: bool = False,
        package_files: bool = False,
        process: EngineProcess | None = None,
        engine: Engines | None = None,
        elsewhere: NamedFeatures | None = None,
    ) -> Frontend:
        """Start an engine and its input processor.

        An engine that dies later is replaced. ``trust_request_chat_template`` and ``package_files``
        are those of ``InputProcessor``. ``process``: the engine's, where it has been started
        already. ``engine``: others to use in place of one that is supervised here. ``elsewhere``:
        media that other processes have. Raises ConfigError when the model cannot be loaded.
        """
        options = config.observability
        tracer = tracing.Tracer(options.trace_dir, options.otlp_traces_endpoint, config.model.model)
        engine = engine or EngineSupervisor(config, process)

        def new_processor() -> InputProcessor:
            return InputProcessor(
                config,
                trust_request_chat_template=trust_request_chat_template,
                shared=True,
                package_files=package_files,
                elsewhere=elsewhere,
            )

        try:
            input_processor = await started(engine, new_processor)
        except BaseException:
            tracer.close()
            raise
        frontend = cls(config, input_processor, engine, tracer)
        if not options.disable_log_stats:
            frontend._log_task = asyncio.create_task(frontend._log_stats())
        return frontend

    @property
    def max_model_len(self) -> int:
        """Return the longest prompt and answer together, in tokens."""
        return self._engine.facts.max_model_len

    @property
    def adapters(self) -> KnownAdapters:
        """Return the adapters that requests may name."""
        return self.input_processor.adapters

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter from a folder or by a Hugging Face id.

        Raises ConfigError when it cannot be used, EngineDeadError when there is no engine.
        """
        await self._changes.load(name, path)

    async def provide_adapter(self, name: str, path: str) -> None:
        """Load an adapter unless one of this name is loaded; otherwise as ``load_adapter``.

        Raises InvalidRequestError when one of this name came from another place.
        """
        await self._changes.provide(name, path)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter when the requests that use it have ended; there are no new ones.

        Raises ModelNotFoundError for an unknown name, EngineDeadError when there is no engine, and
        UnavailableError when requests use it for long: it stays then.
        """
        await self._changes.unload(name)

    def check_alive(self) -> None:
        """Raise EngineDeadError while the engine is being restarted, with a ``retry_after``."""
        self._engine.current()

    async def stats(self) -> EngineStats:
        """Return the counters of the engine and of the media pipeline.

        Those of the engine restart from 0 with it. When it does not answer, they are the last known
        ones, without running work while there is no engine.
        """
        try:
            self._stats = await asyncio.wait_for(self._engine.current().stats(), STATS_SECONDS)
        except EngineDeadError:
            self._stats = self._stats.at_rest()
        except TimeoutError:
            logger.info("the engine did not answer in time: counters are those of its last answer")
        return dataclasses.replace(
            self._stats,
            media=self.input_processor.media_stats(),
            num_engine_restarts=self._engine.num_restarts,
        )

    async def replica_stats(self) -> dict[str, ReplicaStats]:
        """Return the counters of each replica by its name; nothing where there is one engine."""
        return await self._engine.replica_stats()

    def media_stats(self) -> dict[str, float]:
        """Return the counters of the media that this process loads, by name."""
        return self.input_processor.media_stats()

    def encoder_stats(self) -> EncodersApart | None:
        """Return the counters of replicas that encode media apart; None where engines do."""
        return self._engine.encoder_stats()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the output of a request, one object updated in place, whenever it grows.

        Closing the generator ends the work at whatever stage it is.

        Raises:
            RequestError: The request cannot be served; raised before the first output.
            UnavailableError: The engine died or is being restarted.
        """
        with self.adapters.using(prompt.media.adapter):
            arrival = time.monotonic()
            trace = self._tracer.request(
                request_id,
                arrival,
                operation=prompt.operation,
                adapter=prompt.media.adapter,
            )
            with tracing.active(trace):
                self._engine.current()
                grammar = await self.input_processor.grammar(params)
                prepared = await self.input_processor.prepare(prompt)
                predicted_ids = await self.input_processor.predicted_ids(params)
                requests = self.input_processor.requests(
                    prepared, params, request_id, priority, arrival, grammar, predicted_ids
                )
            stream = OutputCollector.for_requests(
                request_id, prepared, requests, params, self.input_processor.tokenizer
            )
            stream.trace = trace
            if grammar is not None:
                stream.output.warnings = grammar.warnings
            output_queue: OutputQueue = asyncio.Queue()

            def report(metrics: Metrics, unfinished: FinishReason) -> None:
                most, name = requests[0].max_tokens, prompt.media.adapter
                report_end(metrics, stream, unfinished, max_tokens=most, adapter=name)

            with self._running(trace, lambda: stream.open_ids, report) as client:
                if trace is not None:
                    trace.station("submitted", sequences=len(requests))
                num_tokens = 0
                for request in requests:
                    client.submit(request, prepared.items, output_queue)
                    num_tokens += len(request.token_ids) + SAMPLE_TOKENS
                    if num_tokens >= SUBMITTED_TOKENS:
                        num_tokens = 0
                        await asyncio.sleep(0)
                while not stream.finished:
                    await self._collect(client, stream, output_queue)
                    yield stream.output

    async def embed(
        self,
        prompt: Prompt,
        params: PoolingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> PoolingRequestOutput[np.ndarray]:
        """Return the embedding of a prompt, an array (dimensions,) float32.

        Cancelling ends the work at whatever stage it is.

        Raises:
            RequestError: The request cannot be served.
            UnavailableError: The engine died or is being restarted.
        """
        with self.adapters.using(prompt.media.adapter):
            arrival = time.monotonic()
            params = self.input_processor.resolve_pooling(params)
            trace = self._tracer.request(
                request_id, arrival, operation="embeddings", adapter=prompt.media.adapter
            )
            with tracing.active(trace):
                self._engine.current()
                prepared = await self.input_processor.prepare(prompt)
            request = pooling_request(prepared, params, request_id, priority, arrival)
            stream = PoolingCollector(request_id, prepared, request)
            stream.trace = trace
            output_queue: OutputQueue = asyncio.Queue()

            def report(metrics: Metrics, unfinished: FinishReason) -> None:
                report_embedding(metrics, stream, unfinished, prompt.media.adapter)

            with self._running(trace, lambda: [stream.engine_id], report) as client:
                if trace is not None:
                    trace.station("submitted", sequences=1)
                client.submit(request, prepared.items, output_queue)
                while not stream.finished:
                    update = await output_queue.get()
                    if isinstance(update, SensoriumError):
                        raise update
                    stream.apply(update)
            self._num_embeddings += 1
            return stream.output

    @contextlib.contextmanager
    def _running(
        self,
        trace: tracing.RequestTrace | None,
        open_ids: Callable[[], Sequence[str]],
        report: Callable[[Metrics, FinishReason], None],
    ) -> Iterator[EngineDoor]:
        """Give the client that a request runs on; however the block ends, nothing stays behind.

        Args:
            trace: Ends with the block.
            open_ids: Ids of the sequences that have not ended, which are aborted.
            report: Reports the request to the metrics, with the reason if it is unfinished.
        """
        unfinished: FinishReason = "abort"
        client: EngineDoor | None = None
        try:
            client = self._engine.current()
            yield client
        except Exception as error:  # neither cancelled nor closed: it failed
            unfinished = "error"
            if trace is not None:
                trace.end_by(error)
            raise
        finally:
            if client is not None:
                client.abort(open_ids())
            if trace is not None:
                trace.end("aborted")  # unless it has ended
            if self.metrics is not None:
                report(self.metrics, unfinished)

    async def shutdown(self) -> None:
        """Stop the engine and free everything."""
        if self._log_task is not None:
            self._log_task.cancel()
            await asyncio.gather(self._log_task, return_exceptions=True)
        await self._changes.close()
        await self._engine.stop()
        try:
            await asyncio.to_thread(self._close)
        except RuntimeError:  # Python is ending: no thread can be started
            self._close()

    def _close(self) -> None:
        self.input_processor.close()
        self._tracer.close()

    async def _collect(
        self, client: EngineDoor, stream: OutputCollector, output_queue: OutputQueue
    ) -> None:
        """Apply all updates in the queue; wait for one when it is empty."""
        update = await output_queue.get()
        before = stream.metrics.first_token_time
        while True:
            if isinstance(update, SensoriumError):
                raise update
            self._num_generated += update.sample is not None
            if stream.apply(update):
                client.abort([update.request_id])
            if output_queue.empty():
                break
            update = output_queue.get_nowait()
        if self.metrics is not None:
            report_tokens(self.metrics, stream, before)

    async def _log_stats(self) -> None:
        pools = self.input_processor.runner == "pooling"

        async def read_stats() -> EngineStats:
            stats = await self._engine.current().stats()
            stats.media = self.input_processor.media_stats()
            return stats

        await log_stats(
            lambda: self._num_embeddings if pools else self._num_generated,
            read_stats,
            interval=self.config.observability.log_stats_interval,
            unit="embeddings" if pools else "generated tokens",
            model=self.config.model.model,
        )
