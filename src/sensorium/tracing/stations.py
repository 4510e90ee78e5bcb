"""The stations of one request: a line each in the log at level debug, and kept for traces."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from sensorium.errors import SensoriumError

logger = logging.getLogger("sensorium.tracing")

MAX_STATIONS = 2048
"""Stations that are kept of one request; the end is always kept."""

Fact = int | float | str

PHASES = (
    ("prepare", "received", "submitted"),
    ("queue", "submitted", "scheduled"),
    ("prefill", "scheduled", "prefilled"),
    ("decode", "first token", "finished"),
)
"""Spans between two stations: name, first and last station."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work that a request asks for; empty where that is not known.

    Attributes:
        operation: Its kind in OpenTelemetry's words: ``chat``, ``text_completion``, ``embeddings``.
        asked: The name of the model in the request.
        model: The model that does it, as configured.
        adapter: The LoRA adapter.
    """

    operation: str = ""
    asked: str = ""
    model: str = ""
    adapter: str = ""


NO_WORK = Work()


class Writer(Protocol):
    """A place that gets the traces of ended requests."""

    def put(self, trace: RequestTrace) -> None:
        """Have a trace written; never waits."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class RequestTrace:
    """The stations of one request, in the frontend's process.

    Args:
        request_id: Its id.
        arrival: The time that its lines count from.
        writers: They get the trace when the request has ended; without any there are only lines in
            the log.
        parent: The caller's span that the request belongs to, as W3C's ``traceparent``.
        work: The work that it asks for.
    """

    def __init__(
        self,
        request_id: str,
        arrival: float,
        writers: Sequence[Writer] = (),
        parent: str | None = None,
        work: Work = NO_WORK,
    ) -> None:
        self.request_id = request_id
        self.work = work
        self.arrival = arrival
        self.stations: list[tuple[str, float, float, dict[str, Fact]]] = []
        self.ended = False
        self.parent = parent
        self._writers = writers
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

    def prefilled(
        self,
        scheduled: float | None,
        prefilled: float | None,
        encoded: Sequence[tuple[float, float, int]] = (),
    ) -> None:
        """Keep stations whose lines the engine has written.

        The prompt was first computed, batches of so many of its items were encoded, each from begin
        to end, and it was done.
        """
        if scheduled is not None:
            self._keep("scheduled", scheduled, scheduled, {})
        for begin, end, num_items in encoded:
            self._keep("encoded", begin, end, {"items": num_items})
        if prefilled is not None:
            self._keep("prefilled", prefilled, prefilled, {})

    def end(self, name: str, **facts: Fact) -> None:
        """Note the last station, such as "finished", and give the trace to the writers.

        Later ones are ignored.
        """
        if self.ended:
            return
        del self.stations[MAX_STATIONS - 1 :]
        self.station(name, None, None, **facts)
        self.ended = True
        for writer in self._writers:
            writer.put(self)

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


_current: ContextVar[RequestTrace | None] = ContextVar("sensorium_trace", default=None)
caller_span: ContextVar[str | None] = ContextVar("sensorium_caller_span", default=None)
"""Span of a caller for the requests of a task, as W3C's ``traceparent``."""
asked_model: ContextVar[str | None] = ContextVar("sensorium_asked_model", default=None)
"""Name by which the requests of a task call their model."""


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
