"""The event loop for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sensorium.multimodal.workers.background import BackgroundLoop


def test_results_and_errors_come_back() -> None:
    async def double(value: int) -> int:
        return 2 * value

    async def fail() -> None:
        raise ValueError("no")

    loop = BackgroundLoop()
    assert loop.submit(double(4)).result(10) == 8
    with pytest.raises(ValueError, match="no"):
        loop.submit(fail()).result(10)
    loop.close()


def test_closing_cancels_what_runs_and_ends_the_thread() -> None:
    started, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    loop = BackgroundLoop()
    future = loop.submit(wait())
    assert started.wait(10)
    loop.close()
    assert ended.is_set()
    assert future.cancelled()
    loop.close()
