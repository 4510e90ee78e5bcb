"""The other ranks of a model, as the first one sees them: processes that it starts and leads."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch

from sensorium import environment
from sensorium.config import EngineConfig
from sensorium.distributed.collectives import Collectives
from sensorium.distributed.shard import Shard
from sensorium.engine.parallel import messages
from sensorium.engine.parallel.messages import Begin, Failed, FromRank, Loaded, Ready, Start, ToRank
from sensorium.errors import ConfigError, EngineDeadError, SensoriumError
from sensorium.kernels.cpu import threads
from sensorium.models import loader
from sensorium.processes.start import child_environment, interrupts_held, python_module

logger = logging.getLogger(__name__)

MEETING_SECONDS = 300.0
"""Most time that ranks wait for each other once all have loaded."""
STOP_SECONDS = 5.0
GONE = "A process that runs a part of the model has ended; start the engine again."


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


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Return the device of a rank: the CPU, or the GPU of its number. Raises ConfigError."""
    device, size = loader.find_device(config.model.device), config.parallel.tensor_parallel_size
    if device.type != "cuda":
        return device
    if size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this machine has {torch.cuda.device_count()} "
            "usable GPUs.",
            param="tensor_parallel_size",
        )
    return torch.device("cuda", rank)


class RankGroup:
    """The ranks of one model besides the first, which is this process.

    They end when this process does, or drops its end of the connections. When one of them ends
    first, ``on_loss`` is called, and nothing can be computed any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_loss: Callable[[], object] = lambda: None,
        launch: Launch = launch,
    ) -> None:
        """Start the processes, which load their parts at once."""
        size = config.parallel.tensor_parallel_size
        self.collectives = Collectives(Shard(0, size))
        self.weight_bytes: list[int] = []
        """Bytes of the weights of each other rank."""
        self._config, self._on_loss = config, on_loss
        self._folder = Path(tempfile.mkdtemp(prefix="sensorium-ranks-"))
        self._links: list[socket.socket] = []
        self.processes: list[RankProcess] = []
        self._is_lost = self._is_closing = False
        try:
            for rank in range(1, size):
                own, theirs = socket.socketpair()
                self._links.append(own)
                with theirs:
                    self.processes.append(launch(theirs))
                messages.send(own, messages.encode(Begin(config, rank, size)))
        except BaseException:
            self.close()
            raise

    def wait_loaded(self) -> None:
        """Wait until all have loaded. Raises what kept one of them from it."""
        for link in self._links:
            loaded = self._received(link)
            if not isinstance(loaded, Loaded):
                raise RuntimeError(f"a rank sent {type(loaded).__name__}")
            self.weight_bytes.append(loaded.weight_bytes)

    def start(self, num_blocks: int, device: torch.device) -> None:
        """Let all allocate their KV cache, and meet them. Raises what kept one of them from it."""
        meeting = self._folder / "meeting"
        seconds = self._config.scheduler.engine_step_timeout or 86400.0
        self.send(Start(num_blocks, str(meeting), max(seconds, MEETING_SECONDS)))
        timeout = timedelta(seconds=max(seconds, MEETING_SECONDS))
        with self.together():
            self.collectives.join(meeting, device, timeout)
        for link in self._links:
            if not isinstance(self._received(link), Ready):
                raise RuntimeError("a rank is not ready")
        shutil.rmtree(self._folder, ignore_errors=True)  # all have met
        for rank, process in enumerate(self.processes, 1):
            name = f"rank-{rank}"  # not one of ``OWN_THREADS``: it ends after ``close`` has
            threading.Thread(target=self._watch, args=(process,), name=name, daemon=True).start()

    def _received(self, link: socket.socket) -> FromRank:
        message = messages.receive_from_rank(link)
        if message is None:
            self._is_lost = True
            raise EngineDeadError(GONE)
        if isinstance(message, Failed):
            if message.code == ConfigError.code:
                raise ConfigError(message.message, param=message.param)
            raise SensoriumError(message.message)
        return message

    def send(self, message: ToRank) -> None:
        """Send a message to all. Raises EngineDeadError when one has gone."""
        data = messages.encode(message)
        with self.together():
            for link in self._links:
                messages.send(link, data)

    def send_to(self, rank: int, message: ToRank) -> None:
        """Send a message to one other rank. Raises EngineDeadError when it has gone."""
        with self.together():
            messages.send(self._links[rank - 1], messages.encode(message))

    def received(self, rank: int) -> FromRank:
        """Return the next message of another rank. Raises EngineDeadError when it has gone."""
        return self._received(self._links[rank - 1])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Compute what the other ranks compute at the same time.

        Whatever fails in the block, the ranks are not in step any more: it is logged, and raised as
        EngineDeadError, as is every later attempt.
        """
        if self._is_lost:
            raise EngineDeadError(GONE)
        try:
            yield
        except EngineDeadError:
            raise
        except BaseException as error:
            self._is_lost = True
            if not isinstance(error, Exception):
                raise
            logger.exception("the ranks of a model cannot go on together")
            raise EngineDeadError(GONE) from error

    def _watch(self, process: RankProcess) -> None:
        status = process.wait()
        if not self._is_closing:
            self._is_lost = True
            logger.critical("a process that runs a part of the model ended with status %d", status)
            self._on_loss()

    def close(self) -> None:
        """End the other ranks. A second call does nothing."""
        self._is_closing = self._is_lost = True
        for link in self._links:
            link.close()
        self._links.clear()
        self.collectives.leave()
        for process in self.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
