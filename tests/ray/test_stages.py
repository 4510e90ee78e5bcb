"""Rows in an actor: bad ones, those that end it, and the room that they have."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.errors import ConfigError
from sensorium.multimodal.items import Features, MediaItem
from sensorium.ray.data import stages
from sensorium.ray.data.attempts import Attempts, counted_attempts
from sensorium.ray.data.fronts import Prompts
from sensorium.ray.data.room import Room
from sensorium.ray.data.stages import (
    Answering,
    Pool,
    Preparation,
    Row,
    packed,
    rows_of,
    table_of,
    through_stages,
    unpacked,
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
    """Answers rows; ``bad`` raises, ``image`` keeps a kilobyte of features, or ``num_bytes``.

    ``answers``: those that differ from what is answered else.
    """

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.num_bytes = 1000
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
        if "image" in work and work not in self.answers:
            pixels = np.zeros(self.num_bytes, np.uint8)
            features = Features("image", {"pixels": pixels}, 1)
            item = MediaItem("image", b"", features)
            prompts.prepared["messages"] = PreparedPrompt("", (1,), (item,))
            return None
        return self.answers.get(work, f"answer to {work}")

    def failed(self, work: str, code: str, message: str) -> str:
        return f"{code} of {work}"


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[Any, Stage]]]:
    """Maker of an actor's object."""
    actors = []

    def make(
        kind: type[Preparation], attempts: Attempts, block_bytes: int | None = None
    ) -> tuple[Preparation, Stage]:
        stage = Stage()
        actor = kind(lambda: stage, Here(attempts), None, 1, block_bytes)
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


def test_the_first_rows_and_tasks_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.ray.data.attempts.MOST_SIZES", 1)
    attempts = Attempts()
    assert attempts.size("task 1", "a", 100, 50) == 100
    assert attempts.size("task 1", "a", 120, 50) == 100
    assert attempts.size("task 2", "b", 100, 50) == 100
    assert attempts.size("task 1", "b", 100, 50) is None, "nothing is known of that task"
    assert attempts.size("task 3", "a", 120, 50) == 120


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


def test_a_generator_that_is_dropped_gives_back_its_room(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensorium.ray.data.stages.HELD_BYTES", 3500)
    attempts = Attempts()
    actor, stage = made(Preparation, attempts)
    rows = [Row(f"image {n}") for n in range(20)]
    handed_on = actor(table_of(rows))
    next(handed_on)
    handed_on.close()
    found = list[Any]()
    later = [Row(f"image {n}") for n in range(20, 30)]
    # It would wait for ever for room that is not given back.
    thread = threading.Thread(target=lambda: found.extend(results(actor, later)), daemon=True)
    thread.start()
    thread.join(60)
    assert len(found) == 10
    assert attempts.begin([row.key for row in rows]) == [1] * 20
    assert not {f"image {n}" for n in range(10, 20)} & set(stage.beside), "what is dropped ends"


@pytest.mark.parametrize("kind", [Preparation, Answering])
def test_rows_have_as_many_bytes_in_each_attempt(made: Any, kind: type[Preparation]) -> None:
    """Ray divides them into blocks by bytes, and keeps blocks of an attempt that was lost."""
    attempts = Attempts()
    rows = [Row(name) for name in ("a", "large image", "b", "image", "c")]
    given = table_of(rows)
    actor, _ = made(kind, attempts, 3000)
    first = [table.column("row")[0].as_buffer() for table in actor(given)]
    again, stage = made(kind, attempts, 3000)
    stage.answers = {"a": "longer " * 20, "b": "longer " * 2000, "large image": "", "image": ""}
    second = [table.column("row")[0].as_buffer() for table in again(given)]
    assert [cell.size for cell in first] == [cell.size for cell in second]
    found = [unpacked(cell) for cell in second]
    assert [row.key for row in found] == [row.key for row in rows]
    assert found[0].result == "longer " * 20
    assert found[2].result == "process_lost of b"


def test_a_prompt_that_is_larger_than_before_is_left_to_the_next_stage(made: Any) -> None:
    attempts = Attempts()
    given = table_of([Row("image a"), Row("image b")])
    actor, _ = made(Preparation, attempts, 3000)
    list(actor(given))
    again, stage = made(Preparation, attempts, 3000)
    stage.num_bytes = 5000
    [row, _] = [row for table in again(given) for row in rows_of(table)]
    assert (row.work, row.result, row.prompts.num_bytes) == ("image a", None, 0)


def test_rows_that_are_surely_one_block_may_be_as_large_as_they_like(made: Any) -> None:
    attempts = Attempts()
    given = table_of([Row("a")])
    list(made(Answering, attempts, 1 << 20)[0](given))
    again, stage = made(Answering, attempts, 1 << 20)
    stage.answers = {"a": "longer " * 2000}
    [[row]] = [rows_of(table) for table in again(given)]
    assert row.result == "longer " * 2000


def test_a_process_is_lost_and_each_row_comes_once(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the process that was lost have been read; its rows are other ones in size then."""
    import ray

    lost = tmp_path / "lost"

    class Losing:
        async def start(self) -> None:
            pass

        async def close(self) -> None:
            pass

        async def run(self, work: int, prompts: Prompts) -> dict[str, Any]:
            await asyncio.sleep(0.0 if lost.exists() else 0.02 * work)
            if work == 20 and not lost.exists():
                lost.touch()
                os._exit(1)
            return {"text": "x" * (1500 if lost.exists() else 2500)}

        def failed(self, work: int, code: str, message: str) -> dict[str, Any]:
            return {"text": code}

    dataset = ray.data.range(24, override_num_blocks=1)
    monkeypatch.setattr(dataset.context, "target_max_block_size", 8000)
    monkeypatch.setattr(dataset.context, "enable_progress_bars", False)

    def pack(row: dict[str, int]) -> dict[str, bytes]:
        return {"row": packed(Row(row["id"], row["id"], key=str(row["id"])))}

    pool = Pool(1, 1, rows=192, num_cpus=0)
    rows = stages.mapped(
        dataset.map(pack), Answering, (Losing, counted_attempts(), None, 1, 8000), pool
    )
    found = [unpacked(row["row"]).given for row in rows.iter_rows()]
    assert lost.exists()
    assert sorted(found) == list(range(24))


async def test_room_is_for_the_first_that_comes() -> None:
    room = Room(100)
    order: list[int] = []

    async def row(number: int, size: int) -> None:
        async with room.entered() as entered:
            order.append(number)
            entered.num_bytes = size

    sizes = [400, 30, 30, 30, 30]
    tasks = [asyncio.create_task(row(n, size)) for n, size in enumerate(sizes)]
    async with asyncio.timeout(60):
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
        context = SimpleNamespace(target_max_block_size=1)

        def map_batches(self, kind: type, *, fn_constructor_args: Any, **_: Any) -> Rows:
            given.append(fn_constructor_args[1])
            return self

    pool = Pool(1, 1, rows=8, num_cpus=0)
    through_stages(Rows(), Stage, Stage, pool, pool)  # type: ignore[arg-type]
    prepared, answered = given
    assert prepared.begin(["a"]) == answered.begin(["a"]) == [1]
