import asyncio
import threading

import pytest

from sensorium.multimodal.workers.event_loop import LoopThread


async def where() -> str:
    return threading.current_thread().name


async def fail() -> None:
    raise TimeoutError("late")


async def test_work_runs_in_the_thread_and_failures_come_back() -> None:
    thread = LoopThread("other")
    assert [await thread.run(where()) for _ in range(3)] == ["sensorium-other"] * 3
    with pytest.raises(TimeoutError, match="late"):
        await thread.run(fail())
    thread.close()
    thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        await thread.run(where())
    assert "sensorium-other" not in [t.name for t in threading.enumerate()]


async def test_a_caller_who_is_cancelled_cancels_the_work() -> None:
    thread = LoopThread("other")
    started, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    task = asyncio.create_task(thread.run(work()))
    while not started.is_set():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await asyncio.to_thread(cancelled.wait, 60)
    thread.close()


async def test_closing_ends_what_runs() -> None:
    thread = LoopThread("other")
    started, ended = threading.Event(), []

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    task = asyncio.create_task(thread.run(work()))
    while not started.is_set():
        await asyncio.sleep(0)
    thread.close()
    assert ended == [True]
    with pytest.raises(asyncio.CancelledError):
        await task


def test_results_and_errors_come_back() -> None:
    async def double(value: int) -> int:
        return 2 * value

    async def fail() -> None:
        raise ValueError("no")

    loop = LoopThread("other")
    assert loop.submit(double(4)).result(60) == 8
    with pytest.raises(ValueError, match="no"):
        loop.submit(fail()).result(60)
    loop.close()


def test_closing_cancels_what_runs_and_ends_the_thread() -> None:
    started, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    loop = LoopThread("other")
    future = loop.submit(wait())
    assert started.wait(60)
    loop.close()
    assert ended.is_set()
    assert future.cancelled()
    loop.close()
