"""A real server for tests: ``sensorium serve`` in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

STARTED = re.compile(r"serving .* at (http://127\.0\.0\.1:\d+)")
START_SECONDS = 120


class Server:
    """A running server. Stop it with ``stop``, which returns its exit status."""

    def __init__(self, model: str, log: Path, flags: Sequence[str] = ()) -> None:
        self.log = log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "sensorium", "serve", model, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=self._file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.url = self._wait_for_address()

    def _wait_for_address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = STARTED.search(line.decode())
            if found:
                return found[1]
        self.process.wait()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")

    def children(self) -> list[psutil.Process]:
        """The engine's process and whatever else the server has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def num_descriptors(self) -> int:
        """Open files of the server and of its children."""
        processes = [psutil.Process(self.process.pid), *self.children()]
        return sum(process.num_fds() for process in processes)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, wait, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._file.close()
        return status
