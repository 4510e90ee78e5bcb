"""Where items are decoded and preprocessed: in worker processes, seen from the process that wants them.

A fork server (``multimodal.workers.decode_worker``) is started once; from it workers are forked in
milliseconds, one for each of a few threads here that wait for them. A worker that runs out of time
is killed, and so is one whose caller has left; one that died is replaced before the next item. What
happened costs that item an error and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaUndecodableError,
    OverloadedError,
    RequestError,
    SensoriumError,
    UnavailableError,
    error_of,
)
from sensorium.multimodal.decode.loaders import Prepared, Work, prepare
from sensorium.multimodal.items import MODALITIES, Features
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import SharedArrays, SharedArraysFolder, check, remove
from sensorium.multimodal.workers import decode_worker as child
from sensorium.multimodal.workers.threads import ThreadWorkers, default_num_workers
from sensorium.processes.framing import receive_bytes, receive_frame, send_frame
from sensorium.processes.start import interrupts_held

JOBS_PER_PROCESS = 500
"""Items after which a worker is replaced, so that what a library may leak stays small."""
START_SECONDS = 180.0
"""How long the fork server may take to import what the model's processor needs."""
ABANDONED_SECONDS = 0.5
"""How long work that nobody waits for any more goes on: killing a worker for less would cost more."""

STOP_SECONDS = 5.0
"""How long a process gets to end."""
MOST_EMBEDS = 1 << 24
MOST_MESSAGE_CHARS = 1000
"""Of what a worker says, which is checked: it has read what strangers send."""
_MOMENT = 0.2
_NOT_NOW = "Media cannot be decoded now; try again later."

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecoderStats:
    """``num_busy``: items being decoded now, ``num_waiting``: items that wait for a worker,
    ``num_worker_restarts``: workers that died or were killed, and replaced, since the start."""

    num_busy: int = 0
    num_waiting: int = 0
    num_worker_restarts: int = 0


class Decoders(Protocol):
    """Decodes and preprocesses items away from the event loop. Usable from several loops at once."""

    async def prepare(self, work: Work) -> Prepared:
        """Features of an encoded file. Raises RequestError. A caller that is cancelled ends the work."""
        ...

    def stats(self) -> DecoderStats:
        """A snapshot of the counters."""
        ...

    def close(self) -> None:
        """Free the workers. Nothing may be waiting."""
        ...


class ThreadDecoders:
    """Decodes in threads of this process: no limits but those of the formats, no isolation. For objects of the caller,
    which are decoded already, and for tests."""

    def __init__(self, workers: ThreadWorkers, config: MediaConfig, processor: Processor) -> None:
        self._workers = workers
        self._config = config
        self._processor = processor

    async def prepare(self, work: Work) -> Prepared:
        """See ``Decoders.prepare``."""
        return await self._workers.run(prepare, work, self._config, self._processor)

    def stats(self) -> DecoderStats:
        """Nothing that could die is here."""
        return DecoderStats()

    def close(self) -> None:
        """The threads are their owner's."""


@dataclass(frozen=True, slots=True)
class ForkServerCommand:
    """How a fork server is started: the program, to which the number of the control socket's descriptor is added, its
    environment, and the first message it gets."""

    program: tuple[str, ...]
    environment: Mapping[str, str]
    message: bytes


@dataclass(frozen=True, slots=True)
class _Forked:
    """A worker process: the socket to it, its id, and the fork server that alone may kill it."""

    connection: socket.socket
    process_id: int
    server: subprocess.Popen[bytes]
    control: socket.socket

    def kill(self) -> None:
        """Kill it. Never waits: a server that is gone has taken its workers along."""
        number = self.process_id.to_bytes(child.ID_BYTES, "little")
        with contextlib.suppress(OSError):
            self.control.send(child.KILL + number, socket.MSG_DONTWAIT)


class _ForkServer:
    """The fork server's process, started when the first worker is wanted and again when it has died. Thread-safe."""

    def __init__(self, command: ForkServerCommand) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        """Held from a question to its answer; to kill takes no answer, and need not wait."""

    def spawn(self) -> _Forked:
        """A new worker. Raises UnavailableError."""
        with self._lock:
            for _ in range(2):
                try:
                    forked = self._spawn()
                except OSError:
                    forked = None
                if forked is not None:
                    return forked
                self._stop(child.RETIRE)
        logger.error("media workers cannot be started; the lines above may say why")
        raise UnavailableError(_NOT_NOW)

    def close(self) -> None:
        """End the process and all workers, for good."""
        self._is_closed = True
        control = self._control
        if control is not None:
            _hang_up(control)  # who waits for an answer hears of it at once
        with self._lock:
            self._stop()

    def _spawn(self) -> _Forked | None:
        """None when the fork server has gone. Raises UnavailableError when it cannot fork, OSError as sockets do."""
        process, control = self._started()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(control, [child.SPAWN], [theirs.fileno()])
            answer = receive_bytes(control, child.ID_BYTES)
        except BaseException:
            ours.close()
            raise
        number = int.from_bytes(answer or b"", "little")
        if answer is not None and number != child.NO_WORKER:
            return _Forked(ours, number, process, control)
        ours.close()
        if answer is None:
            return None
        raise UnavailableError(_NOT_NOW)

    def _started(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._is_closed:
            raise OSError("the workers have been closed")
        if self._process is not None and self._control is not None:
            return self._process, self._control
        ours, theirs = socket.socketpair()
        with theirs, interrupts_held():
            self._process = subprocess.Popen(
                [*self._command.program, str(theirs.fileno())],
                env=dict(self._command.environment),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        ours.settimeout(START_SECONDS)
        self._control = ours  # nobody kills anything before there is a worker
        send_frame(ours, self._command.message)
        return self._process, ours

    def _stop(self, last_word: bytes = b"") -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(last_word, socket.MSG_DONTWAIT)
            _hang_up(self._control)  # a child that the caller's program forked may hold it open
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _hang_up(control: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side has done so
        control.shutdown(socket.SHUT_RDWR)


class _Job:
    """One item on its way through a worker."""

    def __init__(self, work: Work, path: str) -> None:
        self.work = work
        self.path = path
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def message(self) -> bytes:
        """What the worker is told. Raises InvalidRequestError for options that cannot be passed on."""
        work = self.work
        loading = dataclasses.asdict(work.loading)
        header = child.Job(
            work.modality,
            {name: value for name, value in loading.items() if value is not None},
            dict(work.options),
            work.num_items,
            self.path,
            len(work.source),
        )
        try:
            return child.encode(header)
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise InvalidRequestError(
                "mm_processor_kwargs holds a value that is no plain one (a number below 2**64, a text, a list or a "
                "mapping of those).",
                param="mm_processor_kwargs",
            ) from None

    def forget(self) -> None:
        """Let go of the file: the place in the queue stays until a thread comes to it."""
        self.work = dataclasses.replace(self.work, source=b"")

    def run(self, worker: _Worker) -> child.Done:
        """The worker's answer; no file is left when there is none."""
        try:
            return worker.run(self)
        except BaseException:
            remove(self.path)
            raise

    def begin(self, worker: _Worker) -> None:
        """The worker is at it."""
        with self._lock:
            self._worker = worker

    def end(self) -> None:
        """The worker has answered, or died."""
        with self._lock:
            self._worker = None

    def abandon(self) -> None:
        """Nobody waits any more: kill the worker if it is still at it."""
        with self._lock:
            if self._worker is not None:
                self._worker.kill()


class _Worker:
    """One thread's worker process, forked when there is something to do and again after it has died."""

    def __init__(self, server: _ForkServer, seconds: float) -> None:
        self._server = server
        self._seconds = seconds
        self._forked: _Forked | None = None
        self._num_jobs = 0
        self.is_busy = False
        self.num_deaths = 0

    def start(self) -> _Forked:
        """The process, forked unless it is there."""
        if self._forked is not None and (
            self._num_jobs >= JOBS_PER_PROCESS or not _is_idle(self._forked.connection)
        ):
            self.discard()
        if self._forked is None:
            self._forked = self._server.spawn()
            self._num_jobs = 0
        return self._forked

    def run(self, job: _Job) -> child.Done:
        """The answer to a job. Raises RequestError or UnavailableError."""
        message = job.message()
        forked = self.start()
        job.begin(self)
        self.is_busy = True
        begun = time.monotonic()
        try:
            answer = self._ask(forked, message, job.work.source)
            reply = None if answer is None else _reply(answer, job)
        except TimeoutError:
            self._died("was killed: it took too long")
            raise self._too_long(job) from None
        except (OSError, ValueError, TypeError):  # it has gone, or does not say what a worker says
            reply = None
        finally:
            self.is_busy = False
            job.end()
        if reply is None:
            self._died("ended before it was done")
            if _has_ended(forked.server):
                raise UnavailableError(_NOT_NOW)
            if time.monotonic() - begun >= self._seconds:
                raise self._too_long(
                    job
                )  # ended by its limit of processor time, before we came to look at the clock
            raise MediaUndecodableError(
                f"The process that decoded the {job.work.modality} ended before it was done: the file is damaged, or "
                "takes too much."
            )
        self._num_jobs += 1
        if isinstance(reply, child.Failed):
            raise _error(reply)
        return reply

    def _too_long(self, job: _Job) -> MediaUndecodableError:
        """Return the error of a job that took longer than it may."""
        return MediaUndecodableError(
            f"Decoding and preprocessing the {job.work.modality} took longer than {self._seconds:g} s, the limit "
            "(--media-decode-timeout); send a smaller or shorter one."
        )

    def kill(self) -> None:
        """Kill the process, if there is one; who waits for it will notice. From any thread."""
        forked = self._forked
        if forked is not None:
            forked.kill()

    def discard(self) -> None:
        """Kill the process, wait until it can write nothing any more, and forget it."""
        forked, self._forked = self._forked, None
        if forked is None:
            return
        forked.kill()
        with contextlib.suppress(OSError), forked.connection:
            forked.connection.settimeout(STOP_SECONDS)
            while forked.connection.recv(1 << 16):
                pass

    def _died(self, how: str) -> None:
        logger.warning("a media worker %s; another one takes its place", how)
        self.num_deaths += 1
        self.discard()

    def _ask(self, forked: _Forked, message: bytes, source: bytes) -> bytes | None:
        deadline = time.monotonic() + self._seconds
        forked.connection.settimeout(self._seconds)
        send_frame(forked.connection, message, source)
        forked.connection.settimeout(max(0.001, deadline - time.monotonic()))
        return receive_frame(forked.connection)


def _reply(answer: bytes, job: _Job) -> child.Done | child.Failed:
    """What a worker says, if it can be true: it has read what strangers send. Raises ValueError, TypeError or OSError
    when it cannot."""
    reply = child.decode_reply(answer)
    if isinstance(reply, child.Done):
        check(job.path, reply.specs)
        if not 0 <= reply.num_embeds <= MOST_EMBEDS:
            raise ValueError("no number of embeddings")
    return reply


def _error(failed: child.Failed) -> SensoriumError:
    """The error of an item; those of other kinds are not a worker's to raise."""
    message = failed.message[:MOST_MESSAGE_CHARS]
    error = error_of(failed.code, message, failed.param, MediaUndecodableError)
    if isinstance(error, RequestError | OverloadedError):
        return error
    return MediaUndecodableError(message, param=failed.param)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process ends now, as when it took its workers along."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_MOMENT)
    return process.returncode is not None


def _is_idle(connection: socket.socket) -> bool:
    """Whether nothing comes from the other side, not even its end, while nothing is asked of it."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class _Crew:
    """As many threads as workers, each of which waits for one of them."""

    def __init__(self, server: _ForkServer, num_workers: int, seconds: float) -> None:
        self.workers = [_Worker(server, seconds) for _ in range(num_workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self.workers:
            self._idle.put(worker)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="sensorium-decoder")

    def submit(self, use: Callable[[_Worker], T]) -> Future[T]:
        """Call ``use`` with a worker, the one that was used last if it is free."""
        return self._pool.submit(self._with_worker, use)

    def close(self, *, wait: bool) -> None:
        """Drop what waits; with ``wait`` wait for what runs, and forget the workers."""
        self._pool.shutdown(wait=wait, cancel_futures=True)
        if wait:
            for worker in self.workers:
                worker.discard()

    def _with_worker(self, use: Callable[[_Worker], T]) -> T:
        worker = self._idle.get()
        try:
            return use(worker)
        finally:
            self._idle.put(worker)


class ProcessDecoders:
    """Decodes in worker processes. Features come back in segments of ``folder``, which this owns from now on.

    ``config.num_media_workers`` of them work at a time for each modality, so that no picture waits for a long video;
    each within ``media_worker_memory_gb`` and ``media_decode_timeout``. None is there before there is work for it.
    """

    def __init__(
        self, command: ForkServerCommand, config: MediaConfig, folder: SharedArraysFolder
    ) -> None:
        self.num_workers = config.num_media_workers or default_num_workers()
        self._server = _ForkServer(command)
        self._folder = folder
        self._crews = {
            modality: _Crew(self._server, self.num_workers, config.media_decode_timeout)
            for modality in MODALITIES
        }
        self._futures: set[Future[child.Done]] = set()

    def start(self) -> None:
        """Start a first worker in the background, so that the first item need not wait for its imports."""
        self._crews["image"].submit(_Worker.start)

    async def prepare(self, work: Work) -> Prepared:
        """See ``Decoders.prepare``. Raises UnavailableError when no worker can be started."""
        job = _Job(work, self._folder.new_path())
        future = self._crews[work.modality].submit(job.run)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        try:
            done = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled():
                job.forget()
            else:
                future.add_done_callback(lambda _: remove(job.path))
                self._abandon_later(job)
            raise
        # Made here: futures refer to each other in circles, and would keep the segment until these are collected.
        arrays = SharedArrays(job.path, done.specs, owned=True)
        features = Features(work.modality, arrays, done.num_embeds, done.meta, done.precomputed)
        return Prepared(features, done.decode_seconds, done.decoded_bytes, done.preprocess_seconds)

    def _abandon_later(self, job: _Job) -> None:
        timer = threading.Timer(ABANDONED_SECONDS, job.abandon)  # the loop may have ended by then
        timer.daemon = True
        timer.start()

    def stats(self) -> DecoderStats:
        """See ``Decoders.stats``."""
        workers = [worker for crew in self._crews.values() for worker in crew.workers]
        num_busy = sum(worker.is_busy for worker in workers)
        return DecoderStats(
            num_busy,
            max(0, len(self._futures) - num_busy),
            sum(worker.num_deaths for worker in workers),
        )

    def close(self) -> None:
        """See ``Decoders.close``."""
        for crew in self._crews.values():
            crew.close(wait=False)
        self._server.close()  # ends what runs
        for crew in self._crews.values():
            crew.close(wait=True)
        self._folder.close()
