"""Turns for work that blocks the event loop, so that it handles sockets and timers in between."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Queue that lets one waiter run in each iteration of the event loop, in the order of asking.

    An iteration runs everything that is ready before it looks at timers and sockets again. Work of
    a fraction of a millisecond for one request would block the loop for long when thirty requests
    are ready at once. Belongs to one event loop. A turn ends with its iteration.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False

    async def next(self) -> None:
        """Wait for an iteration of its own. Cancelling a waiter does not delay the others."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._pass_on, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the next waiter, which runs in the next iteration. Called once in each."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._pass_on, loop)
                return
        self._taken = False
