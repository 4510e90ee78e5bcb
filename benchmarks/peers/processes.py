"""Engines as processes: started, frozen while another one measures, asked by lines of JSON."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import HERE, EngineKind
from benchmarks.peers.memory import MemoryWatch
from benchmarks.processes import ProcessTree

START_TIMEOUT = 1800.0
ANSWER_TIMEOUT = 1800.0


class EngineFailure(RuntimeError):
    """An engine ended, was silent for too long, or said that a command failed."""


class EngineProcess(ProcessTree):
    """A running engine with its children.

    ``start_seconds`` is the time from starting the process to its first token.
    """

    def __init__(
        self, kind: EngineKind, arguments: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.kind = kind
        self._lines: queue.Queue[str | None] = queue.Queue()
        started = time.perf_counter()
        with log.open("ab") as errors:
            super().__init__(
                [str(kind.python), "-m", f"benchmarks.peers.run_{kind.runner}", *arguments],
                cwd=HERE.parents[1],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.memory = MemoryWatch(self.processes)
        try:
            ready = self._next(START_TIMEOUT)
        except EngineFailure:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started
        self.version = str(ready["engine"])

    def ask(self, *, timeout: float = ANSWER_TIMEOUT, **command: object) -> list[dict[str, Any]]:
        """Send a command and return the figures that it made. Raises EngineFailure."""
        assert self.root.stdin is not None
        print(json.dumps(command), file=self.root.stdin, flush=True)
        figures = []
        while (message := self._next(timeout))["event"] != "done":
            if message["event"] == "failed":
                raise EngineFailure(f"{self.kind.name}: {message['message']}")
            figures.append(message)
        return figures

    def close(self) -> None:
        """End it by the end of its stdin; after a while by signals."""
        assert self.root.stdin is not None
        self.memory.stop()
        with contextlib.suppress(BrokenPipeError):
            self.end(self.root.stdin.close, timeout=30, children_timeout=10)

    def _read(self) -> None:
        assert self.root.stdout is not None
        for line in self.root.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise EngineFailure(f"{self.kind.name} was silent for {timeout:g} s") from None
        if line is None:
            raise EngineFailure(f"{self.kind.name} ended; its log says why")
        message: dict[str, Any] = json.loads(line)
        return message
