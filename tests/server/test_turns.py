"""Turns: one in each iteration of the loop, in the order of asking."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from sensorium.server.turns import Turns


class Iterations:
    """Counts the iterations of the running loop."""

    def __init__(self) -> None:
        self.number = 0
        self._handle = asyncio.get_running_loop().call_soon(self._count)

    def _count(self) -> None:
        self.number += 1
        self._handle = asyncio.get_running_loop().call_soon(self._count)

    def stop(self) -> None:
        """Count no more."""
        self._handle.cancel()


@contextlib.contextmanager
def counted() -> Iterator[Iterations]:
    """A counter for the block."""
    iterations = Iterations()
    try:
        yield iterations
    finally:
        iterations.stop()


async def test_each_gets_an_iteration_of_its_own_in_order() -> None:
    turns, asked, taken = Turns(), list[int](), list[tuple[int, int]]()
    with counted() as iterations:

        async def work(name: int) -> None:
            for _ in range(3):
                asked.append(name)
                await turns.next()
                taken.append((iterations.number, name))

        await asyncio.gather(*(work(name) for name in range(5)))
    assert [name for _, name in taken] == asked
    numbers = [number for number, _ in taken]
    assert len(set(numbers)) == 15
    assert numbers[-1] - numbers[1] == 13  # and no iteration passes in which nobody works


async def test_who_is_alone_does_not_wait() -> None:
    turns = Turns()
    with counted() as iterations:
        for _ in range(3):
            before = iterations.number
            await turns.next()
            assert iterations.number == before
            await asyncio.sleep(0)
            await asyncio.sleep(0)


async def test_who_leaves_costs_nobody_a_turn() -> None:
    turns, taken = Turns(), list[int]()

    async def work(name: int) -> None:
        await turns.next()
        taken.append(name)

    tasks = [asyncio.create_task(work(name)) for name in range(6)]
    await asyncio.sleep(0)
    for name in (1, 2, 5):
        tasks[name].cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert taken == [0, 3, 4]
    await asyncio.wait_for(work(7), 60)
    assert taken[-1] == 7


async def test_a_turn_that_was_given_to_one_who_left_is_followed_by_the_next() -> None:
    turns, taken = Turns(), list[int]()

    async def work(name: int) -> None:
        await turns.next()
        taken.append(name)

    tasks = [asyncio.create_task(work(name)) for name in range(3)]
    await asyncio.sleep(0)  # the first works, the others wait
    await asyncio.sleep(0)  # the second has been given its turn
    tasks[1].cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert taken == [0, 2]
