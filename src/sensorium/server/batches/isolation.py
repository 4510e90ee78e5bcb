"""Finds the request that ends its engine among those that run at the same time.

Whatever runs when an engine ends is suspected. Each suspect runs again with no other of this
program beside it: what ends the engine again and again has failed, and the others get their
answers. Requests of others may run beside a suspect; only an engine knows, and says in the error.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from sensorium.errors import ENDED, ENDED_ALONE, UnavailableError
from sensorium.server.batches.calls import Caller, Reply

MOST_ALONE = 2
"""Times that an engine may end while it runs a request and nothing else."""
MOST_BESIDE = 6
"""Times that it may end while it runs a request beside those of others, or may do so."""
PATIENCE = 600.0
"""Seconds for which a request is tried again while its engine is being replaced."""
LATER = frozenset({429, 502, 503})
"""Statuses that say nothing about a request: with one of them it is not answered."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0
KILLER = "engine_ended"
"""Code of the error of a request that ended its engine."""
_ALONE = f"The engine ended each of the {MOST_ALONE} times that it ran this request alone."
_BESIDE = (
    f"The engine ended each of the {MOST_BESIDE} times that it ran this request. Requests of "
    "others may have run beside it each time, one of which may be the cause: run it again on an "
    "engine that nobody else uses."
)
_UNAVAILABLE = 503

_Result = TypeVar("_Result")


@dataclass(slots=True)
class Deaths:
    """Ends of an engine while it ran one request: ``alone``, or ``beside`` those of others.

    The first one beside others is not counted: that is how a request becomes a suspect.
    """

    alone: int = 0
    beside: int = 0
    is_suspect: bool = False

    def note(self, message: str) -> None:
        """Count an end of the engine where the message of an error tells of one."""
        if ENDED_ALONE in message:
            self.alone += 1
        elif ENDED in message:
            self.beside += self.is_suspect
        else:
            return
        self.is_suspect = True

    @property
    def verdict(self) -> str | None:
        """Return the message of the error of a request that has failed; None for now."""
        if self.alone >= MOST_ALONE:
            return _ALONE
        return _BESIDE if self.beside >= MOST_BESIDE else None


class Gate:
    """Lets requests through beside each other, or one alone. Belongs to one event loop.

    Shared by all whose requests one engine runs.
    """

    def __init__(self) -> None:
        self._num_beside = 0
        self._num_alone = 0
        """Those that run or wait to run alone; at most one of them runs."""
        self._is_alone = False
        self._waiters: list[asyncio.Future[None]] = []

    def turn(self, deaths: Deaths) -> AbstractAsyncContextManager[None]:
        """Run a request beside others, or a suspect alone."""
        return self.alone() if deaths.is_suspect else self.beside()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Run beside others, once none runs or waits to run alone."""
        await self._until(lambda: self._num_alone == 0)
        self._num_beside += 1
        try:
            yield
        finally:
            self._num_beside -= 1
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Run alone, once those that run have ended."""
        self._num_alone += 1
        try:
            await self._until(lambda: self._num_beside == 0 and not self._is_alone)
            self._is_alone = True
            try:
                yield
            finally:
                self._is_alone = False
        finally:
            self._num_alone -= 1
            self._wake()

    async def _until(self, is_free: Callable[[], bool]) -> None:
        while not is_free():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


async def in_turn(caller: Caller, gate: Gate, deaths: Deaths, url: str, body: bytes) -> Reply:
    """Return the answer to one attempt of a request, whose ``deaths`` are counted.

    A final error in its place where the request has ended its engine too often. Raises as
    ``Caller.call``.
    """
    async with gate.turn(deaths):
        reply = await caller.call(url, body)
    if reply.status == _UNAVAILABLE:
        deaths.note(reply.body.decode(errors="replace"))
        if deaths.verdict is not None:
            return error_reply(KILLER, deaths.verdict)
    return reply


def error_reply(code: str, message: str) -> Reply:
    """Return the final answer to a request that could not be run, in the form of a server's."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return Reply(500, "", msgspec.json.encode({"error": error}), is_final=True)


class Patience:
    """Repeats requests while their engine is being replaced. Shared by those of one engine.

    Used on one event loop. A request that waits for its turn loses no patience while the engine
    answers others, or ends while it runs them: it was there.
    """

    def __init__(
        self, seconds: float = PATIENCE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._seen_at = float("-inf")

    async def repeat(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result | None:
        """Return what an attempt gives, repeated while it is refused for now.

        None when the engine has been away for too long.
        """
        began, wait = self._clock(), FIRST_WAIT
        while True:
            asked: float | None = None
            try:
                result = await attempt()
            except UnavailableError as error:
                asked, message = error.retry_after, error.message
            else:
                if not isinstance(result, Reply) or result.status not in LATER or result.is_final:
                    self._seen_at = self._clock()
                    return result
                asked, message = result.retry_after, result.body.decode(errors="replace")
            if ENDED in message:
                self._seen_at = self._clock()
            if self._clock() - max(began, self._seen_at) >= self._seconds:
                return None
            pause = wait * random.uniform(1.0, 1.5)
            await asyncio.sleep(max(pause, min(asked or 0.0, LONGEST_WAIT)))
            wait = min(2 * wait, LONGEST_WAIT)
