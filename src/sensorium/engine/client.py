"""The way to talk to an engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

import zmq
import zmq.asyncio

from sensorium import errors
from sensorium.config import GIB, EngineConfig
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine import wire
from sensorium.engine.shared import SegmentStore
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.kernels import threads
from sensorium.multimodal.items import MediaItem

logger = logging.getLogger(__name__)

News = SequenceUpdate | errors.SensoriumError
Inbox = asyncio.Queue[News]

STOP_SECONDS = 5.0
"""How long the engine's process gets to end by itself."""

DEAD = "The engine has stopped; requests cannot be served until it is restarted."


class EngineClient:
    """One engine process: started, talked to and stopped from one event loop.

    Every submitted sequence has an inbox, which receives its updates, or an error. Segments of shared memory are held
    for a sequence until it has ended.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._folder = tempfile.mkdtemp(prefix="sensorium-")
        self._address = f"ipc://{self._folder}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._segments = SegmentStore(int(config.cache.mm_processor_cache_gb * GIB))
        self._routes: dict[str, tuple[Inbox, tuple[bytes, ...]]] = {}
        self._stats: dict[int, asyncio.Future[EngineStats]] = {}
        self._numbers = itertools.count()
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._alive = False
        self._facts: EngineFacts | None = None

    @property
    def alive(self) -> bool:
        """Whether requests can be submitted."""
        return self._alive

    @property
    def facts(self) -> EngineFacts:
        """What the engine found out about itself at its start."""
        if self._facts is None:
            raise errors.EngineDeadError("The engine has not been started.")
        return self._facts

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._routes)

    @property
    def num_segments_in_use(self) -> int:
        """Shared memory segments that sequences hold."""
        return self._segments.num_in_use

    async def start(self) -> EngineFacts:
        """Start the process and wait until the model is loaded. Raises ConfigError when it cannot be."""
        self._socket.bind(self._address)
        folders = (self._folder, str(self._segments.folder))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sensorium.engine.worker"),
            *(self._address, str(os.getpid()), *folders),
            env=_environment(),
        )
        # Not waited for: a process that ends before it connects never takes the message.
        self._send(wire.Configure(self._config))
        receive = asyncio.ensure_future(self._socket.recv())
        died = asyncio.ensure_future(self._process.wait())
        await asyncio.wait({receive, died}, return_when=asyncio.FIRST_COMPLETED)
        if not receive.done():
            # The reason may still be on its way through the socket.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(receive), 1.0)
        if not receive.done():
            receive.cancel()
            raise errors.EngineDeadError(
                f"The engine's process ended with status {self._process.returncode} while starting; "
                "its messages are above."
            )
        message = wire.decode_from_engine(receive.result())
        if isinstance(message, wire.Failed):
            raise _error(message.code, message.message, message.param, errors.ConfigError)
        if not isinstance(message, wire.Ready):
            raise errors.EngineDeadError("The engine sent an unexpected first message.")
        self._facts, self._alive = message.facts, True
        self._tasks = [
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._watch(died)),
        ]
        return message.facts

    def submit(self, request: EngineRequest, items: Sequence[MediaItem], inbox: Inbox) -> None:
        """Send a sequence; its news come to ``inbox`` until it has ended or is aborted."""
        if not self._alive:
            raise errors.EngineDeadError(DEAD)
        held: list[bytes] = []
        try:
            handles = []
            for item in items:
                handles.append(self._segments.acquire(item))
                held.append(item.digest)
            self._send(wire.Submit(request, tuple(handles)))
        except OSError:
            logger.exception("features could not be written to shared memory")
            self._release(held)
            raise errors.OverloadedError(
                "There is no room for the media of this request now; try again later."
            ) from None
        except BaseException:
            self._release(held)
            raise
        self._routes[request.request_id] = (inbox, tuple(held))

    def abort(self, request_ids: Sequence[str]) -> None:
        """End sequences; those that have ended are ignored."""
        open_ids = tuple(i for i in request_ids if i in self._routes)
        for request_id in open_ids:
            self._forget(request_id)
        if open_ids and self._alive:
            self._send(wire.Abort(open_ids))

    async def stats(self) -> EngineStats:
        """Counters of the engine. Raises EngineDeadError when it has stopped."""
        if not self._alive:
            raise errors.EngineDeadError(DEAD)
        number = next(self._numbers)
        future = self._stats[number] = asyncio.get_running_loop().create_future()
        self._send(wire.AskStats(number))
        try:
            return await future
        finally:
            self._stats.pop(number, None)

    async def stop(self) -> None:
        """End the process and give back everything."""
        try:
            await self._end_process()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._fail_all()
            self._socket.close()
            self._context.term()
            self._segments.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _end_process(self) -> None:
        process, was_alive = self._process, self._alive
        self._alive = False
        if process is None or process.returncode is not None:
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
                self._take(wire.decode_from_engine(await self._socket.recv()))
        except Exception:
            # Nobody would hear of anything any more: better an engine that is known to be dead.
            logger.exception("a message of the engine could not be taken in")
            if self._process is not None and self._process.returncode is None:
                self._process.kill()

    def _take(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Updates):
            for update in message.updates:
                self._deliver(update.request_id, update, update.finish_reason is not None)
        elif isinstance(message, wire.Refused):
            error = _error(message.code, message.message, message.param, errors.InvalidRequestError)
            self._deliver(message.request_id, error, True)
        elif isinstance(message, wire.Stats):
            future = self._stats.get(message.number)
            if future is not None and not future.done():
                future.set_result(message.stats)

    def _deliver(self, request_id: str, news: News, ended: bool) -> None:
        route = self._routes.get(request_id)
        if route is None:
            return
        if ended:
            self._forget(request_id)
        route[0].put_nowait(news)

    def _forget(self, request_id: str) -> None:
        _, digests = self._routes.pop(request_id)
        self._release(digests)

    def _release(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self._segments.release(digest)

    async def _watch(self, died: asyncio.Future[int]) -> None:
        status = await died
        if self._alive:
            logger.error("the engine's process ended with status %s", status)
        self._alive = False
        self._fail_all()

    def _fail_all(self) -> None:
        error = errors.EngineDeadError(DEAD)
        for request_id in list(self._routes):
            self._deliver(request_id, error, True)
        for future in self._stats.values():
            if not future.done():
                future.set_exception(error)


def _environment() -> dict[str, str]:
    """The engine's environment: the caller's, and the import path under which this package was found."""
    # The C library reads its part of this when the process starts, so it must be set here already.
    threads.prepare()
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return environment


def _error(
    code: str, message: str, param: str | None, default: type[errors.SensoriumError]
) -> errors.SensoriumError:
    """The exception class that has this code, built anew on this side of the socket."""
    known = {cls.code: cls for cls in _subclasses(errors.SensoriumError)}
    return known.get(code, default)(message, param=param)


def _subclasses(cls: type[errors.SensoriumError]) -> list[type[errors.SensoriumError]]:
    # Deepest first, so that for a shared code the most general class wins in the mapping.
    return [s for child in cls.__subclasses__() for s in (*_subclasses(child), child)]
