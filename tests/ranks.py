"""Ranks of a model in threads of this process: real sockets and sums, and nothing to start."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import threading

import pytest

from sensorium.engine import executor
from sensorium.engine.parallel import worker
from sensorium.engine.parallel.group import RankGroup


class RankThread:
    """The thread of a rank, in place of a process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = socket.socket(fileno=os.dup(connection.fileno()))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        gone = contextlib.suppress(OSError, RuntimeError, SystemExit)  # what ends a process
        with self._connection, gone:
            worker.serve(self._connection, is_own_process=False)

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            assert timeout is not None
            raise subprocess.TimeoutExpired("rank", timeout)
        return 0

    def kill(self) -> None:
        """A thread cannot be ended; it ends with its connection."""


def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks of models run in threads from now on."""
    monkeypatch.setattr(executor, "RankGroup", functools.partial(RankGroup, launch=RankThread))
