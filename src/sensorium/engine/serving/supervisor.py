"""The engine of a server: one process at a time, and another one when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from sensorium.config import EngineConfig
from sensorium.core.request import EngineRequest
from sensorium.engine.serving.client import STOPPING, EngineClient, OutputQueue, dead_error
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.errors import EngineDeadError, SensoriumError
from sensorium.multimodal.items import MediaItem

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
"""Seconds before the second attempt of a row; each later one waits twice as long, up to the longest."""

STEADY_SECONDS = 300.0
"""An engine that lived so long ends the row of attempts: when it dies, the next one is started at once."""


class Backoff:
    """How long to wait before each of a row of attempts: not at all, then ever longer."""

    def __init__(self) -> None:
        self._num_attempts = 0

    def next_delay(self) -> float:
        """Seconds before the attempt that is made now."""
        self._num_attempts += 1
        if self._num_attempts == 1:
            return 0.0
        # The exponent stays small, or a row of a thousand attempts would overflow a float.
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._num_attempts - 2, 16))

    def reset(self) -> None:
        """The row has ended."""
        self._num_attempts = 0


class EngineSupervisor:
    """Owns the engine's client, replaces it when its process dies, and never gives up while it is not stopped.

    Requests in flight get EngineDeadError from the client that dies, new ones from here until there is another. Nothing
    is sent again by itself: a request that ends the engine would end the next one, too. One event loop.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        new_client: Callable[[EngineConfig], EngineClient] = EngineClient,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._new_client = new_client
        self._clock = clock
        self._sleep = sleep
        self._client: EngineClient | None = None
        self._facts: EngineFacts | None = None
        self._on_start: Callable[[EngineFacts], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._backoff = Backoff()
        self._num_restarts = 0
        self._start_seconds = 0.0
        self._expected_at = 0.0
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether requests can be submitted now."""
        return self._client is not None and self._client.alive

    @property
    def facts(self) -> EngineFacts:
        """What the latest engine that was up found out about itself."""
        if self._facts is None:
            raise EngineDeadError("The engine has not been started.")
        return self._facts

    @property
    def num_restarts(self) -> int:
        """How often an engine that died has been replaced by one that came up."""
        return self._num_restarts

    async def start(self) -> None:
        """Start the first engine. Raises ConfigError when it cannot be; then nothing of it is left."""
        self._client = await self._started()
        self._facts = self._client.facts

    def watch(self, on_start: Callable[[EngineFacts], None]) -> None:
        """From now on replace an engine that dies. ``on_start`` gets the facts of the one that was started, and of each
        later one before any request reaches it."""
        on_start(self.facts)
        self._on_start = on_start
        self._task = asyncio.create_task(self._keep_alive())

    def check_alive(self) -> None:
        """Raise EngineDeadError unless requests can be submitted now."""
        if not self.alive or self._stopping:
            raise self._gone()

    def submit(
        self, request: EngineRequest, items: Sequence[MediaItem], output_queue: OutputQueue
    ) -> None:
        """``EngineClient.submit``; raises EngineDeadError while there is no engine."""
        self._current().submit(request, items, output_queue)

    def abort(self, request_ids: Sequence[str]) -> None:
        """``EngineClient.abort``; ids of an engine that is gone are ignored."""
        if self._client is not None:
            self._client.abort(request_ids)

    async def stats(self) -> EngineStats:
        """``EngineClient.stats``; raises EngineDeadError while there is no engine."""
        return await self._current().stats()

    async def stop(self) -> None:
        """End whatever engine there is, or is being started, and give back everything."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.stop()

    def _current(self) -> EngineClient:
        if self._client is None or self._stopping:
            raise self._gone()
        return self._client

    def _gone(self) -> EngineDeadError:
        return EngineDeadError(STOPPING) if self._stopping else dead_error(self._seconds_left())

    def _seconds_left(self) -> float:
        """Until another engine may be up, going by how long this one took to start."""
        return self._expected_at - self._clock()

    async def _started(self) -> EngineClient:
        client = self._new_client(self._config)
        try:
            await client.start()
        except BaseException:
            await client.stop()
            raise
        self._start_seconds = client.start_seconds
        return client

    async def _keep_alive(self) -> None:
        while True:
            since = self._clock()
            await self._current().wait_ended()
            if self._clock() - since >= STEADY_SECONDS:
                self._backoff.reset()
            await self._give_back()
            while not await self._replaced():
                pass

    async def _give_back(self) -> None:
        """Free what the dead engine's client holds: its socket and its folders."""
        self._expected_at = self._clock() + self._start_seconds
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await client.stop()
        except Exception:
            logger.exception("what the engine that died has left could not be given back in full")

    async def _replaced(self) -> bool:
        """One attempt to start another engine, after its delay; False, and a line in the log, when it fails."""
        delay = self._backoff.next_delay()
        self._expected_at = self._clock() + delay + self._start_seconds
        if delay:
            logger.info("the engine is started again in %g s", delay)
            await self._sleep(delay)
        else:
            logger.info("the engine is started again")
        try:
            client = await self._started()
        except SensoriumError as error:
            logger.error("the engine could not be started again: %s", error.message)
            return False
        except Exception:
            logger.exception("the engine could not be started again")
            return False
        self._take_over(client)
        return True

    def _take_over(self, client: EngineClient) -> None:
        """Let requests go to the engine that has come up."""
        before, after = self.facts, client.facts
        self._num_restarts += 1
        logger.warning(
            "the engine is up again after %.1f s; restarts so far: %d",
            client.start_seconds,
            self._num_restarts,
        )
        if (after.max_model_len, after.num_kv_blocks) != (
            before.max_model_len,
            before.num_kv_blocks,
        ):
            logger.warning(
                "its context now holds %d tokens (%d before), its KV cache %d blocks (%d before)",
                after.max_model_len,
                before.max_model_len,
                after.num_kv_blocks,
                before.num_kv_blocks,
            )
        self._client, self._facts = client, after
        if self._on_start is not None:
            self._on_start(after)
