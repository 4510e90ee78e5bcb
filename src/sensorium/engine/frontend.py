"""The one way from prompts to outputs when serving: prepare, submit, collect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import numpy as np

from sensorium.config import EngineConfig
from sensorium.engine.client import EngineClient, Inbox
from sensorium.engine.pooling import PoolingStream, pooling_request, resolved
from sensorium.engine.prepare import Preparer
from sensorium.engine.prepared import PreparedPrompt
from sensorium.engine.prompts import Prompt
from sensorium.engine.stats import EngineStats
from sensorium.engine.stream import RequestStream
from sensorium.errors import EngineDeadError, SensoriumError
from sensorium.outputs import PoolingRequestOutput, RequestOutput
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SUBMITTED_AT_ONCE = 64
"""Samples of a request that are sent before other tasks of the event loop get their turn."""


class Metrics(Protocol):
    """What the frontend reports of each request; times in seconds."""

    def first_token(self, seconds: float) -> None:
        """From arrival to the first token."""
        ...

    def inter_token(self, seconds: float) -> None:
        """Between two tokens of a request."""
        ...

    def queue(self, seconds: float) -> None:
        """From arrival to the first step that computed something of the request."""
        ...

    def finished(
        self,
        finish_reason: str,
        num_prompt_tokens: int,
        num_generation_tokens: int,
        num_cached_tokens: int,
        e2e_seconds: float,
    ) -> None:
        """The request is complete."""
        ...


class Frontend:
    """Prepares prompts in this process and runs them on an engine in another. One event loop."""

    def __init__(self, config: EngineConfig, preparer: Preparer, client: EngineClient) -> None:
        self.config = config
        self.metrics: Metrics | None = None
        self._preparer = preparer
        self._client = client
        self._num_generated = 0
        self._num_vectors = 0
        self._log_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, *, trust_request_chat_template: bool = False
    ) -> Frontend:
        """Start an engine and what prepares its requests. Raises ConfigError when that cannot be."""
        client = EngineClient(config)
        starting = asyncio.create_task(client.start())
        preparer = None
        try:
            # Reading the tokenizer goes on while the engine's process loads the weights.
            preparer = await asyncio.to_thread(
                Preparer, config, trust_request_chat_template=trust_request_chat_template
            )
            preparer.set_facts(await starting)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await client.stop()
            if preparer is not None:
                preparer.close()
            raise
        frontend = cls(config, preparer, client)
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
        return self._client.facts.max_model_len

    @property
    def runner(self) -> Literal["generate", "pooling"]:
        """What the model does here: text or vectors."""
        return "generate" if self._preparer.embedder is None else "pooling"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model takes besides text."""
        return self._preparer.modalities

    @property
    def default_params(self) -> dict[str, Any]:
        """Sampling values that the model's generation_config.json sets."""
        return self._preparer.default_params

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._preparer.tokenizer

    @property
    def chat_template_available(self) -> bool:
        """Whether conversations can be rendered without a template in the request."""
        return self._preparer.chat_template_available

    def healthy(self) -> bool:
        """Whether the engine lives."""
        return self._client.alive

    async def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Text and ids of a prompt with its placeholders expanded; media are loaded."""
        return await self._preparer.prepare(prompt)

    async def stats(self) -> EngineStats:
        """Counters of the engine and of the media pipeline."""
        stats = await self._client.stats()
        stats.media = self._preparer.media_stats()
        return stats

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the output of a request, one object updated in place, whenever there are news of it.

        Raises RequestError before the first yield for a request that cannot be served, UnavailableError when the engine
        dies. Closing the generator ends the work at whatever stage it is.
        """
        arrival = time.monotonic()
        prepared = await self._preparer.prepare(prompt)
        requests = self._preparer.requests(prepared, params, request_id, priority, arrival)
        stream = RequestStream.for_requests(request_id, prepared, requests, params, self.tokenizer)
        inbox: Inbox = asyncio.Queue()
        try:
            for number, request in enumerate(requests, 1):
                self._client.submit(request, prepared.items, inbox)
                if number % SUBMITTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
            while not stream.finished:
                await self._collect(stream, inbox)
                yield stream.output
        finally:
            self._client.abort(stream.open_ids)
            self._report_end(stream)

    def check_pooling(self, params: PoolingParams) -> None:
        """Raise InvalidRequestError when the model makes no such vectors."""
        resolved(self._preparer.embedder, params)

    async def embed(
        self,
        prompt: Prompt,
        params: PoolingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> PoolingRequestOutput[np.ndarray]:
        """The vector of a prompt, float32.

        Raises RequestError for a request that cannot be served, UnavailableError when the engine dies. Cancelling ends
        the work at whatever stage it is.
        """
        arrival = time.monotonic()
        params = resolved(self._preparer.embedder, params)
        prepared = await self._preparer.prepare(prompt)
        request = pooling_request(prepared, params, request_id, priority, arrival)
        stream = PoolingStream(request_id, prepared, request)
        inbox: Inbox = asyncio.Queue()
        self._client.submit(request, prepared.items, inbox)
        try:
            while not stream.finished:
                news = await inbox.get()
                if isinstance(news, SensoriumError):
                    raise news
                stream.accept(news)
        finally:
            self._client.abort([stream.engine_id])
            self._report_vector(stream)
        self._num_vectors += 1
        return stream.output

    async def shutdown(self) -> None:
        """Stop the engine and free everything."""
        if self._log_task is not None:
            self._log_task.cancel()
            await asyncio.gather(self._log_task, return_exceptions=True)
        await self._client.stop()
        await asyncio.to_thread(self._preparer.close)

    async def _collect(self, stream: RequestStream, inbox: Inbox) -> None:
        """Take in all news that are there; wait for some when there are none."""
        news = await inbox.get()
        before = stream.metrics.first_token_time
        while True:
            if isinstance(news, SensoriumError):
                raise news
            self._num_generated += news.sample is not None
            if stream.accept(news):
                self._client.abort([news.request_id])
            if inbox.empty():
                break
            news = inbox.get_nowait()
        self._report_token(stream, before)

    def _report_token(self, stream: RequestStream, first_before: float | None) -> None:
        now, times = time.monotonic(), stream.metrics
        if self.metrics is None or times.first_token_time is None:
            return
        if first_before is None:
            self.metrics.first_token(times.first_token_time - times.arrival_time)
            if times.first_scheduled_time is not None:
                self.metrics.queue(max(0.0, times.first_scheduled_time - times.arrival_time))
        else:
            self.metrics.inter_token(now - stream.last_news_time)
        stream.last_news_time = now

    def _report_end(self, stream: RequestStream) -> None:
        if self.metrics is None:
            return
        output = stream.output
        reasons = {sample.finish_reason or "abort" for sample in output.outputs}
        self.metrics.finished(
            reasons.pop() if len(reasons) == 1 else "stop",
            len(output.prompt_token_ids),
            sum(len(sample.token_ids) for sample in output.outputs),
            output.num_cached_tokens,
            time.monotonic() - stream.metrics.arrival_time,
        )

    def _report_vector(self, stream: PoolingStream) -> None:
        times, output = stream.metrics, stream.output
        if self.metrics is None:
            return
        if times.first_scheduled_time is not None:
            self.metrics.queue(max(0.0, times.first_scheduled_time - times.arrival_time))
        self.metrics.finished(
            "stop" if stream.finished else "abort",
            len(output.prompt_token_ids),
            0,
            output.num_cached_tokens,
            time.monotonic() - times.arrival_time,
        )

    async def _log_stats(self) -> None:
        interval = self.config.observability.log_stats_interval
        pools = self.runner == "pooling"
        last = 0
        while True:
            await asyncio.sleep(interval)
            num_made = self._num_vectors if pools else self._num_generated
            if num_made == last or not self.healthy():
                continue
            try:
                stats = await self._client.stats()
            except EngineDeadError:
                return
            logger.info(
                "%.1f %s/s; %d running, %d waiting; KV cache %.1f %% used; "
                "prefix cache hits %.1f %%",
                (num_made - last) / interval,
                "vectors" if pools else "generated tokens",
                stats.num_running,
                stats.num_waiting,
                100.0 * stats.kv_blocks_used / max(1, stats.kv_blocks_total),
                100.0 * stats.prefix_hits / max(1, stats.prefix_queries),
            )
            last = num_made
