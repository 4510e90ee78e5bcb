"""The one way from prompts to outputs when serving: prepare, submit, collect."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import numpy as np

from sensorium import tracing
from sensorium.config import EngineConfig
from sensorium.engine.outputs.pooling import PoolingCollector, pooling_request, resolved
from sensorium.engine.outputs.request_metrics import (
    Metrics,
    report_embedding,
    report_end,
    report_tokens,
)
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import PreparedPrompt, Prompt
from sensorium.engine.serving.client import OutputQueue
from sensorium.engine.serving.stats_log import log_stats
from sensorium.engine.serving.supervisor import EngineSupervisor
from sensorium.engine.stats import EngineStats
from sensorium.errors import EngineDeadError, SensoriumError
from sensorium.outputs import FinishReason, PoolingRequestOutput, RequestOutput
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SUBMITTED_TOKENS = 1 << 16
"""Tokens of prompts that are sent, for the samples of a request, before other tasks of the event loop have a turn."""

SAMPLE_TOKENS = 1 << 10
"""What a sample counts for besides its prompt."""

STATS_SECONDS = 2.0
"""How long the engine, which answers between two steps, is waited for when its counters are asked for."""


class Frontend:
    """Prepares prompts in this process and runs them on an engine in another. One event loop."""

    def __init__(
        self,
        config: EngineConfig,
        input_processor: InputProcessor,
        engine: EngineSupervisor,
        tracer: tracing.Tracer | None = None,
    ) -> None:
        self.config = config
        self.metrics: Metrics | None = None
        self._input_processor = input_processor
        self._engine = engine
        self._stats = EngineStats()
        self._num_generated = 0
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
    ) -> Frontend:
        """Start an engine and what prepares its requests. Raises ConfigError when that cannot be.

        An engine that dies later is replaced by another one. ``package_files``: as for ``InputProcessor``.
        """
        tracer = tracing.Tracer(config.observability.trace_dir)
        engine = EngineSupervisor(config)
        starting = asyncio.create_task(engine.start())
        input_processor = None
        try:
            # Reading the tokenizer goes on while the engine's process loads the weights.
            input_processor = await asyncio.to_thread(
                InputProcessor,
                config,
                trust_request_chat_template=trust_request_chat_template,
                shared=True,
                package_files=package_files,
            )
            await starting
            engine.watch(input_processor.set_facts)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.stop()
            if input_processor is not None:
                input_processor.close()
            tracer.close()
            raise
        frontend = cls(config, input_processor, engine, tracer)
        if not config.observability.disable_log_stats:
            frontend._log_task = asyncio.create_task(frontend._log_stats())
        return frontend

    @property
    def model_name(self) -> str:
        """The model's id or folder, as configured."""
        return self.config.model.model

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self._engine.facts.max_model_len

    @property
    def runner(self) -> Literal["generate", "pooling"]:
        """What the model does here: text or vectors."""
        return "generate" if self._input_processor.embedder is None else "pooling"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model takes besides text."""
        return self._input_processor.modalities

    @property
    def default_params(self) -> dict[str, Any]:
        """Sampling values that the model's generation_config.json sets."""
        return self._input_processor.default_params

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._input_processor.tokenizer

    @property
    def chat_template_available(self) -> bool:
        """Whether conversations can be rendered without a template in the request."""
        return self._input_processor.chat_template_available

    def check_alive(self) -> None:
        """Raise EngineDeadError while the engine is being restarted; its ``retry_after`` says when to come again."""
        self._engine.check_alive()

    async def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Text and ids of a prompt with its placeholders expanded; media are loaded."""
        return await self._input_processor.prepare(prompt)

    async def stats(self) -> EngineStats:
        """Counters of the engine, which begin anew when it is restarted, and of the media pipeline.

        What is known when the engine does not answer: its last counters, and no work while there is no engine.
        """
        try:
            self._stats = await asyncio.wait_for(self._engine.stats(), STATS_SECONDS)
        except EngineDeadError:
            self._stats = self._stats.at_rest()
        except TimeoutError:
            logger.info("the engine is in a long step; these are its counters from before it")
        return dataclasses.replace(
            self._stats,
            media=self._input_processor.media_stats(),
            num_engine_restarts=self._engine.num_restarts,
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the output of a request, one object updated in place, whenever there are news of it.

        Raises RequestError before the first yield for a request that cannot be served, UnavailableError when the engine
        dies or is being restarted. Closing the generator ends the work at whatever stage it is.
        """
        arrival = time.monotonic()
        trace = self._tracer.request(request_id, arrival)
        with tracing.active(trace):
            self._engine.check_alive()
            grammar = await self._input_processor.grammar(params)
            prepared = await self._input_processor.prepare(prompt)
            requests = self._input_processor.requests(
                prepared, params, request_id, priority, arrival, grammar
            )
        stream = OutputCollector.for_requests(
            request_id, prepared, requests, params, self.tokenizer
        )
        stream.trace = trace
        if grammar is not None:
            stream.output.warnings = grammar.warnings
        output_queue: OutputQueue = asyncio.Queue()
        unfinished: FinishReason = "abort"
        try:
            if trace is not None:
                trace.station("submitted", sequences=len(requests))
            num_tokens = 0
            for request in requests:
                self._engine.submit(request, prepared.items, output_queue)
                num_tokens += len(request.token_ids) + SAMPLE_TOKENS
                if num_tokens >= SUBMITTED_TOKENS:
                    num_tokens = 0
                    await asyncio.sleep(0)
            while not stream.finished:
                await self._collect(stream, output_queue)
                yield stream.output
        except Exception:  # neither cancelled nor closed: it failed
            unfinished = "error"
            raise
        finally:
            self._engine.abort(stream.open_ids)
            if trace is not None:
                trace.end("aborted" if unfinished == "abort" else "failed")
            if self.metrics is not None:
                longest = requests[0].max_tokens
                report_end(self.metrics, stream, unfinished, max_tokens=longest)

    def check_pooling(self, params: PoolingParams) -> None:
        """Raise InvalidRequestError when the model makes no such vectors."""
        resolved(self._input_processor.embedder, params)

    async def embed(
        self,
        prompt: Prompt,
        params: PoolingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> PoolingRequestOutput[np.ndarray]:
        """The vector of a prompt, float32.

        Raises RequestError for a request that cannot be served, UnavailableError when the engine dies or is being
        restarted. Cancelling ends the work at whatever stage it is.
        """
        arrival = time.monotonic()
        params = resolved(self._input_processor.embedder, params)
        trace = self._tracer.request(request_id, arrival)
        with tracing.active(trace):
            self._engine.check_alive()
            prepared = await self._input_processor.prepare(prompt)
        request = pooling_request(prepared, params, request_id, priority, arrival)
        stream = PoolingCollector(request_id, prepared, request)
        stream.trace = trace
        output_queue: OutputQueue = asyncio.Queue()
        unfinished: FinishReason = "abort"
        try:
            if trace is not None:
                trace.station("submitted", sequences=1)
            self._engine.submit(request, prepared.items, output_queue)
            while not stream.finished:
                update = await output_queue.get()
                if isinstance(update, SensoriumError):
                    raise update
                stream.apply(update)
        except Exception:
            unfinished = "error"
            raise
        finally:
            self._engine.abort([stream.engine_id])
            if trace is not None:
                trace.end("aborted" if unfinished == "abort" else "failed")
            if self.metrics is not None:
                report_embedding(self.metrics, stream, unfinished)
        self._num_embeddings += 1
        return stream.output

    async def shutdown(self) -> None:
        """Stop the engine and free everything."""
        if self._log_task is not None:
            self._log_task.cancel()
            await asyncio.gather(self._log_task, return_exceptions=True)
        await self._engine.stop()
        try:
            await asyncio.to_thread(self._close)
        except RuntimeError:  # Python is ending: no thread can be started
            self._close()

    def _close(self) -> None:
        self._input_processor.close()
        self._tracer.close()

    async def _collect(self, stream: OutputCollector, output_queue: OutputQueue) -> None:
        """Take in all news that are there; wait for some when there are none."""
        update = await output_queue.get()
        before = stream.metrics.first_token_time
        while True:
            if isinstance(update, SensoriumError):
                raise update
            self._num_generated += update.sample is not None
            if stream.apply(update):
                self._engine.abort([update.request_id])
            if output_queue.empty():
                break
            update = output_queue.get_nowait()
        if self.metrics is not None:
            report_tokens(self.metrics, stream, before)

    async def _log_stats(self) -> None:
        pools = self.runner == "pooling"

        async def read_stats() -> EngineStats:
            stats = await self._engine.stats()
            stats.media = self._input_processor.media_stats()
            return stats

        await log_stats(
            lambda: self._num_embeddings if pools else self._num_generated,
            read_stats,
            interval=self.config.observability.log_stats_interval,
            unit="embeddings" if pools else "generated tokens",
        )
