"""The client of an engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from sensorium import errors
from sensorium.config import EngineConfig
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine import wire
from sensorium.engine.serving.process import EngineProcess
from sensorium.engine.shared import SharedFeatures
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.multimodal.items import MediaItem

logger = logging.getLogger(__name__)

RequestUpdate = SequenceUpdate | errors.SensoriumError
OutputQueue = asyncio.Queue[RequestUpdate]
Answer = TypeVar("Answer")

STOP_SECONDS = 5.0
"""Seconds that the engine's process gets to end by itself."""

DELIVERED_AT_ONCE = 16
"""Updates that are delivered before other tasks of the event loop get a turn."""

RESTARTING = "The engine has stopped and is being restarted; try again in a moment."
_AGAIN = "It is being restarted; try again in a moment."
ENDED, ENDED_ALONE = (f"{words}. {_AGAIN}" for words in (errors.ENDED, errors.ENDED_ALONE))
STOPPING = "The server is shutting down; send the request to another one."

LONGEST_RETRY = 60
"""Seconds; most that a client is told to wait before it tries again."""


def dead_error(seconds: float, message: str = RESTARTING) -> errors.EngineDeadError:
    """Return the error of a request whose engine died; another is expected in so many seconds."""
    error = errors.EngineDeadError(message)
    error.retry_after = min(LONGEST_RETRY, max(1, math.ceil(seconds)))
    return error


class EngineClient:
    """One engine process: started once, talked to and stopped from one event loop.

    The updates of a submitted sequence, or its error, go to its output queue. Its items are held
    until it has ended, which keeps their shared memory. When the process dies, every open sequence
    gets an error, and only ``stop`` is left to call; ``EngineSupervisor`` then makes another
    client.

    ``process``: one to use in place of a new one; it is this client's from then on.
    """

    def __init__(self, config: EngineConfig, process: EngineProcess | None = None) -> None:
        self._config = config
        self._context = zmq.asyncio.Context()
        try:
            self._socket = self._context.socket(zmq.PAIR)
        except BaseException:
            self._context.term()
            raise
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._process = process or EngineProcess()
        except BaseException:
            self._socket.close()
            self._context.term()
            raise
        self._routes: dict[str, tuple[OutputQueue, tuple[MediaItem, ...]]] = {}
        self._stats: dict[int, asyncio.Future[EngineStats]] = {}
        self._changes: dict[int, asyncio.Future[wire.Adapters]] = {}
        self._embeddings: dict[int, asyncio.Future[wire.Embeddings]] = {}
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._alive = False
        self._ended = asyncio.Event()
        self._start_seconds = 0.0
        self._facts: EngineFacts | None = None

    @property
    def alive(self) -> bool:
        """Return True while requests can be submitted."""
        return self._alive

    @property
    def facts(self) -> EngineFacts:
        """Return the facts that the engine found at its start."""
        if self._facts is None:
            raise errors.EngineDeadError("The engine has not been started.")
        return self._facts

    @property
    def start_seconds(self) -> float:
        """Return how long the start took, in seconds."""
        return self._start_seconds

    @property
    def num_open(self) -> int:
        """Return the number of sequences that have not ended."""
        return len(self._routes)

    async def start(self) -> EngineFacts:
        """Start the process and wait until the model is loaded.

        Raises ConfigError when it cannot be, EngineDeadError when the process ends meanwhile;
        ``stop`` must follow.
        """
        began = time.monotonic()
        self._socket.bind(self._process.address)
        if not self._process.started:
            self._process.start()
        # Not waited for: a process that ends before it connects never takes the message.
        self._send(wire.Configure(self._config))
        receive = asyncio.ensure_future(self._socket.recv())
        died = asyncio.ensure_future(self._process.wait())
        seconds = self._config.scheduler.engine_start_timeout or None
        done, _ = await asyncio.wait(
            {receive, died}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            receive.cancel()
            raise errors.EngineDeadError(
                f"The engine was not up after {seconds:g} seconds, the most that "
                "--engine-start-timeout allows."
            )
        if not receive.done():
            # The reason may still be on its way through the socket.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(receive), 1.0)
        if not receive.done():
            receive.cancel()
            raise errors.EngineDeadError(
                f"The engine's process {_ending(self._process.returncode)} while starting; "
                "its messages are above."
            )
        message = wire.decode_from_engine(receive.result())
        if isinstance(message, wire.Failed):
            raise errors.error_of(message.code, message.message, message.param, errors.ConfigError)
        if not isinstance(message, wire.Ready):
            raise errors.EngineDeadError("The engine sent an unexpected first message.")
        self._facts, self._alive = message.facts, True
        self._start_seconds = time.monotonic() - began
        self._tasks = [
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._watch(died)),
        ]
        return message.facts

    def submit(
        self, request: EngineRequest, items: Sequence[MediaItem], output_queue: OutputQueue
    ) -> None:
        """Send a sequence; its updates go to ``output_queue`` until it ends or is aborted."""
        if not self._alive:
            raise dead_error(self._start_seconds)
        handles = tuple(SharedFeatures.of(item.features) for item in items)
        self._send(wire.Submit(request, handles))
        self._routes[request.request_id] = (output_queue, tuple(items))

    def abort(self, request_ids: Sequence[str]) -> None:
        """End sequences; ids of ended ones are ignored."""
        open_ids = tuple(i for i in request_ids if i in self._routes)
        for request_id in open_ids:
            del self._routes[request_id]
        if open_ids and self._alive:
            self._send(wire.Abort(open_ids))

    async def stats(self) -> EngineStats:
        """Return the counters of the engine. Raises EngineDeadError when it has stopped."""
        number = next(self._numbers)
        return await self._asked(self._stats, number, wire.AskStats(number))

    async def embeddings(self, digest: bytes) -> wire.Embeddings:
        """Return an item's encoder output, if the engine has it still; raises as ``stats``."""
        number = next(self._numbers)
        return await self._asked(self._embeddings, number, wire.AskEmbeddings(number, digest))

    async def _asked(
        self, waiting: dict[int, asyncio.Future[Answer]], number: int, message: wire.ToEngine
    ) -> Answer:
        """Send a message and return the answer with its number. Raises EngineDeadError."""
        if not self._alive:
            raise dead_error(self._start_seconds)
        waiting[number] = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            return await waiting[number]
        finally:
            waiting.pop(number, None)

    async def load_adapter(self, name: str, path: str, folder: str) -> EngineFacts:
        """Load an adapter and return the facts with it.

        path: as it was given, a folder or a Hugging Face id. folder: where it is; empty for the
        engine to find it.

        Raises ConfigError when it cannot be used, EngineDeadError when the engine has stopped, and
        SensoriumError when the engine fails at it.
        """
        return await self._change(wire.LoadAdapter(next(self._numbers), name, path, folder))

    async def unload_adapter(self, name: str) -> EngineFacts:
        """Forget an adapter that no request uses; raises as ``load_adapter``."""
        return await self._change(wire.UnloadAdapter(next(self._numbers), name))

    async def _change(self, message: wire.LoadAdapter | wire.UnloadAdapter) -> EngineFacts:
        answer = await self._asked(self._changes, message.number, message)
        if answer.failed is not None:
            failed = answer.failed
            # A code that no error has is that of a fault of ours.
            raise errors.error_of(failed.code, failed.message, failed.param, errors.SensoriumError)
        return self.facts

    async def wait_ended(self) -> None:
        """Wait until the process has died and all open sequences have got their error."""
        await self._ended.wait()

    async def stop(self) -> None:
        """End the process and release all resources."""
        try:
            await self._end_process()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._fail_all(lambda: errors.EngineDeadError(STOPPING))
            self._socket.close()
            self._context.term()
            self._process.close()

    async def _end_process(self) -> None:
        process, was_alive = self._process, self._alive
        self._alive = False
        if not process.started or process.returncode is not None:
            return
        try:
            if was_alive:
                self._send(wire.Stop())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), STOP_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
        await process.wait()

    def _send(self, message: wire.ToEngine) -> None:
        # With no high-water mark a send never waits: the future is complete or soon will be.
        self._socket.send(wire.encode(message))

    async def _receive(self) -> None:
        try:
            while True:
                message = wire.decode_from_engine(await self._socket.recv())
                if isinstance(message, wire.Updates):
                    await self._deliver_all(message.updates)
                else:
                    self._handle(message)
        except Exception:
            # No update would arrive any more: a dead engine is at least noticed and replaced.
            logger.exception("failed to handle a message of the engine")
            self._process.kill()

    async def _deliver_all(self, updates: Sequence[SequenceUpdate]) -> None:
        """Deliver the updates of a step in groups, one per iteration of the event loop.

        Each update wakes a task that writes to its client.
        """
        for number, update in enumerate(updates, 1):
            self._deliver(update.request_id, update, update.finish_reason is not None)
            if number % DELIVERED_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _handle(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Refused):
            error = errors.error_of(
                message.code, message.message, message.param, errors.UnavailableError
            )
            self._deliver(message.request_id, error, True)
        elif isinstance(message, wire.Stats):
            _answer(self._stats.get(message.number), message.stats)
        elif isinstance(message, wire.Embeddings):
            _answer(self._embeddings.get(message.number), message)
        elif isinstance(message, wire.Adapters):
            # Also where nobody waits any more: the engine has changed.
            self._facts = dataclasses.replace(self.facts, adapters=message.adapters)
            _answer(self._changes.get(message.number), message)

    def _deliver(self, request_id: str, news: RequestUpdate, ended: bool) -> None:
        route = self._routes.get(request_id)
        if route is None:
            return
        if ended:
            del self._routes[request_id]
        route[0].put_nowait(news)

    async def _watch(self, died: asyncio.Future[int]) -> None:
        status = await died
        if self._alive:
            logger.error(
                "the process of the engine of %s %s; %d running or waiting sequences get 503",
                self._config.model.model,
                _ending(status),
                len(self._routes),
            )
            self._alive = False
            # The sequences of one request have a queue in common.
            num_requests = len({id(queue) for queue, _ in self._routes.values()})
            message = ENDED if num_requests > 1 else ENDED_ALONE
            self._fail_all(lambda: dead_error(self._start_seconds, message))
        self._ended.set()

    def _fail_all(self, new_error: Callable[[], errors.EngineDeadError]) -> None:
        # One error each: who raises it adds its own trace.
        for request_id in list(self._routes):
            self._deliver(request_id, new_error(), True)
        asked: list[dict[int, asyncio.Future[Any]]] = [self._stats, self._changes, self._embeddings]
        for future in [future for waiting in asked for future in waiting.values()]:
            if not future.done():
                future.set_exception(new_error())


def _answer(future: asyncio.Future[Answer] | None, answer: Answer) -> None:
    """Give an answer to who waits for it, if somebody does still."""
    if future is not None and not future.done():
        future.set_result(answer)


def _ending(status: int | None) -> str:
    """Describe how a process ended; ``status`` is negative for a signal, as in asyncio."""
    if status is None or status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
