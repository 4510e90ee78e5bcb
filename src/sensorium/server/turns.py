"""Taking turns at work that holds the event loop, so that many requests at once hold it one after the other."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Gives one turn in each iteration of the event loop, in the order of asking.

    An iteration runs everything that is ready before timers and sockets are looked at again. What takes a fraction of
    a millisecond for one request holds the loop for long when thirty are ready at once, unless each waits for its turn.
    Of one event loop; a turn is not given back, it ends with the iteration.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False

    async def next(self) -> None:
        """Return in an iteration in which nobody else does. Who is cancelled while waiting loses nobody a turn."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._pass_on, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called once in each iteration while anyone waits: who is woken here runs in the next one."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._pass_on, loop)
                return
        self._taken = False
