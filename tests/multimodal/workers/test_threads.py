import asyncio
import threading

import pytest

from sensorium.multimodal.workers.threads import (
    MAX_DEFAULT_WORKERS,
    ThreadWorkers,
    default_num_workers,
)


async def test_work_runs_elsewhere_and_failures_come_back() -> None:
    workers = ThreadWorkers(2)
    assert await workers.run(threading.get_ident) != threading.get_ident()
    assert await workers.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 7, 0)
    workers.close()


async def test_work_that_has_not_begun_can_be_cancelled() -> None:
    workers = ThreadWorkers(1)
    gate, ran = threading.Event(), []
    first = asyncio.create_task(workers.run(gate.wait, 60))
    second = asyncio.create_task(workers.run(ran.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    assert await first
    workers.close()
    assert ran == []


def test_number_of_workers() -> None:
    assert 1 <= default_num_workers() <= MAX_DEFAULT_WORKERS
    assert ThreadWorkers(None).num_workers == default_num_workers()
    assert ThreadWorkers(3).num_workers == 3
