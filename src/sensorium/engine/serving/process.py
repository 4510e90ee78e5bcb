"""The engine's process from outside: its start, its socket's folder and its end.

Light to import, so that the process can be started before the libraries of a server are loaded.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from types import TracebackType

from sensorium.kernels.cpu import threads
from sensorium.processes.start import child_environment, interrupts_held, python_module


class EngineProcess:
    """A process of ``engine.serving.worker``, and the folder with the socket that it connects to.

    It loads its libraries while the socket is not bound yet, and waits for its configuration then.
    As a context manager it is closed at the end.
    """

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self.folder = tempfile.mkdtemp(prefix="sensorium-")
        self.address = f"ipc://{self.folder}/engine"

    @property
    def started(self) -> bool:
        """Return True once ``start`` was called."""
        return self._popen is not None

    @property
    def returncode(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        return None if self._popen is None else self._popen.poll()

    def start(self) -> EngineProcess:
        """Start the process and return this object. Raises OSError."""
        # The C library reads its part of the environment when a process starts, so it must be set
        # here already.
        threads.prepare()
        command = python_module(
            "sensorium.engine.serving.worker", self.address, str(os.getpid()), self.folder
        )
        with interrupts_held():
            self._popen = subprocess.Popen(command, env=child_environment())
        return self

    async def wait(self) -> int:
        """Wait until the process has ended and return its exit status."""
        if self._popen is None:
            raise RuntimeError("the process was not started")
        try:
            descriptor = os.pidfd_open(self._popen.pid)
        except (AttributeError, OSError):  # not Linux, or it has ended
            return await asyncio.to_thread(self._popen.wait)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._popen.wait()

    def kill(self) -> None:
        """End the process at once, if it runs."""
        if self._popen is not None:
            self._popen.kill()

    def close(self) -> None:
        """End the process if it runs, and remove the folder."""
        self.kill()
        if self._popen is not None:
            self._popen.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
