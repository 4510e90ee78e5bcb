"""Threads that each wait for a worker process: one item at a time, within its time.

A worker that runs out of time is killed, and so is one whose caller has left; one that died is
replaced before the next item. Whatever happened costs that item an error, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sensorium.config import MediaConfig
from sensorium.errors import MediaUndecodableError, UnavailableError
from sensorium.multimodal.decode.loaders import DecodeJob, InspectJob
from sensorium.multimodal.shared_memory import remove
from sensorium.multimodal.workers.messages import (
    DecodeRequest,
    Done,
    Failed,
    Inspected,
    NoRoom,
    decode_reply,
    encode_request,
)
from sensorium.processes.fork_server import STOP_SECONDS, Child, ForkServer
from sensorium.processes.framing import receive_frame, send_frame

JOBS_PER_PROCESS = 500
"""Items after which a worker is replaced, so that what a library may leak stays small."""
ABANDONED_SECONDS = 0.5
"""Seconds that work goes on after its caller has left: killing a worker for less would cost
more."""
NOT_NOW = "Media cannot be decoded now; try again later."

T = TypeVar("T")
logger = logging.getLogger(__name__)


class DecodeTask:
    """One item on its way through a worker.

    An encoded file, what to do with it, and the file for its features.
    """

    def __init__(self, job: DecodeJob | InspectJob, source: bytes, path: str) -> None:
        self.job = job
        self.source = source
        self.path = path
        self._worker: Worker | None = None
        self._lock = threading.Lock()

    def run(self, worker: Worker) -> Done | Inspected:
        """Return the worker's answer; leave no file when there is none.

        Raises as ``Worker.run`` does.
        """
        try:
            return worker.run(self)
        except BaseException:
            remove(self.path)
            raise

    def begin(self, worker: Worker) -> None:
        """Note which worker has the task."""
        with self._lock:
            self._worker = worker

    def end(self) -> None:
        """Note that the worker has answered, or died."""
        with self._lock:
            self._worker = None

    def leave(self, future: Future[Done | Inspected]) -> None:
        """Give up a task that was submitted as ``future``.

        The worker gets ``ABANDONED_SECONDS`` to finish it.
        """
        if future.cancelled():
            self.source = b""  # a thread has still to come to the task in the queue
            return
        future.add_done_callback(lambda _: remove(self.path))
        timer = threading.Timer(ABANDONED_SECONDS, self._abandon)  # the loop may have ended by then
        timer.daemon = True
        timer.start()

    def _abandon(self) -> None:
        with self._lock:
            if self._worker is not None:
                self._worker.kill()


class Worker:
    """Worker process of one thread, forked at first use and again after it has died."""

    def __init__(self, server: ForkServer, config: MediaConfig) -> None:
        self._server = server
        self._config = config
        self._process: Child | None = None
        self._num_jobs = 0
        self.is_busy = False
        self.num_deaths = 0

    def start(self) -> Child:
        """Return the process, forked if there is none yet. Raises UnavailableError."""
        if self._process is not None and (
            self._num_jobs >= JOBS_PER_PROCESS or not _is_idle(self._process.connection)
        ):
            self.discard()
        if self._process is None:
            self._process = self._server.spawn()
            self._num_jobs = 0
        return self._process

    def run(self, task: DecodeTask) -> Done | Inspected:
        """Return the answer to a task.

        Raises RequestError, OverloadedError or UnavailableError, and NoRoomError where there is no
        room for the features.
        """
        request = encode_request(DecodeRequest(task.job, task.path, len(task.source)))
        seconds = task.job.most_seconds(self._config)
        process = self.start()
        task.begin(self)
        self.is_busy = True
        begun = time.monotonic()
        try:
            answer = self._ask(process, request, task.source, seconds)
            reply = None if answer is None else decode_reply(answer, task.path, task.job)
        except TimeoutError:
            self._died("was killed: it took too long")
            raise task.job.too_long(self._config) from None
        except (OSError, ValueError, TypeError):  # it has gone, or does not say what a worker says
            reply = None
        finally:
            self.is_busy = False
            task.end()
        if reply is None:
            self._died("ended before it was done")
            if process.server_has_ended():
                raise UnavailableError(NOT_NOW)
            if time.monotonic() - begun >= seconds:  # its limit of processor time was faster
                raise task.job.too_long(self._config)
            raise MediaUndecodableError(
                f"The process that decoded the {task.job.noun} ended before it was done: the "
                "file is damaged, or takes too much."
            )
        self._num_jobs += 1
        if isinstance(reply, Failed | NoRoom):
            raise reply.error()
        return reply

    def kill(self) -> None:
        """Kill the process, if there is one; the thread that waits for it notices.

        Usable from any thread.
        """
        process = self._process
        if process is not None:
            process.kill()

    def discard(self) -> None:
        """Kill the process, wait until it can write nothing any more, and forget it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(OSError), process.connection:
            process.connection.settimeout(STOP_SECONDS)
            while process.connection.recv(1 << 16):
                pass

    def _died(self, how: str) -> None:
        logger.warning("a media worker %s; another one takes its place", how)
        self.num_deaths += 1
        self.discard()

    def _ask(self, process: Child, request: bytes, source: bytes, seconds: float) -> bytes | None:
        deadline = time.monotonic() + seconds
        process.connection.settimeout(seconds)
        send_frame(process.connection, request, source)
        process.connection.settimeout(max(0.001, deadline - time.monotonic()))
        return receive_frame(process.connection)


def _is_idle(connection: socket.socket) -> bool:
    """Return True if the other side has neither sent anything nor closed."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Crew:
    """Worker processes, and as many threads that wait for them."""

    def __init__(self, server: ForkServer, num_workers: int, config: MediaConfig) -> None:
        self.workers = [Worker(server, config) for _ in range(num_workers)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self.workers:
            self._idle.put(worker)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="sensorium-decoder")

    def submit(self, use: Callable[[Worker], T]) -> Future[T]:
        """Call ``use`` with a worker in a thread, preferably the one used last."""
        return self._pool.submit(self._with_worker, use)

    def close(self, *, wait: bool) -> None:
        """Drop what waits; with ``wait`` wait for what runs, and end the workers."""
        self._pool.shutdown(wait=wait, cancel_futures=True)
        if wait:
            for worker in self.workers:
                worker.discard()

    def _with_worker(self, use: Callable[[Worker], T]) -> T:
        worker = self._idle.get()
        try:
            return use(worker)
        finally:
            self._idle.put(worker)
