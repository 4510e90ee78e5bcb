"""Chrome traces of requests, in the files of a folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import IO, Any

from sensorium.errors import ConfigError
from sensorium.tracing.stations import PHASES, Fact, RequestTrace, logger
from sensorium.tracing.writer import QueueWriter

REQUESTS_PER_FILE = 1000
BYTES_PER_FILE = 16 << 20
MAX_FILES = 16
"""Trace files in a folder; the oldest are removed."""
_FILE_NAME = re.compile(r"trace-\d{8}-\d{6}-\d+-\d{4,}\.json")


class TraceWriter(QueueWriter):
    """Writes ended traces into files of a folder.

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
        self._file: IO[bytes] | None = None
        self._num_files = 0
        self._num_requests = 0
        self._is_failing = False
        super().__init__("sensorium-traces", "the folder was too slow")

    def _handle(self, trace: RequestTrace) -> None:
        try:
            self._write(chrome_events(trace))
            self._is_failing = False
        except OSError as error:
            self._end_file()
            if not self._is_failing:
                logger.warning("traces cannot be written: %s", error)
            self._is_failing = True

    def _finish(self) -> None:
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
    for name, begins, ends in PHASES:
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
