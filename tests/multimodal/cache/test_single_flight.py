import asyncio

import pytest

from sensorium.multimodal.cache.single_flight import SingleFlight


class Work:
    """Work that waits until it is told to end; counts its starts and cancellations."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_starts = 0
        self.num_cancelled = 0
        self.go = asyncio.Event()
        self.started = asyncio.Event()
        self.error = error

    async def __call__(self) -> str:
        self.num_starts += 1
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return "done"


async def test_many_callers_one_run() -> None:
    single_flight: SingleFlight[str] = SingleFlight()
    work = Work()
    tasks = [asyncio.create_task(single_flight.run("a", work)) for _ in range(100)]
    await work.started.wait()
    work.go.set()
    assert await asyncio.gather(*tasks) == ["done"] * 100
    assert work.num_starts == 1
    assert single_flight.num_running == 0
    await single_flight.run("a", work)
    assert work.num_starts == 2


async def test_keys_are_apart() -> None:
    single_flight: SingleFlight[str] = SingleFlight()
    one, other = Work(), Work()
    one.go.set()
    other.go.set()
    await asyncio.gather(single_flight.run("a", one), single_flight.run("b", other))
    assert (one.num_starts, other.num_starts) == (1, 1)


async def test_one_who_leaves_does_not_disturb_the_others() -> None:
    single_flight: SingleFlight[str] = SingleFlight()
    work = Work()
    tasks = [asyncio.create_task(single_flight.run("a", work)) for _ in range(3)]
    await work.started.wait()
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    tasks.append(asyncio.create_task(single_flight.run("a", work)))
    await asyncio.sleep(0)
    work.go.set()
    assert await asyncio.gather(*tasks[1:]) == ["done"] * 3
    assert (work.num_starts, work.num_cancelled) == (1, 0)


async def test_the_last_who_leaves_cancels_the_work() -> None:
    single_flight: SingleFlight[str] = SingleFlight()
    work = Work()
    tasks = [asyncio.create_task(single_flight.run("a", work)) for _ in range(2)]
    await work.started.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    again = Work()
    again.go.set()
    assert await single_flight.run("a", again) == "done"  # and does not join the cancelled work
    assert work.num_cancelled == 1
    assert again.num_starts == 1
    assert single_flight.num_running == 0


async def test_nobody_joins_work_that_is_being_cancelled() -> None:
    single_flight: SingleFlight[str] = SingleFlight()
    started, cleaned = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await cleaned.wait()
        return "never"

    task = asyncio.create_task(single_flight.run("a", slow_to_end))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    again = Work()
    again.go.set()
    assert await single_flight.run("a", again) == "done"
    cleaned.set()


async def test_a_failure_reaches_everyone_and_is_not_remembered() -> None:
    single_flight: SingleFlight[str] = SingleFlight()
    work = Work(ValueError("no"))
    tasks = [asyncio.create_task(single_flight.run("a", work)) for _ in range(3)]
    await work.started.wait()
    work.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, ValueError) for error in found)
    work.error = None
    assert await single_flight.run("a", work) == "done"


def test_loops_do_not_share_work() -> None:
    single_flight: SingleFlight[str] = SingleFlight()

    async def run() -> str:
        work = Work()
        work.go.set()
        return await single_flight.run("a", work)

    assert asyncio.run(run()) == asyncio.run(run()) == "done"
    assert single_flight.num_running == 0
