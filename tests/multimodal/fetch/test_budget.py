import asyncio
import threading

import pytest

from sensorium.errors import MediaTooLargeError, OverloadedError
from sensorium.multimodal.fetch.budget import ByteBudget, DownloadProgress, RequestBytes

A, B = b"a" * 32, b"b" * 32


def test_what_many_hold_counts_once() -> None:
    budget = ByteBudget(100)
    for _ in range(3):
        budget.hold(A, 60)
    assert budget.num_bytes == 60
    with pytest.raises(OverloadedError, match="--max-media-bytes-in-flight"):
        budget.hold(B, 41)
    budget.hold(B, 40)
    for left in (100, 100, 40):
        budget.release(A)
        assert budget.num_bytes == left
    budget.release(B)
    assert budget.num_bytes == 0


def test_shares_and_contents_have_one_limit() -> None:
    budget = ByteBudget(100)
    seen: list[int] = []
    with budget.share(seen.append) as share:
        share.change(70)
        with pytest.raises(OverloadedError):
            budget.hold(A, 31)
        budget.hold(A, 30)
        with pytest.raises(OverloadedError):
            share.change(1)
        share.change(-20)
        share.reset()
        share.change(5)
        assert budget.num_bytes == 35
    assert budget.num_bytes == 30
    assert seen == [70, 71, 70, 50, 0, 5, 0], "told before it is refused"


def test_a_share_that_has_ended_takes_nothing_more() -> None:
    """A thread may still be unpacking for a download that was given up."""
    budget = ByteBudget(100)
    with budget.share() as share:
        share.change(10)
    for change in (1, -1):
        with pytest.raises(OverloadedError):
            share.change(change)
    assert budget.num_bytes == 0


def test_threads_lose_no_bytes() -> None:
    budget = ByteBudget(1 << 40)

    def work() -> None:
        for _ in range(2000):
            budget.hold(A, 7)
            with budget.share() as share:
                share.change(3)
            budget.release(A)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.num_bytes == 0


async def test_a_request_is_told_while_it_waits() -> None:
    """The bytes of both downloads count, and come in another thread."""
    request = RequestBytes(100)
    request.add(10)
    downloads = [DownloadProgress(), DownloadProgress()]

    async def wait(download: DownloadProgress) -> None:
        async with request.waiting(download):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(wait(download)) for download in downloads]
    await asyncio.sleep(0)
    await asyncio.to_thread(downloads[0].update, 50)
    await asyncio.to_thread(downloads[1].update, 40)
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    await asyncio.to_thread(downloads[1].update, 41)
    with pytest.raises(MediaTooLargeError, match="more than 100 bytes together"):
        await tasks[1]
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert request.num_coming == 10
    for download in downloads:
        download.update(1000)  # no listener is left


async def test_a_request_that_joins_late_is_refused_at_once() -> None:
    download = DownloadProgress()
    download.update(11)
    with pytest.raises(MediaTooLargeError):
        async with RequestBytes(10).waiting(download):
            await asyncio.Event().wait()


async def test_what_counts_in_flight_has_a_limit_of_its_own() -> None:
    """It is told even where the budget of all refuses the same bytes first."""
    request, budget = RequestBytes(100, 10), ByteBudget(10)
    request.add(50)
    request.add_in_flight(5)
    budget.change(5)
    download = DownloadProgress()
    with pytest.raises(MediaTooLargeError, match=r"more than 10 bytes.*in-flight"):
        async with request.waiting(download):
            with budget.share(download.update) as share:
                share.change(5)
                share.change(1)
    assert (budget.num_bytes, download.num_bytes, request.num_coming) == (5, 0, 50)
    with pytest.raises(MediaTooLargeError):
        request.add_in_flight(6)


async def test_two_that_wait_for_one_download_count_it_once() -> None:
    request, download = RequestBytes(10), DownloadProgress()
    async with request.waiting(download), request.waiting(download):
        download.update(10)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_other_timeouts_and_errors_pass() -> None:
    for error in (TimeoutError("mine"), OverloadedError("x")):
        with pytest.raises(type(error)) as caught:
            async with RequestBytes(10).waiting(DownloadProgress()):
                raise error
        assert caught.value is error
