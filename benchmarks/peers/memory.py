"""Peak memory of an engine's processes.

The kernel keeps the peak of a process's resident memory (VmHWM), which counts mapped files: weights that a process maps
lie in the page cache, and the system can drop them. Of anonymous memory it keeps no peak: that is sampled.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.1
SAMPLES_A_LIST = 10
"""Samples between two looks for new child processes."""
KIB = 1024


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: the ``peak`` of all resident pages, and ``anonymous`` and shared ones."""

    peak: int
    anonymous: int


def memory_of(pid: int) -> Memory:
    """Memory of a process; zeros when it has ended."""
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                fields[name] = int(value.split()[0]) * KIB
    return Memory(fields.get("VmHWM", 0), fields.get("RssAnon", 0) + fields.get("RssShmem", 0))


class MemoryWatch:
    """Samples processes in a thread until it is stopped.

    A sample costs the machine some 0.1 ms; which processes there are is asked more rarely, as that costs more.
    """

    def __init__(self, processes: Callable[[], Sequence[psutil.Process]]) -> None:
        self._processes = processes
        self._peak_anonymous = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def peaks(self) -> Memory:
        """Peak of the processes that run now, and the greatest sum of anonymous memory seen."""
        found = self._sample(self._processes())
        return Memory(sum(memory.peak for memory in found), self._peak_anonymous)

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        for number in itertools.count():
            if number % SAMPLES_A_LIST == 0:
                processes = self._processes()
            self._sample(processes)
            if self._ended.wait(INTERVAL):
                return

    def _sample(self, processes: Sequence[psutil.Process]) -> list[Memory]:
        found = [memory_of(process.pid) for process in processes]
        anonymous = sum(memory.anonymous for memory in found)
        self._peak_anonymous = max(self._peak_anonymous, anonymous)
        return found
