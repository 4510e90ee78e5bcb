"""Rows in an actor: bad ones, those that end it, and the room that they have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.errors import ConfigError
from sensorium.multimodal.items import Features, MediaItem
from sensorium.ray.data import stages
from sensorium.ray.data.fronts import Prompts
from sensorium.ray.data.room import Room
from sensorium.ray.data.stages import (
    Answering,
    Attempts,
    Pool,
    Preparation,
    Row,
    rows_of,
    table_of,
    through_stages,
)


class Here:
    """An actor of this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        class Called:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                done: Future[Any] = Future()
                done.set_result(method(*arguments))
                return type("Reference", (), {"future": lambda self: done})()

        return Called


class Stage:
    """Answers rows; ``bad`` raises, ``image`` keeps a kilobyte of features."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.beside: dict[str, set[str]] = {}
        self.most_held = 0
        self.held: Callable[[], int] = lambda: 0

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def run(self, work: str, prompts: Prompts) -> str | None:
        self.running.add(work)
        for name in self.running:
            self.beside.setdefault(name, set()).update(self.running)
        await asyncio.sleep(0)
        self.running.discard(work)
        if "bad" in work:
            raise KeyError(work)
        if "image" in work:
            features = Features("image", {"pixels": np.zeros(1000, np.uint8)}, 1)
            item = MediaItem("image", b"", features)
            prompts.prepared["messages"] = PreparedPrompt("", (1,), (item,))
            return None
        return f"answer to {work}"

    def failed(self, work: str, code: str, message: str) -> str:
        return f"{code} of {work}"


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[Any, Stage]]]:
    """Maker of an actor's object."""
    actors = []

    def make(kind: type[Preparation], attempts: Attempts) -> tuple[Preparation, Stage]:
        stage = Stage()
        actor = kind(lambda: stage, Here(attempts), None, 1)
        actors.append(actor)
        return actor, stage

    yield make
    for actor in actors:
        actor.__del__()


def results(actor: Preparation, rows: list[Row]) -> list[Any]:
    return [row.result for table in actor(table_of(rows)) for row in rows_of(table)]


def test_an_unforeseen_exception_is_the_error_of_its_row(
    made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    actor, _ = made(Answering, Attempts())
    rows = [Row("a"), Row("bad"), Row("b", result="has one")]
    assert results(actor, rows) == ["answer to a", "internal_error of bad", "has one"]
    assert "KeyError: 'bad'" in caplog.text


def test_rows_of_a_lost_process_run_alone_and_the_killer_fails(made: Any) -> None:
    attempts = Attempts()
    lost, fresh = [Row("killer"), Row("a"), Row("b")], [Row("c"), Row("d")]
    keys = [row.key for row in lost]
    attempts.begin(keys)  # beside each other
    for _ in range(2):
        attempts.begin(keys)
        attempts.begin_alone(keys[0])  # its process is lost again, twice
    actor, stage = made(Answering, attempts)
    assert results(actor, [*lost, *fresh]) == [
        "process_lost of killer",
        *(f"answer to {name}" for name in "abcd"),
    ]
    assert "killer" not in stage.beside
    assert stage.beside["a"] == {"a"}
    assert stage.beside["b"] == {"b"}
    assert results(actor, lost)[0] == "answer to killer"  # all is forgotten


def test_processes_that_are_lost_at_each_start_end_the_run(made: Any) -> None:
    attempts = Attempts()
    for _ in range(4):
        attempts.begin_start("Answering")
    actor, _ = made(Answering, attempts)
    with pytest.raises(ConfigError, match="whenever they start"):
        results(actor, [Row("a")])
    attempts.end_start("Answering")
    actor, _ = made(Answering, attempts)
    assert results(actor, [Row("a")]) == ["answer to a"]


def test_features_that_wait_to_be_handed_on_are_bounded(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensorium.ray.data.stages.HELD_BYTES", 3500)
    actor, stage = made(Preparation, Attempts())
    rows = [Row(f"image {n}") for n in range(20)]
    held = []
    for table in actor(table_of(rows)):
        [row] = rows_of(table)
        assert row.prompts.num_bytes == 1000
        held.append(actor.room.num_bytes)
    assert max(len(names) for names in stage.beside.values()) <= 3
    assert max(held) <= 3000


async def test_room_is_for_the_first_that_comes() -> None:
    room = Room(100)
    order: list[int] = []

    async def row(number: int, size: int) -> None:
        async with room.entered() as entered:
            order.append(number)
            entered.num_bytes = size

    sizes = [400, 30, 30, 30, 30]
    tasks = [asyncio.create_task(row(n, size)) for n, size in enumerate(sizes)]
    for left in sizes:
        while not order or room.num_bytes == 0:
            await asyncio.sleep(0)
        room.leave(left)
        if len(order) == len(sizes):
            break
    await asyncio.gather(*tasks)
    assert order == list(range(5))


async def test_rows_that_are_cancelled_or_fail_leave_their_room() -> None:
    room = Room(100)
    entered = asyncio.Event()

    async def row() -> None:
        async with room.entered() as held:
            held.num_bytes = 100
            entered.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(row())
    await entered.wait()
    waiting = asyncio.create_task(row())
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    async with room.entered():
        assert room.num_bytes == 0


def test_each_stage_counts_attempts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second gets rows of a batch that the first has not ended; they are not suspect."""
    given: list[Attempts] = []
    monkeypatch.setattr(stages, "counted_attempts", Attempts)

    class Rows:
        def map_batches(self, kind: type, *, fn_constructor_args: Any, **_: Any) -> Rows:
            given.append(fn_constructor_args[1])
            return self

    pool = Pool(1, 1, rows=8, num_cpus=0)
    through_stages(Rows(), Stage, Stage, pool, pool)  # type: ignore[arg-type]
    prepared, answered = given
    assert prepared.begin(["a"]) == answered.begin(["a"]) == [1]
