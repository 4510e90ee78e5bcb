"""The stations of requests: one line each in the log at level debug, and Chrome traces in a folder.

A station is a moment on a request's way, or a piece of work that has just ended. Its line has the
request's id and the milliseconds since the request arrived. All times are those of
``time.monotonic``, which on Linux is one clock for all processes of a machine, so that the times of
the engine's process need no conversion.

Neither lines nor traces hold content of requests, only ids, numbers, sizes and places such as
``messages[0].content[1]``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from sensorium.errors import ConfigError, SensoriumError

logger = logging.getLogger(__name__)

MAX_STATIONS = 2048
"""Stations that are kept of one request; the end is always kept."""
MAX_WAITING = 1024
"""Finished requests that wait for the writer; further ones are dropped and counted."""
REQUESTS_PER_FILE = 1000
BYTES_PER_FILE = 16 << 20
MAX_FILES = 16
"""Trace files in a folder; the oldest are removed."""
CLOSING_SECONDS = 5.0
_FILE_NAME = re.compile(r"trace-\d{8}-\d{6}-\d+-\d{4,}\.json")

Fact = int | float | str


class RequestTrace:
    """The stations of one request, in the frontend's process.

    ``arrival`` is the time that its lines count from.

    ``writer`` gets the trace when the request has ended; without one there are only lines in the
    log.
    """

    def __init__(self, request_id: str, arrival: float, writer: TraceWriter | None = None) -> None:
        self.request_id = request_id
        self.arrival = arrival
        self.stations: list[tuple[str, float, float, dict[str, Fact]]] = []
        self.ended = False
        self._writer = writer
        self.station("received", end=arrival)

    def station(
        self, name: str, start: float | None = None, end: float | None = None, **facts: Fact
    ) -> None:
        """Record a station: a moment, or work from ``start`` to ``end``, now by default."""
        if self.ended:
            return
        end = time.monotonic() if end is None else end
        self._keep(name, end if start is None else start, end, facts)
        log_station(self.request_id, name, self.arrival, start, end, facts)

    def prefilled(self, scheduled: float | None, prefilled: float | None) -> None:
        """Keep two stations whose lines the engine has written.

        The prompt was first computed, and was done.
        """
        for name, moment in (("scheduled", scheduled), ("prefilled", prefilled)):
            if moment is not None:
                self._keep(name, moment, moment, {})

    def end(self, name: str, **facts: Fact) -> None:
        """Note the last station, such as "finished", and give the trace to the writer.

        Later ones are ignored.
        """
        if self.ended:
            return
        del self.stations[MAX_STATIONS - 1 :]
        self.station(name, None, None, **facts)
        self.ended = True
        if self._writer is not None:
            self._writer.put(self)

    def end_by(self, error: BaseException) -> None:
        """Note the last station of a request that ``error`` ended."""
        if isinstance(error, SensoriumError):
            self.end("failed", code=error.code)
        elif isinstance(error, Exception):
            self.end("failed", code=type(error).__name__)
        else:  # cancelled, or closed by the caller
            self.end("aborted")

    def _keep(self, name: str, start: float, end: float, facts: dict[str, Fact]) -> None:
        if len(self.stations) < MAX_STATIONS:
            self.stations.append((name, start, end, facts))


class Tracer:
    """Makes the traces of requests, where they are wanted.

    ``folder``: where Chrome traces are written, if anywhere.

    Raises ConfigError when the folder cannot be written to.
    """

    def __init__(self, folder: str | None) -> None:
        self._writer = TraceWriter(folder) if folder is not None else None

    def request(self, request_id: str, arrival: float) -> RequestTrace | None:
        """Begin the trace of a request; None when neither the log nor a folder wants it."""
        if self._writer is None and not logger.isEnabledFor(logging.DEBUG):
            return None
        return RequestTrace(request_id, arrival, self._writer)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


_current: ContextVar[RequestTrace | None] = ContextVar("sensorium_trace", default=None)


@contextlib.contextmanager
def active(trace: RequestTrace | None) -> Iterator[None]:
    """Make this trace the current one within the block, also in tasks and threads started there.

    An exception ends the trace. Not around a ``yield`` of a generator, whose callers have contexts
    of their own.
    """
    if trace is None:
        yield
        return
    token = _current.set(trace)
    try:
        yield
    except BaseException as error:
        trace.end_by(error)
        raise
    finally:
        _current.reset(token)


def station(name: str, start: float | None = None, end: float | None = None, **facts: Fact) -> None:
    """Note a station of the request that is being worked on, if it is traced."""
    trace = _current.get()
    if trace is not None:
        trace.station(name, start, end, **facts)


def log_station(
    request_id: str,
    name: str,
    arrival: float,
    start: float | None,
    end: float,
    facts: dict[str, Fact],
) -> None:
    """Write the line of a station, at level debug."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    took = "" if start is None else f" in {1000 * (end - start):.1f} ms"
    told = "".join(f" {key}={value}" for key, value in facts.items())
    logger.debug("%s +%.1f ms %s%s%s", request_id, 1000 * (end - arrival), name, took, told)


class TraceWriter:
    """Writes ended traces into files of a folder, in a thread of its own; ``put`` never waits.

    A file holds at most ``REQUESTS_PER_FILE`` requests and about ``BYTES_PER_FILE`` bytes, the
    folder ``MAX_FILES`` files, whichever process wrote them. Each file is a whole JSON array after
    every write. Raises ConfigError when the folder cannot be written to.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"trace_dir {folder!r} cannot be made: {error.strerror}.", param="trace_dir"
            ) from error
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise ConfigError(f"trace_dir {folder!r} cannot be written to.", param="trace_dir")
        self.num_dropped = 0
        self._queue: queue.Queue[RequestTrace | None] = queue.Queue(MAX_WAITING)
        self._file: IO[bytes] | None = None
        self._num_files = 0
        self._num_requests = 0
        self._thread = threading.Thread(target=self._run, name="sensorium-traces", daemon=True)
        self._thread.start()

    def put(self, trace: RequestTrace) -> None:
        """Have a trace written; drop it when the writer is too far behind."""
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what is left, for at most ``CLOSING_SECONDS``."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSING_SECONDS)
            self._thread.join(CLOSING_SECONDS)
        if self.num_dropped:
            logger.warning("%d traces were dropped: the folder was too slow", self.num_dropped)

    def _run(self) -> None:
        is_failing = False
        while (trace := self._queue.get()) is not None:
            try:
                self._write(chrome_events(trace))
                is_failing = False
            except OSError as error:
                self._end_file()
                if not is_failing:
                    logger.warning("traces cannot be written: %s", error)
                is_failing = True
        self._end_file()

    def _write(self, events: list[dict[str, Any]]) -> None:
        if self._file is None:
            self._file = self._new_file()
        text = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        self._file.seek(-2, os.SEEK_END)  # over the end of the array
        self._file.write(f",\n{text}\n]".encode())
        self._file.flush()
        self._num_requests += 1
        if self._num_requests >= REQUESTS_PER_FILE or self._file.tell() >= BYTES_PER_FILE:
            self._end_file()

    def _new_file(self) -> IO[bytes]:
        """Return a new file that holds an array of one event, the name of this process."""
        began = time.strftime("%Y%m%d-%H%M%S")
        self._num_requests = 0
        descriptor = None
        while descriptor is None:
            path = self._folder / f"trace-{began}-{os.getpid()}-{self._num_files:04d}.json"
            self._num_files += 1
            with contextlib.suppress(FileExistsError):  # that of another model of this server
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file = os.fdopen(descriptor, "wb")
        name = {
            "ph": "M",
            "name": "process_name",
            "pid": os.getpid(),
            "args": {"name": "sensorium"},
        }
        file.write(b"[\n" + json.dumps(name).encode() + b"\n]")
        self._remove_oldest()
        return file

    def _remove_oldest(self) -> None:
        # Names begin with the time, so they sort by age.
        own = [path for path in self._folder.iterdir() if _FILE_NAME.fullmatch(path.name)]
        for path in sorted(own)[:-MAX_FILES]:
            path.unlink(missing_ok=True)

    def _end_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


_PHASES = (
    ("prepare", "received", "submitted"),
    ("queue", "submitted", "scheduled"),
    ("prefill", "scheduled", "prefilled"),
    ("decode", "first token", "finished"),
)
"""Spans between two stations: name, first and last station."""


def chrome_events(trace: RequestTrace) -> list[dict[str, Any]]:
    """Return the trace as events of Chrome's format.

    Nestable asynchronous spans, one track for each request and item.

    Times are microseconds of ``time.monotonic``. See the "Trace Event Format" of the Chromium
    project.
    """
    base = {"cat": "request", "pid": os.getpid(), "tid": 0}
    events: list[dict[str, Any]] = []

    def span(
        depth: int, track: str, name: str, start: float, end: float, facts: dict[str, Fact]
    ) -> None:
        head = {**base, "id": track, "name": name}
        first, last = _micros(start), _micros(end)
        if first >= last:
            events.append({**head, "ph": "n", "ts": last, "args": facts, "order": (1, depth)})
            return
        events.append({**head, "ph": "b", "ts": first, "args": facts, "order": (1, depth)})
        events.append({**head, "ph": "e", "ts": last, "order": (0, -depth)})

    own = trace.request_id
    last_name, _, last, last_facts = trace.stations[-1]
    facts = {"request_id": own, "ended": last_name, **last_facts}
    # What was done before the arrival, such as rendering a prompt of a list, belongs to it, too.
    span(0, own, "request", min(start for _, start, _, _ in trace.stations), last, facts)
    times: dict[str, float] = {}
    for name, _, end, _ in trace.stations:
        times.setdefault(name, end)
    for name, begins, ends in _PHASES:
        if begins in times and ends in times:
            span(1, own, name, times[begins], times[ends], {})
    for name, start, end, facts in trace.stations:
        track = f"{own} {facts['item']}" if "item" in facts else own
        span(2, track, name, start, end, facts)
    # Spans of a track must nest: at one time inner ones end first, and outer ones begin first.
    events.sort(key=lambda event: (event["ts"], event["order"]))
    return [{key: value for key, value in event.items() if key != "order"} for event in events]


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 1)
