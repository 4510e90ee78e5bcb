"""The loop of the engine's process, in this process: what it takes in, when it steps, when it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from sensorium.core.request import EngineRequest
from sensorium.engine import wire, worker
from sensorium.engine.stats import EngineStats
from sensorium.errors import PromptTooLongError
from sensorium.params import SamplingParams


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

    def check_integrity(self) -> None:
        """Nothing can be wrong."""


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    context = zmq.Context()
    here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    here.bind("inproc://engine")
    there.connect("inproc://engine")
    yield here, there
    here.close(0)
    there.close(0)
    context.term()


Sockets = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]


def run(sockets: Sockets, engine: FakeEngine, messages: list[wire.ToEngine]) -> list[Any]:
    """Run the loop over messages and a stop; what it sent."""
    here, there = sockets
    for message in (*messages, wire.Stop()):
        here.send(wire.encode(message))
    worker._Loop(there, os.getppid()).run(engine)  # type: ignore[arg-type]
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


def test_a_request_that_cannot_be_taken_in_is_refused_and_the_loop_goes_on(
    sockets: Sockets,
) -> None:
    params = SamplingParams()
    requests = [EngineRequest(name, (1,), params, 1) for name in ("long", "bug")]
    messages: list[wire.ToEngine] = [wire.Submit(request, ()) for request in requests]
    engine = FakeEngine(busy=False)
    sent = run(sockets, engine, [*messages, wire.Abort(("a", "b")), wire.AskStats(7)])
    assert [(m.request_id, m.code) for m in sent[:2]] == [
        ("long", "prompt_too_long"),
        ("bug", "internal_error"),
    ]
    assert sent[2].number == 7
    assert engine.num_aborted == 2


@pytest.mark.parametrize("busy", [True, False])
def test_the_loop_ends_when_the_parent_has_gone(sockets: Sockets, busy: bool) -> None:
    engine = FakeEngine(busy=busy)
    worker._Loop(sockets[1], parent=-1).run(engine)  # type: ignore[arg-type]
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
