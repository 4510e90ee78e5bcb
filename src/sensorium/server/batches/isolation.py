"""Finds the request that ends its engine among those that run at the same time.

Whatever runs when an engine ends is suspected. Each suspect runs again with no other beside it:
what ends the engine alone, again and again, has failed, and the others get their answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
from blake3 import blake3

from sensorium.errors import ENDED, UnavailableError
from sensorium.server.batches.calls import Caller, Reply

MOST_ALONE = 2
"""Times that a request may end its engine while it runs alone."""
PATIENCE = 600.0
"""Seconds for which a request is tried again while its engine is being replaced."""
LATER = frozenset({429, 502, 503})
"""Statuses that say nothing about a request: with one of them it is not answered."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0
KILLER = "engine_ended"
"""Code of the error of a request that ended its engine."""
KILLER_MESSAGE = f"The engine ended each of the {MOST_ALONE} times that it ran this request alone."
_UNAVAILABLE = 503

_Result = TypeVar("_Result")


class EngineEndedError(Exception):
    """An engine ended while it ran a request."""


class Gate:
    """Lets requests through beside each other, or one alone. Belongs to one event loop."""

    def __init__(self) -> None:
        self._num_beside = 0
        self._num_alone = 0
        """Those that run or wait to run alone; at most one of them runs."""
        self._is_alone = False
        self._waiters: list[asyncio.Future[None]] = []

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


class Isolation:
    """Runs requests beside each other, and the suspects alone. Belongs to one event loop."""

    def __init__(self) -> None:
        self._gate = Gate()
        self._is_away = False
        """True once a suspect has waited for the engine in vain: the next ones ask it once.

        Not any more when the engine answers, or ends while it runs something.
        """

    async def run(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return what an attempt gives, which raises EngineEndedError when its engine ended.

        Raises EngineEndedError for a request that ended its engine alone ``MOST_ALONE`` times,
        UnavailableError when the engine was away for too long, and what ``attempt`` raises else.
        """
        try:
            async with self._gate.beside():
                answered = await attempt()
            self._is_away = False
            return answered
        except EngineEndedError:
            self._is_away = False
        async with self._gate.alone():
            for number in range(MOST_ALONE):
                try:
                    result = await patiently(attempt, 0.0 if self._is_away else PATIENCE)
                except EngineEndedError:
                    self._is_away = False
                    if number == MOST_ALONE - 1:
                        raise
                    continue
                self._is_away = result is None
                if result is None:
                    raise UnavailableError("The engine was away for too long.")
                return result
        raise AssertionError


class IsolatingCaller:
    """``Caller`` whose requests that end an engine get an error of their own, which is final.

    A suspect that is refused for now, or ends its engine, is refused with 503 until it is called
    again: who calls decides how long that goes on. ``gate``: shared by callers of one engine, whose
    requests run beside each other.
    """

    def __init__(self, caller: Caller, gate: Gate | None = None) -> None:
        self._caller = caller
        self._gate = gate or Gate()
        self._suspects: dict[bytes, int] = {}
        """Times that each suspect has ended its engine alone, by the digest of the request."""

    async def call(self, url: str, body: bytes) -> Reply:
        """See ``Caller.call``."""
        key = blake3(url.encode() + b"\0" + body).digest()
        if key not in self._suspects:
            async with self._gate.beside():
                reply = await self._caller.call(url, body)
            if _has_ended(reply):
                self._suspects[key] = 0
            return reply
        async with self._gate.alone():
            reply = await self._caller.call(url, body)
        if _has_ended(reply):
            self._suspects[key] = self._suspects.get(key, 0) + 1
            if self._suspects[key] < MOST_ALONE:
                return reply
            reply = error_reply(KILLER, KILLER_MESSAGE)
        if reply.status not in LATER:
            self._suspects.pop(key, None)
        return reply


def _has_ended(reply: Reply) -> bool:
    return reply.status == _UNAVAILABLE and ENDED.encode() in reply.body


def error_reply(code: str, message: str) -> Reply:
    """Return the final answer to a request that could not be run, in the form of a server's."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return Reply(500, "", msgspec.json.encode({"error": error}), is_final=True)


async def patiently(
    attempt: Callable[[], Awaitable[_Result]],
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
) -> _Result | None:
    """Return what an attempt gives, repeated while it is refused for now.

    None after ``patience`` seconds.
    """
    ends, wait = clock() + patience, FIRST_WAIT
    while True:
        asked: float | None = None
        try:
            result = await attempt()
            if not isinstance(result, Reply) or result.status not in LATER or result.is_final:
                return result
            asked = result.retry_after
        except UnavailableError as error:
            asked = error.retry_after
        if clock() >= ends:
            return None
        await asyncio.sleep(max(wait * random.uniform(1.0, 1.5), min(asked or 0.0, LONGEST_WAIT)))
        wait = min(2 * wait, LONGEST_WAIT)
