"""The loop of the engine's process, in this process: what it takes in, when it steps, when it ends."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from sensorium.config import engine_config
from sensorium.core.request import EngineRequest
from sensorium.engine import executor, wire
from sensorium.engine.serving import worker
from sensorium.engine.serving.worker import StepWatch
from sensorium.engine.shared import SharedFeatures
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.errors import PromptTooLongError
from sensorium.params import SamplingParams
from tests.engine.serving.conftest import Sockets


class FakeEngine:
    """Always busy, or never; counts its steps."""

    def __init__(self, *, busy: bool) -> None:
        self.has_work = busy
        self.num_steps = 0
        self.num_aborted = 0

    def add(self, request: EngineRequest, features: tuple[object, ...]) -> None:
        if request.request_id == "long":
            raise PromptTooLongError("too long", param="prompt")
        raise ZeroDivisionError("a bug")

    def abort(self, request_id: str) -> None:
        self.num_aborted += 1

    def step(self) -> list[Any]:
        self.num_steps += 1
        assert self.num_steps < 100, "nobody ends the loop"
        return []

    def stats(self) -> EngineStats:
        return EngineStats(num_steps=self.num_steps)

    def embeddings(self, digest: bytes) -> tuple[np.ndarray | None, str]:
        if digest == b"gone":
            return None, ""
        return np.frombuffer(digest, np.uint8).reshape(2, -1), "bfloat16"

    def check_integrity(self) -> None:
        """Nothing can be wrong."""


def run(
    sockets: Sockets,
    engine: FakeEngine,
    messages: list[wire.ToEngine],
    watch: StepWatch | None = None,
) -> list[Any]:
    """Run the loop over messages and a stop; what it sent."""
    here, there = sockets
    for message in (*messages, wire.Stop()):
        here.send(wire.encode(message))
    worker._Loop(there, os.getppid(), watch or StepWatch(0), engine).run()  # type: ignore[arg-type]
    sent = []
    while here.poll(0):
        sent.append(wire.decode_from_engine(here.recv()))
    return sent


def test_a_flood_of_messages_does_not_stop_the_steps(sockets: Sockets) -> None:
    engine = FakeEngine(busy=True)
    num_messages = 3 * worker.MESSAGES_BETWEEN_STEPS
    sent = run(sockets, engine, [wire.AskStats(i) for i in range(num_messages)])
    assert [message.number for message in sent] == list(range(num_messages))
    assert engine.num_steps == 3


def test_a_flood_of_bytes_does_not_stop_the_steps(sockets: Sockets) -> None:
    """Samples of long prompts: a few of them are as much work as very many short ones."""
    engine = FakeEngine(busy=True)
    names = tuple(f"{number:1000}" for number in range(worker.BYTES_BETWEEN_STEPS // 1000))
    run(sockets, engine, [wire.Abort(names)] * 6)
    assert engine.num_steps == 6
    assert engine.num_aborted == 6 * len(names)


def test_a_request_that_cannot_be_taken_in_is_refused_and_the_loop_goes_on(
    sockets: Sockets,
) -> None:
    params = SamplingParams()
    requests = [EngineRequest(name, (1,), params, 1) for name in ("long", "bug")]
    messages: list[wire.ToEngine] = [wire.Submit(request, ()) for request in requests]
    engine = FakeEngine(busy=False)
    sent = run(sockets, engine, [*messages, wire.Abort(("a", "b")), wire.AskStats(7)])
    assert [(m.request_id, m.code) for m in sent[:2]] == [
        ("long", "context_length_exceeded"),
        ("bug", "internal_error"),
    ]
    assert sent[2].number == 7
    assert engine.num_aborted == 2


def test_embeddings_of_an_item_are_given_away(sockets: Sockets) -> None:
    messages = [wire.AskEmbeddings(1, b"gone"), wire.AskEmbeddings(2, b"abcdefgh")]
    gone, found = run(sockets, FakeEngine(busy=False), list(messages))
    assert (gone.number, gone.bits) == (1, None)
    assert (found.number, found.dtype) == (2, "bfloat16")
    assert found.bits.tobytes() == b"abcdefgh"
    assert found.bits.shape == (2, 4)


def test_a_request_whose_features_are_gone_is_refused_quietly(
    sockets: Sockets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client left while the engine was at a step; anybody can do that as often as they like."""
    gone = SharedFeatures(str(tmp_path / "gone"), "image", 1, {}, {}, False)
    request = EngineRequest("left", (1,), SamplingParams(), 1)
    (refused,) = run(sockets, FakeEngine(busy=False), [wire.Submit(request, (gone,))])
    assert (refused.request_id, refused.code) == ("left", "engine_unavailable")
    assert not caplog.records


@pytest.mark.parametrize("busy", [True, False])
def test_the_loop_ends_when_the_parent_has_gone(sockets: Sockets, busy: bool) -> None:
    engine = FakeEngine(busy=busy)
    worker._Loop(sockets[1], -1, StepWatch(0), engine).run()  # type: ignore[arg-type]
    assert engine.num_steps == 0


@pytest.mark.parametrize("orphan", [True, False])
def test_an_orphan_removes_the_folders_and_signals_are_left_to_the_parent(
    orphan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "segments"
    folder.mkdir()
    parent = -1 if orphan else os.getppid()
    address = f"ipc://{tmp_path}/socket"
    monkeypatch.setattr(sys, "argv", ["worker", address, str(parent), str(folder)])
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(worker, "_serve", lambda socket, parent: 0)
    assert worker.main() == 0
    assert folder.exists() is not orphan
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


class FakeSocket:
    """Gives what is in ``incoming``; what was sent is in ``sent``."""

    def __init__(self, *incoming: wire.ToEngine) -> None:
        self.incoming = [wire.encode(message) for message in incoming]
        self.sent: list[Any] = []

    def poll(self, _: int) -> int:
        return len(self.incoming)

    def recv(self) -> bytes:
        return self.incoming.pop(0)

    def send(self, data: bytes) -> None:
        self.sent.append(wire.decode_from_engine(data))


@pytest.mark.parametrize("error", [MemoryError("all is full"), AssertionError("the books")])
def test_a_step_that_raises_ends_the_process_and_says_why(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FakeEngine):
        facts = EngineFacts(8, 1, 1, 1, "cpu", "float32", 1, 0.0)

        def step(self) -> list[Any]:
            raise error

    rests: list[bool] = []
    monkeypatch.setattr(StepWatch, "rest", lambda watch: rests.append(True))
    monkeypatch.setattr(StepWatch, "step_begins", lambda watch: None)
    monkeypatch.setattr(executor, "build_engine", lambda config, **_: Broken(busy=True))
    socket = FakeSocket(wire.Configure(engine_config()))
    assert worker._serve(socket, os.getppid()) == 1  # type: ignore[arg-type]
    assert [type(message) for message in socket.sent] == [wire.Ready]
    [record] = caplog.records
    assert record.levelname == "CRITICAL"
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert rests == [True]


HUNG = """
import threading
from sensorium.engine.serving.worker import StepWatch
watch = StepWatch({seconds})
watch.step_begins()
watch.step_begins()
def hung_step():
    if {hangs}:
        threading.Event().wait()
hung_step()
watch.rest()
"""


@pytest.mark.parametrize(("seconds", "hangs"), [(0.1, True), (60.0, False), (0.0, False)])
def test_a_hung_step_ends_the_process_and_shows_where(seconds: float, hangs: bool) -> None:
    code = HUNG.format(seconds=seconds, hangs=hangs)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == hangs
    assert ("in hung_step" in done.stderr) is hangs
    assert ("Timeout" in done.stderr) is hangs


def test_the_watch_is_set_for_long_steps_and_not_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = 100.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    fault = faulthandler
    monkeypatch.setattr(fault, "dump_traceback_later", lambda s, exit: told.append((now, s, exit)))
    monkeypatch.setattr(fault, "cancel_dump_traceback_later", lambda: told.append("cancelled"))
    watch = StepWatch(100.0)
    for now in (100.0, 105.0, 109.0, 110.5, 115.0):  # noqa: B007
        watch.step_begins()
    assert told == [(100.0, pytest.approx(110.0), True), (110.5, pytest.approx(110.0), True)]
    watch.rest()
    watch.rest()
    assert told[2:] == ["cancelled"]
    watch.step_begins()
    assert len(told) == 4
    never = StepWatch(0.0)
    never.step_begins()
    never.rest()
    assert len(told) == 4


LEAVING = """
import atexit, runpy, sys, threading
atexit.register(threading.Event().wait)
sys.argv = ["worker", *sys.argv[1:]]
runpy.run_module("sensorium.engine.serving.worker", run_name="__main__")
"""


def test_the_process_ends_without_taking_the_interpreter_apart(tmp_path: Path) -> None:
    """That takes seconds once a model is loaded, for which everyone would wait who stops a server."""
    address = f"ipc://{tmp_path}/engine"
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.bind(address)
        process = subprocess.Popen([sys.executable, "-c", LEAVING, address, str(os.getpid())])
        try:
            socket.send(wire.encode(wire.Stop()))
            assert process.wait(60) == 1  # it was stopped before it was told what to load
        finally:
            process.kill()


def test_changes_of_adapters_are_watched(sockets: Sockets) -> None:
    """Other ranks may hang while they take part in them."""
    watch = StepWatch(600.0)
    watched: list[bool] = []

    class Adapted(FakeEngine):
        facts = EngineFacts(8, 1, 1, 1, "cpu", "float32", 1, 0.0)

        def unload_adapter(self, name: str) -> None:
            watched.append(watch.is_set)

    try:
        run(sockets, Adapted(busy=False), [wire.UnloadAdapter(1, "a")], watch)
    finally:
        watch.rest()
    assert watched == [True]
