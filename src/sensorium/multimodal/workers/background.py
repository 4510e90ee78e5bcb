"""An event loop on a thread of its own, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from sensorium import forks

T = TypeVar("T")

OWN_THREADS = "sensorium-"
"""How the names of threads begin that are started here, and that closing waits for."""


def release(made_in: int, *closers: Callable[[], object]) -> None:
    """Call what frees an object's threads, processes and descriptors, for ``weakref.finalize``.

    Nothing is done in a forked child, where they are the parent's. The last reference may go in any thread: one that is
    waited for leaves it to another.
    """
    if made_in != forks.generation():
        return
    if threading.current_thread().name.startswith(OWN_THREADS):
        threading.Thread(target=_call, args=(closers,), name="closing").start()
    else:
        _call(closers)


def _call(closers: Iterable[Callable[[], object]]) -> None:
    for close in closers:
        close()


class BackgroundLoop:
    """Runs coroutines for synchronous code. Closing it cancels what is left."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._workers = concurrent.futures.ThreadPoolExecutor(
            thread_name_prefix=f"{OWN_THREADS}work"
        )
        self._loop.set_default_executor(self._workers)
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="sensorium-loop", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop. Raises RuntimeError when it was closed."""
        with self._lock:
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise RuntimeError("the event loop has been closed")

    def close(self) -> None:
        """Cancel all tasks and end the thread, and those that worked for it; further calls do nothing."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True  # nothing that was taken comes after the end
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            # Here and not by the loop, which would start a thread for it, when Python may be ending.
            self._workers.shutdown()
            self._loop.close()
