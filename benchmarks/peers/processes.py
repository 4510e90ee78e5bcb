"""Engines as processes: started, frozen while another one measures, asked by lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
START_TIMEOUT = 1800.0
ANSWER_TIMEOUT = 1800.0


class EngineFailure(RuntimeError):
    """An engine ended, was silent for too long, or said that a command failed."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How an engine is started: its runner beside this file, and the Python of its environment."""

    name: str
    python: Path

    def environment(self, num_threads: int, kv_cache_gib: int, caches: Path) -> dict[str, str]:
        """The process environment. ``caches`` takes all that the engine compiles, so that it can be cold or warm."""
        found = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads),
            "HF_HUB_OFFLINE": "1",
            "NUMBA_CACHE_DIR": str(caches / "numba"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "XDG_CACHE_HOME": str(caches / "xdg"),
        }
        if self.name == "sensorium":
            found["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        if self.name == "vllm":
            found |= {
                "VLLM_CACHE_ROOT": str(caches / "vllm"),
                "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
                "LD_PRELOAD": f"libtcmalloc_minimal.so.4:{self._library('libiomp5.so')}",
            }
            del found["OMP_NUM_THREADS"]
        return found

    def _library(self, name: str) -> Path:
        return self.python.parent.parent / "lib" / name


class EngineProcess:
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
            self._process = subprocess.Popen(
                [str(kind.python), str(HERE / f"run_{kind.name}.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            ready = self._next(START_TIMEOUT)
        except EngineFailure:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started
        self.version = str(ready["engine"])

    def ask(self, **command: object) -> list[dict[str, Any]]:
        """Send a command and wait for its end; the figures that it made. Raises EngineFailure."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        figures = []
        while (message := self._next(ANSWER_TIMEOUT))["event"] != "done":
            if message["event"] == "failed":
                raise EngineFailure(f"{self.kind.name}: {message['message']}")
            figures.append(message)
        return figures

    def freeze(self) -> None:
        """Stop all of its processes, so that an idle one cannot take time from another."""
        for process in self._tree():
            self._signal(process, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them run again, children first."""
        for process in reversed(self._tree()):
            self._signal(process, signal.SIGCONT)

    def close(self) -> None:
        """End it: the end of its stdin, then, after a while, signals to what is left of it."""
        self.thaw()
        tree = self._tree()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        _, alive = psutil.wait_procs(tree, timeout=30)
        for process in alive:
            self._signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=10)
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        """The process and its descendants, parents first."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @staticmethod
    def _signal(process: psutil.Process, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
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
