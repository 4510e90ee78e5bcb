"""Room for the features of rows in a process, in bytes, though none knows its size beforehand."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_SHRINKS = 0.9
"""Share of the estimate that is left after each row that is smaller."""


@dataclass(slots=True)
class Entered:
    """A row that is in: ``num_bytes`` that it holds when its block ends."""

    num_bytes: int = 0


class Room:
    """Lets rows in, in the order in which they come, as long as there is room for what they hold.

    Belongs to one event loop. A row that runs counts as many bytes as the greatest of the latest
    ones: under a limit, the first runs alone. One runs in any case where nothing is held.

    Attributes:
        num_bytes: Bytes that rows hold which are done.
    """

    def __init__(self, most_bytes: float) -> None:
        self.num_bytes = 0
        self._most_bytes = most_bytes
        self._estimate: float | None = None if math.isfinite(most_bytes) else 0.0
        self._num_running = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[Entered]:
        """Wait for room, and let a row run; what it says that it holds counts until ``leave``.

        A row that fails holds nothing.
        """
        await self._enter()
        row = Entered()
        try:
            yield row
        except BaseException:
            row.num_bytes = 0
            raise
        finally:
            self._num_running -= 1
            self.num_bytes += row.num_bytes
            self._estimate = max(float(row.num_bytes), (self._estimate or 0.0) * _SHRINKS)
            self._admit()

    def leave(self, num_bytes: int) -> None:
        """Give up what a row has held."""
        self.num_bytes -= num_bytes
        self._admit()

    async def _enter(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._num_running -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        """Let those in that wait, the first first."""
        while self._waiters and self._has_room():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._num_running += 1
                waiter.set_result(None)

    def _has_room(self) -> bool:
        if self._num_running == 0 and self.num_bytes == 0:
            return True
        if self._estimate is None:
            return False
        return self.num_bytes + (self._num_running + 1) * self._estimate <= self._most_bytes
