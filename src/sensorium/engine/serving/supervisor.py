"""Supervision of the engine process: a new one is started whenever it dies."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable

from sensorium.config import EngineConfig
from sensorium.engine.serving.client import STOPPING, EngineClient, dead_error
from sensorium.engine.serving.engines import ReplicaStats
from sensorium.engine.serving.process import EngineProcess
from sensorium.engine.stats import AdapterFacts, EncodersApart, EngineFacts
from sensorium.errors import ConfigError, EngineDeadError, SensoriumError

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
"""Seconds before the second attempt in a row; each later one waits twice as long, up to the
longest."""

STEADY_SECONDS = 300.0
"""An engine that lived this long ends the row of attempts: its successor is started at once."""


RESTORE_SECONDS = 180.0
"""Most time that a new engine gets to load an adapter of the one before.

Less than the time after which an engine gives an adapter up: the next engine shall start without
it, rather than each wait for it."""


NewClient = Callable[[EngineConfig, EngineProcess | None], EngineClient]
"""Maker of clients, such as ``EngineClient`` itself."""


class Backoff:
    """Delays before the attempts in a row: none, then doubling up to a limit."""

    def __init__(self) -> None:
        self._num_attempts = 0

    def next_delay(self) -> float:
        """Count an attempt and return the seconds to wait before it."""
        self._num_attempts += 1
        if self._num_attempts == 1:
            return 0.0
        # The exponent stays small, or a row of a thousand attempts would overflow a float.
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._num_attempts - 2, 16))

    def reset(self) -> None:
        """Begin a new row."""
        self._num_attempts = 0


class EngineSupervisor:
    """Owner of the engine's client, which it replaces whenever the engine process dies.

    Requests in flight get EngineDeadError from the client that dies; new ones get it from
    ``current`` until there is another. Requests are not sent again: one that kills an engine would
    kill the next one, too. All methods are called on one event loop.

    ``process``: the first engine's, where it has been started already.
    """

    def __init__(
        self,
        config: EngineConfig,
        process: EngineProcess | None = None,
        *,
        new_client: NewClient = EngineClient,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._process = process
        self._new_client = new_client
        self._clock = clock
        self._sleep = sleep
        self._client: EngineClient | None = None
        self._facts: EngineFacts | None = None
        self._adapters: dict[str, AdapterFacts] = {}
        """The adapters that a new engine gets, by name."""
        self._on_start: Callable[[EngineFacts], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._backoff = Backoff()
        self._num_restarts = 0
        self._loading = False
        self._start_seconds = 0.0
        self._expected_at = 0.0
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Return True while requests can be submitted."""
        return self._client is not None and self._client.alive

    @property
    def loading(self) -> bool:
        """Return True while an engine is being started, however long that takes."""
        return self._loading

    @property
    def facts(self) -> EngineFacts:
        """Return the facts of the latest engine that was up."""
        if self._facts is None:
            raise EngineDeadError("The engine has not been started.")
        return self._facts

    @property
    def num_restarts(self) -> int:
        """Return how many engines that died were replaced."""
        return self._num_restarts

    async def start(self) -> None:
        """Start the first engine.

        Raises ConfigError when it cannot start; nothing of it is left then.
        """
        self._client = await self._started()
        self._facts = self._client.facts
        self._adapters = {adapter.name: adapter for adapter in self._facts.adapters}
        # A later engine starts without those that cannot be loaded any more.
        lora = dataclasses.replace(self._config.lora, lora_modules=())
        self._config = dataclasses.replace(self._config, lora=lora)

    def watch(self, on_start: Callable[[EngineFacts], None]) -> None:
        """Replace the engine from now on whenever it dies.

        ``on_start`` gets the facts of the engine that runs, and of each later one before any
        request reaches it.
        """
        on_start(self.facts)
        self._on_start = on_start
        self._task = asyncio.create_task(self._keep_alive())

    def current(self) -> EngineClient:
        """Return the client of the engine that takes requests now.

        Raises:
            EngineDeadError: The engine is being restarted, or the server is shutting down;
                ``retry_after`` says when to try again.
        """
        client = self._client
        if client is None or not client.alive or self._stopping:
            raise self._gone()
        return client

    async def replica_stats(self) -> dict[str, ReplicaStats]:
        """Return nothing: this is one engine."""
        return {}

    def encoder_stats(self) -> EncodersApart | None:
        """Return None: the engine encodes media itself."""
        return None

    async def load_adapter(self, name: str, path: str, folder: str) -> EngineFacts:
        """Load an adapter, which later engines get as well; see ``EngineClient``."""
        facts = self._facts = await self.current().load_adapter(name, path, folder)
        self._adapters.update({a.name: a for a in facts.adapters if a.name == name})
        return facts

    async def unload_adapter(self, name: str) -> EngineFacts:
        """Forget an adapter that no request uses; see ``EngineClient``."""
        self._facts = await self.current().unload_adapter(name)
        self._adapters.pop(name, None)
        return self._facts

    async def stop(self) -> None:
        """Stop the engine, also one that is starting, and release all resources."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.stop()

    def _gone(self) -> EngineDeadError:
        if self._stopping:
            return EngineDeadError(STOPPING)
        released = self._client is None
        seconds = self._expected_at - self._clock() if released else self._start_seconds
        return dead_error(seconds)

    async def _started(self) -> EngineClient:
        process, self._process = self._process, None
        client = self._new_client(self._config, process)
        self._loading = True
        try:
            await client.start()
            await self._restore(client)
        except BaseException:
            await client.stop()
            raise
        finally:
            self._loading = False
        self._start_seconds = client.start_seconds
        return client

    async def _keep_alive(self) -> None:
        while True:
            since = self._clock()
            if self._client is not None:
                await self._client.wait_ended()
            if self._clock() - since >= STEADY_SECONDS:
                self._backoff.reset()
            await self._release()
            while not await self._replaced():
                pass

    async def _release(self) -> None:
        """Release the resources of the dead engine's client: its socket and its folders."""
        self._expected_at = self._clock() + self._start_seconds
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await client.stop()
        except Exception:
            logger.exception("failed to release the resources of the dead engine")

    async def _replaced(self) -> bool:
        """Try once, after a delay, to start another engine; log a failure and return False."""
        delay = self._backoff.next_delay()
        self._expected_at = self._clock() + delay + self._start_seconds
        if delay:
            logger.info("restarting the engine of %s in %g s", self._config.model.model, delay)
            await self._sleep(delay)
        else:
            logger.info("restarting the engine of %s", self._config.model.model)
        try:
            client = await self._started()
        except SensoriumError as error:
            logger.error(
                "failed to restart the engine of %s: %s", self._config.model.model, error.message
            )
            return False
        except Exception:
            logger.exception("failed to restart the engine")
            return False
        self._take_over(client)
        return True

    async def _restore(self, client: EngineClient) -> None:
        """Load the adapters of the engine before; those that cannot be any more are dropped.

        One whose loading ends the engine, or takes it too long, is dropped as well, so that the
        next engine comes up without it; EngineDeadError is raised then.
        """
        for adapter in list(self._adapters.values()):
            try:
                async with asyncio.timeout(RESTORE_SECONDS):
                    problem = await self._restored(client, adapter)
            except ConfigError as error:
                problem = error.message
            except (EngineDeadError, TimeoutError) as error:
                del self._adapters[adapter.name]
                late = isinstance(error, TimeoutError)
                reason = f"took more than {RESTORE_SECONDS:g} s" if late else "ended"
                raise EngineDeadError(
                    f"The adapter {adapter.name!r} is dropped: the engine {reason} loading it."
                ) from None
            except SensoriumError as error:
                logger.error(
                    "the adapter %r is not there until the next start: %s",
                    adapter.name,
                    error.message,
                )
                continue
            if problem is not None:
                logger.error("the adapter %r is dropped: %s", adapter.name, problem)
                del self._adapters[adapter.name]

    async def _restored(self, client: EngineClient, adapter: AdapterFacts) -> str | None:
        """Load an adapter of the engine before. Return what is wrong with it, if anything."""
        facts = await client.load_adapter(adapter.name, adapter.path, adapter.folder)
        found = [one.digest for one in facts.adapters if one.name == adapter.name]
        if found == [adapter.digest]:
            return None
        await client.unload_adapter(adapter.name)
        return "its files have changed since it was loaded; load it again"

    def _take_over(self, client: EngineClient) -> None:
        """Send requests to the new engine from now on."""
        before, after = self.facts, client.facts
        self._num_restarts += 1
        logger.warning(
            "the engine of %s is up again after %.1f s; restarts so far: %d",
            self._config.model.model,
            client.start_seconds,
            self._num_restarts,
        )
        if (after.max_model_len, after.num_kv_blocks) != (
            before.max_model_len,
            before.num_kv_blocks,
        ):
            logger.warning(
                "the context length is now %d tokens (was %d), the KV cache %d blocks (was %d)",
                after.max_model_len,
                before.max_model_len,
                after.num_kv_blocks,
                before.num_kv_blocks,
            )
        self._client, self._facts = client, after
        if self._on_start is not None:
            self._on_start(after)
