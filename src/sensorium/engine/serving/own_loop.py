"""A frontend with its engine on an event loop of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine
from typing import Any, TypeVar

from sensorium.config import EngineConfig
from sensorium.engine.serving.frontend import Frontend
from sensorium.multimodal.workers.event_loop import LoopThread

T = TypeVar("T")


class LoopFrontend:
    """A frontend on an event loop that runs in a thread, from their start to their end.

    ``started`` has the frontend when it is up, or the error of its start.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._loop = LoopThread("loop")
        self._starting: asyncio.Task[Frontend] | None = None
        self.started = self._loop.submit(self._start(config))

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop. Raises RuntimeError after ``close``."""
        return self._loop.submit(work)

    def close(self) -> None:
        """End what runs, be it the start, and free everything."""
        try:
            self._loop.submit(self._stop()).result()
        finally:
            self._loop.close()

    async def _start(self, config: EngineConfig) -> Frontend:
        start = Frontend.start(config, trust_request_chat_template=True, package_files=True)
        self._starting = asyncio.create_task(start)
        return await asyncio.shield(self._starting)

    async def _stop(self) -> None:
        if self._starting is None:
            return
        self._starting.cancel()
        [frontend] = await asyncio.gather(self._starting, return_exceptions=True)
        if isinstance(frontend, Frontend):
            await frontend.shutdown()
