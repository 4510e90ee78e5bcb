"""Adapters are read beside the steps of the engine's loop, and taken between two of them."""

from __future__ import annotations

import dataclasses
import os
import select
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sensorium.engine import wire
from sensorium.engine.adapters import NamedAdapter
from sensorium.engine.serving import adapter_reader, worker
from sensorium.engine.serving.adapter_reader import MOST_ABANDONED, READ_SECONDS, AdapterReader
from sensorium.engine.serving.worker import StepWatch
from sensorium.engine.stats import AdapterFacts, EngineFacts
from sensorium.errors import ConfigError, SensoriumError, UnavailableError
from tests.engine.serving.conftest import Sockets

FACTS = EngineFacts(8, 1, 1, 1, "cpu", "float32", 1, 0.0)


class Panic(BaseException):
    """As a library raises it that is written in another language."""


class FakeEngine:
    """Has work until an adapter is there; reading takes until it has made some steps."""

    def __init__(self, *, busy: bool = True, adapters: tuple[str, ...] = ()) -> None:
        self.busy = busy
        own = tuple(AdapterFacts(name, name, b"digest", 8) for name in adapters)
        self.facts = dataclasses.replace(FACTS, adapters=own)
        self.num_steps = 0
        self.stepped = threading.Event()
        self.hung, self.progressed = threading.Event(), threading.Event()
        self.readers: list[tuple[threading.Thread, int]] = []

    @property
    def has_work(self) -> bool:
        return self.busy and "a" not in [adapter.name for adapter in self.facts.adapters]

    def step(self) -> list[Any]:
        self.num_steps += 1
        if self.num_steps == 3:
            self.stepped.set()
        return []

    def check_integrity(self) -> None:
        """Nothing can be wrong."""

    def read_adapter(
        self, name: str, path: str, folder: str, progress: Callable[[], object]
    ) -> NamedAdapter:
        me = threading.current_thread()
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.readers.append((me, nice))
        if self.busy:
            assert self.stepped.wait(60), "the loop does not step meanwhile"
        if path in ("hung", "slow"):
            assert self.hung.wait(60)
        if path == "slow":
            progress()
            self.progressed.set()
            assert self.stepped.wait(60)
        if path == "damaged":
            raise ConfigError("It is damaged.", param="lora_modules")
        if path == "large":
            raise MemoryError
        if path == "panics":
            raise Panic
        return NamedAdapter(name, path, folder, adapter=None)  # type: ignore[arg-type]

    def add_adapter(self, found: NamedAdapter) -> None:
        assert threading.current_thread() is threading.main_thread()
        facts = AdapterFacts(found.name, found.path, b"digest", 8, folder=found.folder)
        self.facts = dataclasses.replace(self.facts, adapters=(*self.facts.adapters, facts))

    def unload_adapter(self, name: str) -> None:
        own = tuple(adapter for adapter in self.facts.adapters if adapter.name != name)
        self.facts = dataclasses.replace(self.facts, adapters=own)


@pytest.mark.parametrize("busy", [True, False])
def test_steps_go_on_while_an_adapter_is_read(sockets: Sockets, busy: bool) -> None:
    """An engine without work does not wait for its next look at its parent, either."""
    here, there = sockets
    engine = FakeEngine(busy=busy)
    loop = worker._Loop(there, os.getppid(), StepWatch(0), engine)  # type: ignore[arg-type]
    here.send(wire.encode(wire.LoadAdapter(5, "a", "org/a", "folder")))
    found = []

    def stop() -> None:
        found.append(wire.decode_from_engine(here.recv()))
        here.send(wire.encode(wire.Stop()))

    ending = threading.Thread(target=stop)
    ending.start()
    loop.run()
    ending.join()
    assert found == [wire.Adapters(5, engine.facts.adapters)]
    assert [(a.name, a.path, a.folder) for a in engine.facts.adapters] == [("a", "org/a", "folder")]
    assert (engine.num_steps >= 3) is busy
    [(thread, nice)] = engine.readers
    assert not thread.is_alive()
    assert nice > os.getpriority(os.PRIO_PROCESS, 0), "others run the model"


def test_another_adapter_goes_while_one_is_read(sockets: Sockets) -> None:
    here, there = sockets
    engine = FakeEngine(adapters=("old",))
    loop = worker._Loop(there, os.getppid(), StepWatch(0), engine)  # type: ignore[arg-type]
    here.send(wire.encode(wire.LoadAdapter(5, "a", "hung", "")))
    here.send(wire.encode(wire.UnloadAdapter(6, "old")))
    found = []

    def stop() -> None:
        found.append(wire.decode_from_engine(here.recv()))
        engine.hung.set()
        found.append(wire.decode_from_engine(here.recv()))
        here.send(wire.encode(wire.Stop()))

    ending = threading.Thread(target=stop)
    ending.start()
    loop.run()
    ending.join()
    assert found == [wire.Adapters(6, ()), wire.Adapters(5, engine.facts.adapters)]
    assert [adapter.name for adapter in engine.facts.adapters] == ["a"]
    assert engine.num_steps >= 3


class Answers:
    """What a reader answers."""

    def __init__(self, engine: FakeEngine) -> None:
        self.now = 0.0
        self.found: list[tuple[int, SensoriumError | None]] = []
        self.reader = AdapterReader(engine, self.answer, lambda: self.now)  # type: ignore[arg-type]

    def answer(self, number: int, error: SensoriumError | None) -> None:
        self.found.append((number, error))

    def end(self) -> None:
        """Wait for the thread, and take what it has read."""
        assert select.select([self.reader], [], [], 30)[0]
        self.reader.poll()


@pytest.mark.parametrize(
    ("path", "kind"),
    [("damaged", ConfigError), ("large", UnavailableError), ("panics", SensoriumError)],
)
def test_errors_of_reading_are_answered(
    path: str, kind: type[SensoriumError], caplog: pytest.LogCaptureFixture
) -> None:
    answers = Answers(FakeEngine(busy=False))
    answers.reader.begin(wire.LoadAdapter(1, "a", path, path))
    answers.end()
    [(number, error)] = answers.found
    assert number == 1
    assert type(error) is kind
    assert bool(caplog.records) == (path != "damaged")
    answers.reader.begin(wire.LoadAdapter(2, "b", "b", "b"))
    answers.end()
    assert answers.found[1:] == [(2, None)]
    answers.reader.close()


def test_those_that_hang_do_not_keep_others_out() -> None:
    engine = FakeEngine(busy=False)
    answers = Answers(engine)
    for number in range(MOST_ABANDONED):
        answers.reader.begin(wire.LoadAdapter(number, str(number), "good", ""))
        answers.end()
        answers.reader.begin(wire.LoadAdapter(10 + number, "h", "hung", ""))
        answers.now += READ_SECONDS + 1
        answers.reader.poll()
    answers.reader.begin(wire.LoadAdapter(20, "a", "a", "a"))
    late = [(n, e) for n, e in answers.found if e is not None]
    assert [number for number, _ in late] == [10, 11, 12, 20]
    assert {error.status for _, error in late} == {503}
    assert "cannot be read to their end" in late[-1][1].message
    engine.hung.set()
    for thread in [each for each in threading.enumerate() if each.name.endswith("-adapter")]:
        thread.join()
    answers.reader.poll()
    assert not select.select([answers.reader], [], [], 0)[0], "nothing wakes the loop any more"
    answers.reader.begin(wire.LoadAdapter(21, "a", "a", "a"))
    answers.end()
    assert [adapter.name for adapter in engine.facts.adapters] == ["0", "1", "2", "a"]
    answers.reader.close()


def test_one_that_goes_on_is_not_given_up() -> None:
    engine = FakeEngine(busy=False)
    answers = Answers(engine)
    answers.reader.begin(wire.LoadAdapter(1, "a", "slow", ""))
    answers.now = READ_SECONDS
    engine.hung.set()
    assert engine.progressed.wait(60)
    answers.now = 2 * READ_SECONDS
    answers.reader.poll()
    assert answers.found == []
    engine.stepped.set()
    answers.end()
    assert answers.found == [(1, None)]
    answers.reader.close()


def test_what_takes_too_long_is_given_up_and_not_taken_when_it_comes() -> None:
    engine = FakeEngine()
    answers = Answers(engine)
    answers.reader.begin(wire.LoadAdapter(1, "a", "a", "a"))
    answers.reader.begin(wire.LoadAdapter(2, "b", "b", "b"))
    answers.now = READ_SECONDS + 1
    answers.reader.poll()
    answers.reader.poll()
    assert [number for number, _ in answers.found] == [2, 1]
    assert all(error is not None and error.status == 503 for _, error in answers.found)
    engine.stepped.set()
    answers.end()
    assert engine.facts.adapters == ()
    answers.reader.begin(wire.LoadAdapter(3, "a", "a", "a"))
    answers.end()
    assert answers.found[2:] == [(3, None)]
    assert [adapter.name for adapter in engine.facts.adapters] == ["a"]
    answers.reader.close()


def test_a_thread_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_reader, "CLOSING_SECONDS", 0.0)
    engine = FakeEngine()
    answers = Answers(engine)
    answers.reader.begin(wire.LoadAdapter(1, "a", "a", "a"))
    answers.reader.close()
    os.fstat(answers.reader.fileno())  # the thread still writes to it
    engine.stepped.set()
    answers.end()
    answers.reader.close()
