"""The line that ends its engine has failed; those that ran beside it are answered."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from sensorium.engine.serving.client import ENDED, ENDED_ALONE, RESTARTING
from sensorium.errors import UnavailableError
from sensorium.server.batches import isolation, runner
from sensorium.server.batches.calls import Reply
from sensorium.server.batches.isolation import Deaths, Gate, Patience, in_turn
from sensorium.server.batches.lines import Line
from sensorium.server.batches.runner import LineRunner, Outcome

OK = Reply(200, "r", b"{}")


def unavailable(message: str) -> Reply:
    error = {"code": "engine_unavailable", "message": message}
    return Reply(503, "r", msgspec.json.encode({"error": error}), 0.0)


class Engine:
    """A caller whose engine ends with a body ``killer``, and is away for some calls then.

    ``is_shared``: it has other clients, whose requests run beside.
    """

    def __init__(self, most_deaths: int | None = None, *, is_shared: bool = False) -> None:
        self.num_deaths = 0
        self.num_calls = 0
        self._most_deaths = most_deaths
        self._is_shared = is_shared
        self._away = 0
        self._running: set[asyncio.Event] = set()

    async def call(self, url: str, body: bytes) -> Reply:
        self.num_calls += 1
        if self._away:
            self._away -= 1
            return unavailable(RESTARTING)
        died = asyncio.Event()
        self._running.add(died)
        for _ in range(20):
            await asyncio.sleep(0)
            if died.is_set():
                return unavailable(ENDED)
        self._running.discard(died)
        if b"killer" not in body or self.num_deaths == self._most_deaths:
            return OK
        self.num_deaths += 1
        self._away = 3
        was_alone = not (self._running or self._is_shared)
        for other in self._running:
            other.set()
        self._running.clear()
        return unavailable(ENDED_ALONE if was_alone else ENDED)


async def outcomes(engine: Engine, bodies: list[bytes]) -> dict[int, Outcome]:
    found: dict[int, Outcome] = {}

    async def write(outcome: Outcome) -> None:
        assert outcome.number not in found
        found[outcome.number] = outcome

    lines = (Line(n, f"id {n}", "/v1/completions", body) for n, body in enumerate(bodies))
    async with asyncio.timeout(60):
        await LineRunner(engine, 8, patience=600).run(lines, write)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (isolation, runner):
        monkeypatch.setattr(module, "FIRST_WAIT", 0.0)


async def test_the_killer_fails_and_the_others_are_answered() -> None:
    engine = Engine()
    found = await outcomes(engine, [b"{}"] * 5 + [b'{"killer": 1}'] + [b"{}"] * 30)
    assert [n for n, outcome in found.items() if not outcome.succeeded] == [5]
    assert len(found) == 36
    response = json.loads(found[5].text)["response"]
    assert response["status_code"] == 500
    assert response["body"]["error"]["code"] == "engine_ended"
    assert engine.num_deaths in (2, 3)  # twice alone, and beside others if some ran by then
    assert engine.num_calls < 100


async def test_a_killer_of_one_batch_harms_no_line_of_another() -> None:
    """Suspects of all batches of a server run one at a time."""
    engine, gate = Engine(), Gate()
    found: dict[str, bool] = {}

    async def write(outcome: Outcome) -> None:
        found[json.loads(outcome.text)["custom_id"]] = outcome.succeeded

    async def run(name: str, bodies: list[bytes]) -> None:
        lines = (Line(n, f"{name} {n}", "/v1/completions", b) for n, b in enumerate(bodies))
        await LineRunner(engine, 4, patience=600, gate=gate).run(lines, write)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(run("a", [b'{"killer": 1}', b'{"killer": 2}']))
        group.create_task(run("b", [b'{"n": %d}' % n for n in range(6)]))
    assert {name for name, succeeded in found.items() if not succeeded} == {"a 0", "a 1"}
    assert len(found) == 8


async def test_a_line_that_runs_the_second_time_is_answered() -> None:
    engine = Engine(most_deaths=1)
    found = await outcomes(engine, [b'{"killer": 1}'])
    assert found[0].succeeded


@pytest.mark.parametrize("most_deaths", [None, 6])
async def test_what_others_may_have_done_is_tried_more_often(most_deaths: int | None) -> None:
    """A client that is not this program's runs beside the suspect each time."""
    engine = Engine(most_deaths, is_shared=True)
    found = await outcomes(engine, [b"{}", b'{"killer": 1}'])
    assert found[0].succeeded
    assert found[1].succeeded is (most_deaths == 6)
    if most_deaths is None:
        assert engine.num_deaths == 1 + isolation.MOST_BESIDE
        error = json.loads(found[1].text)["response"]["body"]["error"]
        assert error["code"] == "engine_ended"
        assert "Requests of others" in error["message"]


async def test_an_engine_that_is_away_is_no_death() -> None:
    class Away:
        async def call(self, url: str, body: bytes) -> Reply:
            return unavailable(RESTARTING)

    deaths = Deaths()
    reply = await in_turn(Away(), Gate(), deaths, "/v1/completions", b"{}")
    assert reply == unavailable(RESTARTING)
    assert not deaths.is_suspect


@pytest.mark.parametrize("seen", ["answered", "ended"])
async def test_who_waits_for_a_turn_loses_no_patience_while_the_engine_is_there(seen: str) -> None:
    now, num_calls = 0.0, 0
    patience = Patience(10.0, lambda: now)

    async def other() -> Reply:
        return OK

    async def attempt() -> Reply:
        nonlocal now, num_calls
        now += 4.0
        num_calls += 1
        if num_calls == 2 and seen == "ended":
            raise UnavailableError(ENDED)
        if num_calls == 2:
            await patience.repeat(other)
        raise UnavailableError(RESTARTING)

    assert await patience.repeat(attempt) is None
    assert now == 20.0, "ten seconds after eight"


async def test_one_alone_waits_for_others_and_they_for_it() -> None:
    gate, seen = Gate(), list[str]()

    async def beside(name: str) -> None:
        async with gate.beside():
            seen.append(f"{name} in")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            seen.append(f"{name} out")

    async def alone(name: str) -> None:
        async with gate.alone():
            seen.append(f"{name} in")
            await asyncio.sleep(0)
            seen.append(f"{name} out")

    cancelled = asyncio.ensure_future(beside("never"))
    async with asyncio.TaskGroup() as group:
        group.create_task(beside("a"))
        group.create_task(beside("b"))
        group.create_task(alone("c"))
        group.create_task(alone("d"))
        group.create_task(beside("e"))
        cancelled.cancel()
    assert seen == [
        *("a in", "b in", "a out", "b out"),
        *("c in", "c out", "d in", "d out", "e in", "e out"),
    ]
