"""An event loop in a thread of its own.

Synchronous callers run coroutines there. Downloads run there, too: a host that sends its answer in
a hundred thousand pieces of one byte keeps a loop busy for tens of milliseconds at a time, and that
must not be the loop that serves everyone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from sensorium.forks import OWN_THREADS

T = TypeVar("T")


class LoopThread:
    """Runs coroutines in a thread that starts with the first one.

    Usable from several threads and event loops.
    """

    def __init__(self, name: str) -> None:
        self._name = f"{OWN_THREADS}{name}"
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop. Raises RuntimeError after ``close``."""
        with self._lock:
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(work, self._running())
        work.close()
        raise RuntimeError("the event loop has been closed")

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine; cancelling the caller cancels it.

        Raises as ``submit`` does.
        """
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Cancel what runs, wait for its end, and end the thread; further calls only wait."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or not thread.is_alive():
            return
        if not was_closed:
            loop.call_soon_threadsafe(loop.stop)
        thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        # A forked child has the object, but not the thread.
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=_serve, args=(self._loop,), name=self._name, daemon=True
            )
            self._thread.start()
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    workers = ThreadPoolExecutor(thread_name_prefix=f"{OWN_THREADS}work")
    loop.set_default_executor(workers)
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        # Not by the loop, which would start a thread for it, when Python may be ending.
        workers.shutdown()
        loop.close()
