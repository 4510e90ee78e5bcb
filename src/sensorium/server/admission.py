"""Admission control: past the limit of waiting requests, a new one is refused at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sensorium.errors import EngineDeadError, InvalidRequestError, OverloadedError

_LONGEST_RETRY = 60
_SHUTTING_DOWN = "The server is shutting down; send the request to another one."


class Arrivals:
    """The requests whose bodies are being read, and the end of all admission.

    ``draining``: set when the server shuts down; from then on no request is admitted.
    """

    def __init__(self) -> None:
        self.draining = False
        self._arriving: set[asyncio.Task[Any]] = set()

    def drain(self) -> None:
        """Admit no more requests, and stop reading bodies, whose requests would be refused."""
        self.draining = True
        for task in self._arriving:
            task.cancel()

    def check(self) -> None:
        """Raise EngineDeadError while the server shuts down."""
        if self.draining:
            raise EngineDeadError(_SHUTTING_DOWN)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Mark the task within the block as one that reads a body, or waits for its model.

        Raises EngineDeadError when the server shuts down before or while it does.
        """
        task = asyncio.current_task()
        if self.draining or task is None:
            raise EngineDeadError(_SHUTTING_DOWN)
        self._arriving.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.draining:
                raise
            task.uncancel()
            raise EngineDeadError(_SHUTTING_DOWN) from None
        finally:
            self._arriving.discard(task)


class Admission:
    """Counter of a model's samples that wait for their first token: a prompt with ``n=8`` counts 8.

    ``max_waiting``: the most at a time. ``arrivals``: those of the server; they say when it ends.
    """

    def __init__(self, max_waiting: int, arrivals: Arrivals | None = None) -> None:
        self.max_waiting = max_waiting
        self.num_waiting = 0
        self._arrivals = arrivals or Arrivals()
        self._usual_wait = 0.0

    @contextmanager
    def enter(
        self, count: int, param: str = "prompt", *, num_samples: int = 1
    ) -> Iterator[list[Place]]:
        """Give places to all ``count`` prompts of the field ``param``, or to none.

        The places are given back at the end of the block at the latest. Raises OverloadedError when
        there is no room now, InvalidRequestError when there never will be, and EngineDeadError
        while the server shuts down.
        """
        self._arrivals.check()
        if count > self.max_waiting:
            raise InvalidRequestError(
                f"{param} has {count} entries; this server takes at most {self.max_waiting} in one "
                "request (--max-num-waiting).",
                param=param,
            )
        if count * num_samples > self.max_waiting:
            each = "" if count == 1 else f" for each of {count} prompts"
            raise InvalidRequestError(
                f"n is {num_samples}{each}; this server takes at most {self.max_waiting} samples "
                "in one request (--max-num-waiting).",
                param="n",
            )
        if self.num_waiting + count * num_samples > self.max_waiting:
            raise self._overloaded()
        places = [Place(self, num_samples) for _ in range(count)]
        self.num_waiting += count * num_samples
        try:
            yield places
        finally:
            for place in places:
                place.leave(served=False)

    def left(self, count: int, waited: float | None) -> None:
        """Count ``count`` samples less.

        ``waited``: seconds until their first token; None when the request ended before.
        """
        self.num_waiting -= count
        if waited is not None:
            self._usual_wait += 0.1 * (waited - self._usual_wait)

    def _overloaded(self) -> OverloadedError:
        error = OverloadedError(
            f"{self.num_waiting} requests are waiting; at most {self.max_waiting} may "
            "(--max-num-waiting). Try again later."
        )
        error.retry_after = min(_LONGEST_RETRY, max(1, round(self._usual_wait)))
        return error


class Place:
    """One prompt's place among those that wait; ``num_held`` of its samples still wait."""

    def __init__(self, admission: Admission, num_samples: int = 1) -> None:
        self.num_held = num_samples
        self._admission = admission
        self._since = time.monotonic()

    def keep(self, count: int) -> None:
        """Reduce the samples that wait to ``count``: the others have their first token."""
        if count < self.num_held:
            num_left, self.num_held = self.num_held - count, count
            self._admission.left(num_left, time.monotonic() - self._since)

    def leave(self, *, served: bool = True) -> None:
        """Give the place back. A second call does nothing."""
        if self.num_held:
            num_left, self.num_held = self.num_held, 0
            self._admission.left(num_left, time.monotonic() - self._since if served else None)
