"""Single flight: callers that want the same work at the same time share one run of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Call(Generic[T]):
    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.num_waiters = 0


class SingleFlight(Generic[T]):
    """Runs at most one task per key and event loop; further callers wait for the one that runs.

    Cancelling a caller does not affect the others; when the last one is cancelled, so is the task.
    Nothing is remembered once the task has ended. A failure reaches every caller as the same
    exception object: copy it before changing it.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[asyncio.AbstractEventLoop, Hashable], _Call[T]] = {}

    @property
    def num_running(self) -> int:
        """Number of tasks that run now."""
        return len(self._calls)

    async def run(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the task that runs under ``key``, or else of ``start()``."""
        place = (asyncio.get_running_loop(), key)
        call = self._calls.get(place)
        if call is None:
            call = self._calls[place] = _Call(asyncio.create_task(start()))
            call.task.add_done_callback(lambda task: self._ended(place, task))
        call.num_waiters += 1
        try:
            return await asyncio.shield(call.task)
        finally:
            call.num_waiters -= 1
            if not call.num_waiters and not call.task.done():
                self._forget(place, call.task)
                call.task.cancel()

    def _ended(
        self, place: tuple[asyncio.AbstractEventLoop, Hashable], task: asyncio.Task[T]
    ) -> None:
        self._forget(place, task)
        if not task.cancelled():
            task.exception()  # no "never retrieved" warning when every caller was cancelled

    def _forget(
        self, place: tuple[asyncio.AbstractEventLoop, Hashable], task: asyncio.Task[T]
    ) -> None:
        call = self._calls.get(place)
        if call is not None and call.task is task:
            del self._calls[place]
