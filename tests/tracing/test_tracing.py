"""Traces of requests: which are kept, what is written, and the bounds of both."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sensorium import tracing
from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.tracing import RequestTrace, Tracer, chrome, stations
from sensorium.tracing import writer as writers
from sensorium.tracing.chrome import TraceWriter


def ended(number: int, writer: TraceWriter | None = None) -> RequestTrace:
    """The trace of a request that has ended."""
    trace = RequestTrace(f"request-{number}", time.monotonic(), () if writer is None else (writer,))
    trace.end("finished", tokens=number)
    return trace


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """The events of each file, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def test_nothing_is_kept_unless_it_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrival = time.monotonic()
    with caplog.at_level(logging.INFO, logger=tracing.logger.name):
        assert Tracer(None).request("a", arrival) is None
        tracer = Tracer(str(tmp_path))
        assert tracer.request("a", arrival) is not None
        tracer.close()
        tracing.station("of no request")
    assert not caplog.messages
    with caplog.at_level(logging.DEBUG, logger=tracing.logger.name):
        trace = Tracer(None).request("a", arrival)
        assert trace is not None
        trace.station("rendered", arrival, arrival + 0.25, tokens=3)
    assert caplog.messages == [
        "a +0.0 ms received",
        "a +250.0 ms rendered in 250.0 ms tokens=3",
    ]


async def test_stations_reach_tasks_and_threads_of_the_request_alone() -> None:
    one, other = RequestTrace("one", 0.0), RequestTrace("other", 0.0)

    async def work(trace: RequestTrace) -> None:
        with tracing.active(trace):
            await asyncio.gather(
                asyncio.create_task(asyncio.to_thread(tracing.station, "thread")),
                asyncio.sleep(0),
            )
            tracing.station(trace.request_id)

    await asyncio.gather(work(one), work(other))
    tracing.station("outside")
    assert [name for name, *_ in one.stations] == ["received", "thread", "one"]
    assert [name for name, *_ in other.stations] == ["received", "thread", "other"]


@pytest.mark.parametrize(
    ("error", "name", "facts"),
    [
        (InvalidRequestError("What and why."), "failed", {"code": "invalid_request"}),
        (ZeroDivisionError("0"), "failed", {"code": "ZeroDivisionError"}),
        (asyncio.CancelledError(), "aborted", {}),
    ],
)
def test_errors_end_a_trace(error: BaseException, name: str, facts: dict[str, str]) -> None:
    trace = RequestTrace("a", 0.0)
    with pytest.raises(type(error)), tracing.active(trace):
        raise error
    trace.station("later")
    trace.end("finished")
    assert [(station[0], station[3]) for station in trace.stations[1:]] == [(name, facts)]


def test_a_trace_of_many_stations_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stations, "MAX_STATIONS", 8)
    trace = RequestTrace("a", 0.0)
    for number in range(100):
        trace.station(f"station {number}")
    trace.end("finished")
    assert len(trace.stations) == 8
    assert trace.stations[-1][0] == "finished"


def test_files_are_bounded_in_requests_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chrome, "REQUESTS_PER_FILE", 2)
    monkeypatch.setattr(chrome, "MAX_FILES", 3)
    own = tmp_path / "trace-of-mine.json"  # the operator's: neither counted nor removed
    own.write_text("[]")
    writer = TraceWriter(str(tmp_path))
    for number in range(11):
        ended(number, writer)
    writer.close()
    own.unlink()
    files = read(tmp_path)
    ids = [[event["id"] for event in file if event["ph"] == "b"] for file in files]
    assert ids == [
        ["request-6", "request-7"],
        ["request-8", "request-9"],
        ["request-10"],
    ]
    assert all(file[0]["name"] == "process_name" for file in files)


def test_files_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome, "BYTES_PER_FILE", 1)
    writer = TraceWriter(str(tmp_path))
    for number in range(3):
        ended(number, writer)
    writer.close()
    assert len(read(tmp_path)) == 3


class SlowTrace(RequestTrace):
    """A trace that keeps its writer busy until it is released."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.release = threading.Event()
        super().__init__("slow", 0.0)

    def __getattribute__(self, name: str) -> Any:
        if name == "stations" and threading.current_thread().name == "sensorium-traces":
            self.reached.set()
            assert self.release.wait(60)
        return super().__getattribute__(name)


def test_a_slow_folder_costs_traces_and_not_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writers, "MAX_WAITING", 2)
    writer = TraceWriter(str(tmp_path))
    slow = SlowTrace()
    slow.end("finished")
    writer.put(slow)
    assert slow.reached.wait(60)
    for number in range(5):
        ended(number, writer)  # returns though the writer is busy
    assert writer.num_dropped == 3
    slow.release.set()
    writer.close()
    assert "3 traces were dropped" in caplog.text
    (file,) = read(tmp_path)
    assert [event["id"] for event in file if event["ph"] == "b"][1:] == ["request-0", "request-1"]


class BrokenTrace(RequestTrace):
    """A trace that no writer can read."""

    def __getattribute__(self, name: str) -> Any:
        if name == "stations" and threading.current_thread().name == "sensorium-traces":
            raise ZeroDivisionError("broken")
        return super().__getattribute__(name)


def test_a_trace_that_cannot_be_written_ends_no_tracing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TraceWriter(str(tmp_path))
    for _ in range(3):
        BrokenTrace("broken", 0.0, (writer,)).end("finished")
    ended(1, writer)
    writer.close()
    assert writer.num_failed == 3
    assert caplog.text.count("a trace could not be written") == 1
    (file,) = read(tmp_path)
    assert [event["id"] for event in file if event["ph"] == "b"] == ["request-1"]


def test_a_folder_that_goes_away_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "traces"
    writer = TraceWriter(str(folder))
    shutil.rmtree(folder)
    ended(0, writer)
    ended(1, writer)
    writer.close()
    assert caplog.text.count("traces cannot be written") == 1


def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="trace_dir"):
        Tracer(str(tmp_path / "file" / "folder"))
