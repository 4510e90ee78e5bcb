"""Threads for what would hold up the event loop and is not decoding.

Hashing, base64, files, the caller's objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, TypeVarTuple

from sensorium.processes import cores

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_DEFAULT_WORKERS = 8


class Workers(Protocol):
    """Runs functions of this package's modules away from the event loop.

    Usable from several loops at once.
    """

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return ``function(*args)``; when cancelled, work that has not begun never begins."""
        ...

    def close(self) -> None:
        """Wait for what runs, drop what waits, and free the workers."""
        ...


class ThreadWorkers:
    """Worker threads: Pillow, BLAKE3 and numpy release the GIL while they work."""

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or default_num_workers()
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="sensorium-media")

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """See ``Workers.run``."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """See ``Workers.close``."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def default_num_workers() -> int:
    """One per CPU that this process may keep busy, at most ``MAX_DEFAULT_WORKERS``."""
    return min(cores.find().num_usable, MAX_DEFAULT_WORKERS)
