"""The other ranks of a model, as the first one sees them: processes that it starts and leads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch

from sensorium import environment
from sensorium.config import EngineConfig
from sensorium.distributed.collectives import Collectives
from sensorium.distributed.shard import Shard
from sensorium.engine.parallel import messages
from sensorium.engine.parallel.messages import (
    Allocated,
    Begin,
    Failed,
    FromRank,
    Loaded,
    Ready,
    Start,
    ToRank,
)
from sensorium.errors import ConfigError, EngineDeadError, SensoriumError
from sensorium.kernels.cpu import threads
from sensorium.models.interface import Model
from sensorium.processes.start import child_environment, interrupts_held, python_module

if TYPE_CHECKING:
    from sensorium.config.model import Dtype

logger = logging.getLogger(__name__)

MEETING_SECONDS = 60.0
"""Most time that ranks take to connect, once all have their KV caches."""
LEAST_TIMEOUT = 300.0
"""Least seconds after which a rank that the others wait for counts as hung."""
STOP_SECONDS = 5.0
GONE = "A process that runs a part of the model has ended; start the engine again."
OUT_OF_STEP = (
    "A step that several processes compute together has failed or was broken off, so they cannot "
    "go on; start the engine again."
)

_Message = TypeVar("_Message", bound=FromRank)


class RankProcess(Protocol):
    """A process of another rank."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


Launch = Callable[[socket.socket], RankProcess]
"""Starts the process of a rank, whose end of the connection this is."""


def launch(connection: socket.socket) -> RankProcess:
    """Start ``engine.parallel.worker``."""
    threads.prepare()
    number = connection.fileno()
    command = python_module("sensorium.engine.parallel.worker", str(number), str(os.getpid()))
    # One rank tells what all of them do.
    quiet = "debug" if environment.log_level() == "DEBUG" else "warning"
    shown = {environment.LOG_LEVEL: quiet, environment.PROGRESS: "0"}
    with interrupts_held():
        return subprocess.Popen(
            command,
            env={**child_environment(), **shown},
            pass_fds=(number,),
            stdin=subprocess.DEVNULL,
        )


class RankGroup:
    """The ranks of one model besides the first, which is this process.

    They end when this process does, or drops its end of the connections. When one of them ends
    first, nothing can be computed any more; once all are ready, ``on_loss`` is called then.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_loss: Callable[[], object] = lambda: None,
        launch: Launch = launch,
    ) -> None:
        """Start the processes, which wait for ``begin``."""
        size = config.parallel.tensor_parallel_size
        self.collectives = Collectives(Shard(0, size))
        self.weight_bytes: list[int] = []
        """Bytes of the weights of each other rank."""
        self._config, self._on_loss = config, on_loss
        self._folder = Path(tempfile.mkdtemp(prefix="sensorium-ranks-"))
        self._links: list[socket.socket] = []
        self.processes: list[RankProcess] = []
        self._lost: str | None = None  # why nothing can be computed any more
        self._ended: list[int] = []
        self._changed = threading.Event()  # a rank has ended, or all have met
        self._is_ready = self._is_closing = False
        try:
            for rank in range(1, size):
                own, theirs = socket.socketpair()
                self._links.append(own)
                with theirs:
                    self.processes.append(launch(theirs))
                watch = threading.Thread(
                    target=self._watch,
                    args=(rank, self.processes[-1]),
                    name=f"rank-{rank}",  # not one of ``OWN_THREADS``: it ends after ``close`` has
                    daemon=True,
                )
                watch.start()
        except BaseException:
            self.close()
            raise

    def begin(self, folder: Path, dtype: torch.dtype) -> None:
        """Let all load their parts of what the first rank loads: this folder, in this dtype.

        They do not choose for themselves: memory, and what a name means on the hub, may change.
        """
        model = dataclasses.replace(
            self._config.model,
            model=str(folder.absolute()),
            mmproj=None,
            revision=None,
            dtype=cast("Dtype", messages.name_of(dtype)),
            device="cpu",
        )
        config = dataclasses.replace(self._config, model=model)
        for rank, link in enumerate(self._links, 1):
            with contextlib.suppress(OSError):  # it has ended, which ``wait_loaded`` finds
                begin = Begin(config, rank, self.collectives.shard.size)
                messages.send(link, messages.encode(begin))

    def wait_loaded(self, model: Model) -> None:
        """Wait until all have loaded their parts of the model.

        Raises what kept one of them from it, and ConfigError where one has loaded another model.
        """
        expected = messages.described(model)
        for loaded in self.answers(Loaded):
            if loaded.model != expected:
                raise ConfigError(
                    f"The processes of tensor_parallel_size have loaded different models, "
                    f"{expected} and {loaded.model}: has the folder been changed? Start again.",
                    param="model",
                )
            self.weight_bytes.append(loaded.weight_bytes)

    def start(self, num_blocks: int) -> None:
        """Let all allocate their KV cache, and meet them. Raises what kept one of them from it."""
        step = self._config.scheduler.engine_step_timeout or 86400.0
        seconds = max(step, LEAST_TIMEOUT)
        meeting, secret = self._folder / "meeting", secrets.token_bytes(32)
        start = messages.encode(Start(num_blocks, str(meeting), secret, seconds))
        for link in self._links:
            with contextlib.suppress(OSError):  # it has ended, and may have said why
                messages.send(link, start)
        self.answers(Allocated)
        self._meet(meeting, timedelta(seconds=seconds), secret)
        self.answers(Ready)
        shutil.rmtree(self._folder, ignore_errors=True)  # all have met
        self._is_ready = True
        if self._lost is not None:
            raise EngineDeadError(self._lost)

    def _meet(self, meeting: Path, timeout: timedelta, secret: bytes) -> None:
        """Connect to the other ranks, unless one of them ends. Raises what kept it from that."""
        errors: list[Exception] = []
        has_met = threading.Event()

        def join() -> None:
            try:
                self.collectives.join(meeting, timeout, secret)
                has_met.set()
            except Exception as error:
                errors.append(error)
            self._changed.set()

        # Nothing interrupts it: in a thread of its own, it is left alone when another rank ends.
        threading.Thread(target=join, name="rank-0", daemon=True).start()
        self._changed.wait(MEETING_SECONDS)
        if has_met.is_set():
            return
        for rank in self._ended:
            self.received(rank)  # raises its reason
            raise EngineDeadError(GONE)
        why = f": {errors[0]}" if errors else f" within {MEETING_SECONDS:g} s."
        raise SensoriumError(f"The processes of tensor_parallel_size could not connect{why}")

    def answers(self, kind: type[_Message]) -> list[_Message]:
        """Return the next message of every rank, which must be of this kind."""
        found: list[_Message] = []
        for link in self._links:
            message = self._received(link)
            if not isinstance(message, kind):
                raise RuntimeError(f"a rank sent {type(message).__name__}, not {kind.__name__}")
            found.append(message)
        return found

    def _received(self, link: socket.socket) -> FromRank:
        message: FromRank | None = None
        with contextlib.suppress(ConnectionError):
            message = messages.receive_from_rank(link)
        if message is None:
            self._lost = GONE
            raise EngineDeadError(GONE)
        if isinstance(message, Failed):
            if message.code == ConfigError.code:
                raise ConfigError(message.message, param=message.param)
            raise SensoriumError(message.message)
        return message

    def send(self, message: ToRank) -> None:
        """Send a message to all, ``together``."""
        self.send_encoded(messages.encode(message))

    def send_encoded(self, data: bytes) -> None:
        """Send an encoded message to all, ``together``."""
        for link in self._links:
            messages.send(link, data)

    def send_to(self, rank: int, data: bytes) -> None:
        """Send an encoded message to one other rank, ``together``."""
        messages.send(self._links[rank - 1], data)

    def received(self, rank: int) -> FromRank:
        """Return the next message of another rank. Raises EngineDeadError when it has gone."""
        return self._received(self._links[rank - 1])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Compute what the other ranks compute at the same time: from the first message to the end.

        Whatever fails in the block, the ranks are not in step any more: it is logged, and raised as
        EngineDeadError, as is every later attempt. Ctrl-C comes when the block is over, or when it
        is pressed again.
        """
        if self._lost is not None:
            raise EngineDeadError(self._lost)
        with interrupts_last():
            try:
                yield
            except EngineDeadError:
                raise
            except BaseException as error:
                lost = self._lost or (GONE if isinstance(error, OSError) else OUT_OF_STEP)
                self._lost = lost
                if not isinstance(error, Exception):
                    raise
                logger.exception("the ranks of a model cannot go on together")
                raise EngineDeadError(lost) from error

    def _watch(self, rank: int, process: RankProcess) -> None:
        status = process.wait()
        if self._is_closing:
            return
        self._lost = GONE
        self._ended.append(rank)
        self._changed.set()
        if self._is_ready:
            logger.critical("a process that runs a part of the model ended with status %d", status)
            self._on_loss()

    def close(self) -> None:
        """End the other ranks, at once where they have not started. A second call does nothing."""
        self._is_closing, self._lost = True, self._lost or GONE
        for link in self._links:
            link.close()
        self._links.clear()
        self.collectives.leave()
        if not self._is_ready:
            for process in self.processes:
                process.kill()
        ends = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def interrupts_last() -> Iterator[None]:
    """Let Ctrl-C come at the end of the block, but at once if it is pressed again.

    A mask of signals would not do: it holds for one thread, and the others take them. Does nothing
    outside of the main thread, which alone is interrupted.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if len(noted) > 1:
            handler(number, None)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(noted) == 1:
            handler(signal.SIGINT, None)
