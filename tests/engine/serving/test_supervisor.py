"""What happens when the engine dies, with engines that die on command and a clock that is moved
by hand.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest

from sensorium.config import engine_config
from sensorium.core.request import EngineRequest
from sensorium.engine.serving import supervisor as supervisor_module
from sensorium.engine.serving.adapter_reader import READ_SECONDS
from sensorium.engine.serving.client import LONGEST_RETRY, OutputQueue, dead_error
from sensorium.engine.serving.supervisor import STEADY_SECONDS, Backoff, EngineSupervisor
from sensorium.engine.stats import AdapterFacts, EngineFacts, EngineStats
from sensorium.errors import ConfigError, EngineDeadError, SensoriumError
from sensorium.params import SamplingParams

REQUEST = EngineRequest("a", (1,), SamplingParams(), 1)
FACTS = EngineFacts(512, 100, 16, 256, "cpu", "float32", 1, 0.5)


class FakeClient:
    """An engine that starts when ``gate`` is open, unless ``start_error`` is set, and dies when
    it is told to.
    """

    def __init__(self, facts: EngineFacts, start_error: Exception | None) -> None:
        self.facts = facts
        self.start_error = start_error
        self.gate = asyncio.Event()
        self.alive = False
        self.start_seconds = 4.0
        self.output_queues: dict[str, OutputQueue] = {}
        self.num_stops = 0
        self.stop_error: Exception | None = None
        self.faults: dict[str, str] = {}
        self._ended = asyncio.Event()

    async def start(self) -> EngineFacts:
        await self.gate.wait()
        if self.start_error is not None:
            raise self.start_error
        self.alive = True
        return self.facts

    async def wait_ended(self) -> None:
        await self._ended.wait()

    async def load_adapter(self, name: str, path: str, folder: str) -> EngineFacts:
        fault = self.faults.get(name, "")
        if fault == "gone":
            raise ConfigError("There is no folder.")
        if fault == "fails":
            raise SensoriumError("It failed: MemoryError.")
        if fault == "hangs":
            await asyncio.Event().wait()
        if fault == "kills":
            self.die()
            raise EngineDeadError("dead")
        own = (
            *self.facts.adapters,
            AdapterFacts(name, path, (name + fault).encode(), 8, folder=folder),
        )
        self.facts = dataclasses.replace(self.facts, adapters=own)
        return self.facts

    async def unload_adapter(self, name: str) -> EngineFacts:
        own = tuple(adapter for adapter in self.facts.adapters if adapter.name != name)
        self.facts = dataclasses.replace(self.facts, adapters=own)
        return self.facts

    def die(self) -> None:
        """The process ends."""
        self.alive = False
        for output_queue in self.output_queues.values():
            output_queue.put_nowait(EngineDeadError("dead"))
        self.output_queues.clear()
        self._ended.set()

    def submit(self, request: EngineRequest, items: object, output_queue: OutputQueue) -> None:
        if not self.alive:
            raise dead_error(self.start_seconds)
        self.output_queues[request.request_id] = output_queue

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.output_queues.pop(request_id, None)

    async def stats(self) -> EngineStats:
        return EngineStats(num_steps=1)

    async def stop(self) -> None:
        self.alive = False
        self.num_stops += 1
        if self.stop_error is not None:
            raise self.stop_error


class Bench:
    """A supervisor, the clients that it made, and the time, which stands still but for ``sleep``
    and ``now``.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.clients: list[FakeClient] = []
        self.start_errors: list[Exception | None] = []
        self.sleeps: list[float] = []
        self.told: list[EngineFacts] = []
        self.faults: dict[str, str] = {}
        self.held = False
        self.supervisor = EngineSupervisor(
            engine_config(),
            new_client=self._new_client,  # type: ignore[arg-type]
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _new_client(self, *_: object) -> FakeClient:
        number = len(self.clients)
        error = self.start_errors.pop(0) if self.start_errors else None
        self.clients.append(FakeClient(dataclasses.replace(FACTS, num_kv_blocks=number), error))
        self.clients[-1].faults = self.faults
        if not self.held:
            self.clients[-1].gate.set()
        return self.clients[-1]

    async def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        if self.held:
            await asyncio.Event().wait()
        self.now += seconds

    async def start(self) -> EngineSupervisor:
        await self.supervisor.start()
        self.supervisor.watch(self.told.append)
        return self.supervisor

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the other tasks run until it holds; they wait for nothing outside."""
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never happened")

    async def die(self) -> None:
        """Let the engine die and another one come up."""
        number = self.supervisor.num_restarts
        self.clients[-1].die()
        await self.until(lambda: self.supervisor.num_restarts > number)


@pytest.fixture
async def bench() -> Any:
    bench = Bench()
    yield bench
    await bench.supervisor.stop()
    assert not bench.supervisor.alive
    assert [client.num_stops for client in bench.clients] == [1] * len(bench.clients)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_the_delays_of_a_row_of_attempts() -> None:
    backoff = Backoff()
    assert [backoff.next_delay() for _ in range(10)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert {backoff.next_delay() for _ in range(3000)} == {30.0}
    backoff.reset()
    assert [backoff.next_delay() for _ in range(2)] == [0, 0.5]


async def test_requests_meanwhile_are_refused_and_later_ones_go_to_the_new_engine(
    bench: Bench,
) -> None:
    supervisor = await bench.start()
    assert supervisor.alive
    supervisor.current()
    output_queue: OutputQueue = asyncio.Queue()
    supervisor.current().submit(REQUEST, [], output_queue)
    bench.held = True
    bench.clients[0].die()
    with pytest.raises(EngineDeadError):
        supervisor.current().submit(REQUEST, [], output_queue)
    await bench.until(lambda: len(bench.clients) == 2)
    assert isinstance(output_queue.get_nowait(), EngineDeadError)
    assert not supervisor.alive
    with pytest.raises(EngineDeadError, match="being restarted; try again"):
        supervisor.current().submit(REQUEST, [], output_queue)
    with pytest.raises(EngineDeadError):
        await supervisor.current().stats()
    bench.now += 1.5
    with pytest.raises(EngineDeadError) as caught:
        supervisor.current()
    assert caught.value.retry_after == 3, "of the 4 seconds that the first one took 1.5 are over"
    assert supervisor.facts.num_kv_blocks == 0, "those of the latest engine that was up"
    bench.clients[1].gate.set()
    await bench.until(lambda: supervisor.alive)
    assert supervisor.num_restarts == 1
    supervisor.current().submit(REQUEST, [], output_queue)
    assert set(bench.clients[1].output_queues) == {"a"}
    assert (await supervisor.current().stats()).num_steps == 1
    supervisor.current().abort(["a"])
    assert not bench.clients[1].output_queues
    assert output_queue.empty()


async def test_new_facts_are_told_before_a_request_can_come(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await bench.start()
    assert [facts.num_kv_blocks for facts in bench.told] == [0]
    seen: list[bool] = []
    supervisor._on_start = lambda facts: seen.append(facts is supervisor.facts)
    await bench.die()
    assert seen == [True]
    assert supervisor.facts.num_kv_blocks == 1
    assert "restarts so far: 1" in caplog.text
    assert "the KV cache 1 blocks (was 0)" in caplog.text


async def test_quick_deaths_are_followed_by_longer_delays_until_one_lives(bench: Bench) -> None:
    await bench.start()
    for _ in range(5):
        await bench.die()
    assert bench.sleeps == [0.5, 1, 2, 4]
    bench.now += STEADY_SECONDS - 1
    await bench.die()
    assert bench.sleeps == [0.5, 1, 2, 4, 8]
    bench.now += STEADY_SECONDS
    await bench.die()
    assert bench.sleeps == [0.5, 1, 2, 4, 8]
    await bench.die()
    assert bench.sleeps == [0.5, 1, 2, 4, 8, 0.5]
    assert bench.supervisor.num_restarts == 8


async def test_a_restart_that_fails_is_logged_and_tried_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await bench.start()
    bench.start_errors = [
        ConfigError("no memory for a KV cache"),
        EngineDeadError("it ended while starting"),
        OSError("no process can be made"),
    ]
    bench.clients[0].stop_error = RuntimeError("a folder that cannot be removed")
    with caplog.at_level(logging.ERROR, supervisor_module.__name__):
        await bench.die()
    bench.clients[0].stop_error = None
    assert bench.sleeps == [0.5, 1, 2]
    assert supervisor.num_restarts == 1
    assert supervisor.alive
    for text in ("no memory", "ended while", "no process can", "cannot be removed"):
        assert text in caplog.text
    assert [client.num_stops for client in bench.clients] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("where", ["sleeping", "starting"])
async def test_stop_during_a_restart_is_at_once(bench: Bench, where: str) -> None:
    supervisor = await bench.start()
    if where == "sleeping":
        await bench.die()
    bench.held = True
    bench.clients[-1].die()
    expected = 2 if where == "starting" else 3
    await bench.until(lambda: len(bench.clients) + len(bench.sleeps) == expected)
    with pytest.raises(EngineDeadError) as caught:
        supervisor.current()
    assert caught.value.retry_after == (4 if where == "starting" else 5), "0.5 and 4 seconds"
    await asyncio.wait_for(supervisor.stop(), 60)
    assert len(bench.clients) == 2
    await supervisor.stop()


@pytest.mark.parametrize("error", [ConfigError("no such model"), EngineDeadError("killed")])
async def test_a_first_start_that_fails_is_not_tried_again(bench: Bench, error: Exception) -> None:
    bench.start_errors = [error]
    with pytest.raises(type(error)):
        await bench.supervisor.start()
    assert [client.num_stops for client in bench.clients] == [1]
    with pytest.raises(EngineDeadError, match="not been started"):
        _ = bench.supervisor.facts


async def test_a_first_start_that_is_cancelled_leaves_nothing(bench: Bench) -> None:
    bench.held = True
    starting = asyncio.create_task(bench.supervisor.start())
    await bench.until(lambda: len(bench.clients) == 1)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert [client.num_stops for client in bench.clients] == [1]


async def test_an_engine_that_died_before_it_was_watched_is_replaced(bench: Bench) -> None:
    await bench.supervisor.start()
    bench.clients[0].die()
    bench.supervisor.watch(bench.told.append)
    await bench.until(lambda: bench.supervisor.alive)
    assert [facts.num_kv_blocks for facts in bench.told] == [0, 1]


@pytest.mark.parametrize(("seconds", "told"), [(-5, 1), (0.2, 1), (7.1, 8), (1e9, LONGEST_RETRY)])
def test_how_long_clients_are_told_to_wait(seconds: float, told: int) -> None:
    assert dead_error(seconds).retry_after == told


async def test_a_server_that_stops_promises_no_other_engine() -> None:
    bench = Bench()
    supervisor = await bench.start()
    await supervisor.stop()
    with pytest.raises(EngineDeadError, match="shutting down"):
        supervisor.current()


@pytest.mark.parametrize("fault", ["gone", "changed", "hangs", "kills", "fails"])
async def test_a_new_engine_gets_the_adapters_of_the_one_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Those that cannot be loaded any more, or harm the engine, are dropped.

    One at which the engine failed is tried again at the next start.
    """
    monkeypatch.setattr(supervisor_module, "RESTORE_SECONDS", 0.0)
    supervisor = await bench.start()
    for name in ("first", "bad", "second"):
        await supervisor.load_adapter(name, "org/" + name, "folder")
    bench.faults["bad"] = fault
    await bench.die()
    assert [adapter.name for adapter in supervisor.facts.adapters] == ["first", "second"]
    assert {(a.path, a.folder) for a in supervisor.facts.adapters} == {
        ("org/first", "folder"),
        ("org/second", "folder"),
    }, "nothing is downloaded again"
    bench.faults.clear()
    await bench.die()
    names = {adapter.name for adapter in supervisor.facts.adapters}
    assert names == {"first", "second"} | ({"bad"} if fault == "fails" else set())
    assert bench.told[-1] == supervisor.facts


async def test_an_engine_that_dies_loading_an_adapter_comes_up_with_the_others(
    bench: Bench,
) -> None:
    supervisor = await bench.start()
    await supervisor.load_adapter("first", "org/first", "folder")
    bench.faults["bad"] = "kills"
    with pytest.raises(EngineDeadError):
        await supervisor.load_adapter("bad", "org/bad", "folder")
    await bench.until(lambda: supervisor.num_restarts == 1)
    assert [adapter.name for adapter in supervisor.facts.adapters] == ["first"]


def test_an_adapter_that_hangs_is_dropped_before_the_engine_gives_it_up() -> None:
    """Else all later adapters would be tried in an engine that still waits for it."""
    assert supervisor_module.RESTORE_SECONDS < READ_SECONDS
