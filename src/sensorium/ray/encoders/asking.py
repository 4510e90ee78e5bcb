"""Questions to encoders, and what is done when they end meanwhile.

An item may be what ends an encoder, and would then end an engine as well. So an item that some
encoder had when it ended is tried once more, by another encoder, and never goes to an engine before
an encoder has survived it. Others of the same queue are tried again in the same way: one after the
other, so that the next death is that of the one that is tried.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)

from sensorium.errors import EncoderEndedError, OverloadedError, UnavailableError
from sensorium.ray.encoders.fleet import EncoderFleet, encoders_of, forget_taken, is_taken
from sensorium.ray.encoders.messages import Answer, Ask
from sensorium.ray.media.features import FeaturesRef
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Interval at which an item that waits looks if there still are encoders."""
DOWN_SECONDS = 3.0
"""Time without any encoder after which engines encode by themselves."""
OTHER_SECONDS = 60.0
"""The same for an item that may have ended an encoder: it waits for another one, then fails."""
MOST_DEATHS = 2
"""Encoders that an item may end."""
REMEMBERED_SECONDS = 600.0
"""Time for which deaths are remembered, so that the retries of clients end no more encoders."""
MOST_REMEMBERED = 1 << 12
"""Items whose deaths are remembered."""
RETRY_SECONDS = 2.0
"""Time after which a client may try again when too many items wait."""

_numbers = itertools.count()


class DownError(Exception):
    """There is no encoder."""


class Deaths:
    """Encoders that ended while they had an item, by the item's key. ``clock``: in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def number(self, key: bytes) -> int:
        """Return how many encoders have ended lately while they had an item."""
        number, at = self._known.get(key, (0, 0.0))
        return number if self._clock() - at < REMEMBERED_SECONDS else 0

    def add(self, key: bytes) -> None:
        """Count another one."""
        self._known[key] = self.number(key) + 1, self._clock()
        self._known.move_to_end(key)
        if len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """Forget those of an item that an encoder has survived."""
        self._known.pop(key, None)


class Asking:
    """Encoders behind a handle of Ray Serve, asked for one item at a time. Used on one event loop.

    ``num_refused``: items that were refused because encoders ended with them.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._deaths = Deaths()
        self._alone = asyncio.Lock()
        self.num_refused = 0

    def fleet(self) -> EncoderFleet:
        """Return what is known of the encoders."""
        found = encoders_of(self._handle.app_name, self._handle.deployment_name)
        return EncoderFleet({}) if found is None else found

    def is_suspect(self, key: bytes) -> bool:
        """Return True for an item with which an encoder ended, and none has survived it since."""
        return self._deaths.number(key) > 0

    async def ask(self, key: bytes, reference: FeaturesRef) -> Answer | None:
        """Return what an encoder makes of an item; None where the call fails and encoders live.

        Raises DownError when there are no encoders, and UnavailableError: too many items wait, the
        item has ended encoders, or it has ended one and there is no other.
        """
        while True:
            is_suspect = self.is_suspect(key)
            if self._deaths.number(key) >= MOST_DEATHS:
                self.num_refused += 1
                raise _ended(reference.item.modality)
            try:
                answer = await self._tried(key, reference, alone=is_suspect)
            except BackPressureError:
                raise overloaded() from None
            except RayActorError as error:
                self._deaths.add(key)
                logger.warning("an encoder ended with an item: %s", type(error).__name__)
                continue
            except (DownError, DeploymentUnavailableError):
                if is_suspect:
                    raise _no_other() from None
                raise DownError from None
            except (RayError, RayServeException) as error:
                logger.warning("an encoder could not be asked: %s", type(error).__name__)
                if is_suspect:
                    raise _no_other() from None
                return None
            self._deaths.forget(key)
            return answer

    async def _tried(self, key: bytes, reference: FeaturesRef, *, alone: bool) -> Answer:
        # Ray Serve takes calls of one context that wait at a time for one.
        if not alone:
            return await own_task(self._attempt(key, reference, DOWN_SECONDS))
        async with self._alone:
            return await own_task(self._attempt(key, reference, OTHER_SECONDS))

    async def _attempt(self, key: bytes, reference: FeaturesRef, patience: float) -> Answer:
        """Wait for an answer as long as an encoder has the item or may take it."""
        if self.fleet().is_down(patience, time.monotonic()):
            raise DownError
        number = next(_numbers)
        response = self._handle.encode.remote(Ask(key, number), reference)
        answer = asyncio.ensure_future(_awaited(response))
        try:
            while not answer.done():
                await asyncio.wait((answer,), timeout=LOOK_SECONDS)
                # One that was taken ends with its encoder.
                if answer.done() or is_taken(number):
                    continue
                if self.fleet().is_down(patience, time.monotonic()):
                    raise DownError
            return answer.result()
        finally:
            forget_taken(number)
            if not answer.done():
                # Ray Serve ends it with an error of its own, which nobody waits for.
                answer.add_done_callback(lambda task: task.cancelled() or task.exception())
                response.cancel()
                answer.cancel()


async def _awaited(response: Any) -> Answer:
    answer: Answer = await response
    return answer


def overloaded() -> OverloadedError:
    """Return the error of an item for which there is no room."""
    error = OverloadedError("Too many media wait for an encoder. Try again later.")
    error.retry_after = int(RETRY_SECONDS)
    return error


def _ended(modality: str) -> EncoderEndedError:
    error = EncoderEndedError(
        f"This {modality} has ended {MOST_DEATHS} encoders that had it, so it is refused for "
        f"{REMEMBERED_SECONDS / 60:g} minutes. Send a smaller or another one; the server's log "
        "says how the encoders ended."
    )
    error.retry_after = int(REMEMBERED_SECONDS)
    return error


def _no_other() -> UnavailableError:
    error = UnavailableError(
        "The encoder ended that had an item of this request, and there is no other one to try it. "
        "Try again later."
    )
    error.retry_after = int(OTHER_SECONDS)
    return error
