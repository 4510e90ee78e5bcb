"""A real server for tests: ``sensorium serve`` in a process of its own, on a free port."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil

from sensorium.processes.start import end_with

STARTED = re.compile(r"serving .* at (http://127\.0\.0\.1:\d+)")
MORE_FLAGS = "SENSORIUM_TEST_SERVE_FLAGS"
"""Variable with more flags of all servers, such as ``--data-parallel-size 2``: with it, tests for
one server show that replicas answer as it does."""
START_SECONDS = 300
"""After this a server that is not there yet is killed, unless a test says otherwise; as long may one
take to end. Much longer than either takes, but where other programs have the processors."""


def tied_to_this_process() -> Callable[[], None] | None:
    """A ``preexec_fn`` by which the system kills a child when the test run ends, however that
    happens.

    The system means the thread that starts the child, so there is none for other threads than the
    main one.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return functools.partial(end_with, os.getpid())


class Server:
    """A running server, with ``flags``, and ``variables`` in its environment.

    ``model``: None where the flags name the models. ``start_seconds``: one that is not there by
    then is killed.

    Stop it with ``stop``, which returns its exit status.
    """

    def __init__(
        self,
        model: str | None,
        log: Path,
        flags: Sequence[str] = (),
        variables: Mapping[str, str] = MappingProxyType({}),
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.log = log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "sensorium", "serve"),
                *([] if model is None else [model]),
                *("--port", "0", *flags, *shlex.split(os.environ.get(MORE_FLAGS, ""))),
            ],
            stdout=subprocess.PIPE,
            stderr=self._file,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            start_new_session=True,
            preexec_fn=tied_to_this_process(),
        )
        self.url = self._wait_for_address(start_seconds)

    def _wait_for_address(self, seconds: float) -> str:
        assert self.process.stdout is not None
        late = threading.Timer(seconds, os.killpg, (self.process.pid, signal.SIGKILL))
        late.daemon = True
        late.start()
        try:
            for line in self.process.stdout:
                found = STARTED.search(line.decode())
                if found:
                    return found[1]
        finally:
            late.cancel()
        status = self.process.wait(seconds)
        raise RuntimeError(f"the server did not start (status {status}):\n{self.log.read_text()}")

    def children(self) -> list[psutil.Process]:
        """The engine's process and whatever else the server has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engines(self) -> list[psutil.Process]:
        """The engine's processes that run; one, but while it is being restarted."""
        return [process for process in self.children() if is_engine(process)]

    def segments(self) -> Path:
        """The folder of its features in shared memory.

        The media workers have it on their command lines.
        """
        for process in self.children():
            command = process.cmdline()
            if "sensorium.engine.prompts.media_worker" in command:
                return Path(command[command.index("sensorium.engine.prompts.media_worker") + 1])
        raise AssertionError("there are no media workers")

    def num_descriptors(self) -> int:
        """Open files of the server and of its children."""
        processes = [psutil.Process(self.process.pid), *self.children()]
        return sum(process.num_fds() for process in processes)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, wait, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(START_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._file.close()
        return status


def is_engine(process: psutil.Process) -> bool:
    """Whether it is an engine's process and has not ended."""
    try:
        return "sensorium.engine.serving.worker" in process.cmdline()
    except psutil.NoSuchProcess:
        return False
