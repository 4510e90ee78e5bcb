"""Single flight: work that several callers want at the same time is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Flight(Generic[T]):
    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.num_waiters = 0


class SingleFlight(Generic[T]):
    """Runs at most one piece of work per key and event loop; later callers wait for the one that runs.

    A caller that is cancelled leaves the others unharmed; when the last one leaves, the work is cancelled. Nothing is
    remembered once the work has ended. Failures reach every caller as the same exception object: copy it before
    changing it.
    """

    def __init__(self) -> None:
        self._flights: dict[tuple[asyncio.AbstractEventLoop, Hashable], _Flight[T]] = {}

    @property
    def num_running(self) -> int:
        """Keys whose work runs now."""
        return len(self._flights)

    async def run(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the work that runs under ``key``, or else of ``start()``."""
        place = (asyncio.get_running_loop(), key)
        flight = self._flights.get(place)
        if flight is None:
            flight = self._flights[place] = _Flight(asyncio.create_task(start()))
            flight.task.add_done_callback(lambda task: self._ended(place, task))
        flight.num_waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiters -= 1
            if not flight.num_waiters and not flight.task.done():
                self._forget(place, flight.task)
                flight.task.cancel()

    def _ended(
        self, place: tuple[asyncio.AbstractEventLoop, Hashable], task: asyncio.Task[T]
    ) -> None:
        self._forget(place, task)
        if not task.cancelled():
            task.exception()  # every waiter may have left: the failure was seen all the same

    def _forget(
        self, place: tuple[asyncio.AbstractEventLoop, Hashable], task: asyncio.Task[T]
    ) -> None:
        flight = self._flights.get(place)
        if flight is not None and flight.task is task:
            del self._flights[place]
