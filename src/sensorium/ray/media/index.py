"""Index of what processes of an application have put into Ray's object store, and its use.

One small deployment knows the references by key, within a budget of bytes. A process asks when it
lacks something, and offers what it has made. Where anything of this fails or is late, the process
goes on as if nothing had been found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import ray

from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

FIND_SECONDS = 0.5
"""Most time that a request waits for the index."""
BACK_OFF_SECONDS = 5.0
"""Time for which a process does not ask after the index failed or was late; a late object has no
effect on what is asked next."""
MOST_ENTRIES = 1 << 16
"""References that an index keeps, however small their objects are."""
MOST_OFFERS, MOST_OFFER_BYTES = 256, 256 << 20
"""Offers that a process makes at a time, and their bytes; further ones are dropped."""
MOST_OFFERED = 1 << 14
"""Keys that a process remembers to have offered."""


@dataclass(frozen=True, slots=True)
class SharedRef:
    """Reference to an object of ``num_bytes``.

    ``about``: small facts that are not part of it. ``node``: id of the machine in whose store it
    is; empty where that does not matter.
    """

    data: ray.ObjectRef
    num_bytes: int
    about: Any = None
    node: str = ""


def own_node() -> str:
    """Return the id of the machine of this process, in whose store lies what it puts there."""
    return str(ray.get_runtime_context().get_node_id())


class SharedIndex:
    """Deployment that knows which objects there are. ``most_bytes``: of all of them together.

    Those that were asked for longest ago go first. Ray frees what it refers to no more. The methods
    are coroutines so that they run one at a time on one loop: others get a thread each from Ray
    Serve.
    """

    def __init__(self, most_bytes: int, most_entries: int = MOST_ENTRIES) -> None:
        self._most_bytes, self._most_entries = most_bytes, most_entries
        self._known: OrderedDict[bytes, SharedRef] = OrderedDict()
        self._num_bytes: Counter[str] = Counter()
        """By the machine where they are."""

    async def find(self, key: bytes) -> SharedRef | None:
        """Return the reference under a key, None where there is none."""
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found

    async def keep(self, key: bytes, reference: SharedRef) -> None:
        """Keep a reference in place of the one before, and give up others where it is too much."""
        self._drop(key)
        node, most_there = reference.node, self.most_bytes_on(reference.node)
        if reference.num_bytes > min(self._most_bytes, most_there):
            return
        self._known[key] = reference
        self._num_bytes[node] += reference.num_bytes
        while self._num_bytes[node] > most_there:
            self._drop(next(key for key, known in self._known.items() if known.node == node))
        while self._num_bytes.total() > self._most_bytes or len(self._known) > self._most_entries:
            self._drop(next(iter(self._known)))

    async def forget(self, key: bytes, reference: SharedRef) -> None:
        """Give up an object that cannot be used; one that was kept in its place since stays."""
        found = self._known.get(key)
        if found is not None and found.data == reference.data:
            self._drop(key)

    async def stats(self) -> tuple[int, int]:
        """Return the number of objects and their bytes."""
        return len(self._known), self._num_bytes.total()

    def most_bytes_on(self, node: str) -> float:
        """Return the bytes that objects on one machine may take; here as many as there are."""
        return math.inf

    def _drop(self, key: bytes) -> None:
        gone = self._known.pop(key, None)
        if gone is not None:
            self._num_bytes[gone.node] -= gone.num_bytes


class IndexClient:
    """An index as one process uses it. All methods are called on one event loop.

    Args:
        index: Handle of the deployment.
        what: Name of the objects in the log.
        data_seconds: Most time that a request waits for an object that the index knows.
        again_seconds: Time after which an object may be offered again, as the process that put it
            into the store, or the index, may have gone; never by default.
    """

    def __init__(
        self, index: Any, what: str, data_seconds: float, again_seconds: float = math.inf
    ) -> None:
        self._index = index
        self._what = what
        self._data_seconds = data_seconds
        self._offers: dict[bytes, asyncio.Task[None]] = {}
        self._offer_bytes = 0
        self._again_seconds = again_seconds
        self._offered: OrderedDict[bytes, float] = OrderedDict()
        """Times until which objects are not offered again."""
        self._has_failed = False
        self._silent_until = 0.0
        self.num_found = self.num_offered = 0

    async def find(
        self, key: bytes, is_sound: Callable[[SharedRef, Any], bool]
    ) -> tuple[SharedRef, Any] | None:
        """Return a reference and its object; None where there is none, or it is late.

        What is not sound is given up. After a failure or a delay of the index the answer is None at
        once for ``BACK_OFF_SECONDS``.
        """
        if time.monotonic() < self._silent_until:
            return None
        # A context of its own: Ray Serve would cancel the call with the request that came first.
        found = await own_task(self._find(key, is_sound))
        self.num_found += found is not None
        return found

    async def _find(
        self, key: bytes, is_sound: Callable[[SharedRef, Any], bool]
    ) -> tuple[SharedRef, Any] | None:
        try:
            async with asyncio.timeout(FIND_SECONDS):
                found: SharedRef | None = await self._index.find.remote(key)
        except Exception as error:  # Ray Serve's are no RayError; the process can do without.
            if time.monotonic() >= self._silent_until:
                logger.info("%s cannot be had: %s", self._what, type(error).__name__)
            self._silent_until = time.monotonic() + BACK_OFF_SECONDS
            return None
        if found is None:
            self._offered.pop(key, None)  # it may be offered again
            return None
        try:
            async with asyncio.timeout(self._data_seconds):
                data = await found.data
        except TimeoutError:
            return None  # on its way from another machine, or from the disk
        except Exception:  # The process that had put it there has gone, most likely.
            self._forget(key, found)
            return None
        if is_sound(found, data):
            return found, data
        logger.warning("%s: what was kept is not what it should be", self._what)
        self._forget(key, found)
        return None

    def _forget(self, key: bytes, reference: SharedRef) -> None:
        """Have the index give up an object; nobody waits for it, and nothing is raised."""
        self._offered.pop(key, None)
        with contextlib.suppress(Exception):
            self._index.forget.remote(key, reference)

    def offer(
        self,
        key: bytes,
        num_bytes: int,
        make: Callable[[], Coroutine[Any, Any, SharedRef | None]],
    ) -> None:
        """Offer what ``make`` returns: a reference, or None where it cannot be had any more.

        What was offered before, or is on its way, is not offered again while that is remembered.
        ``num_bytes``: about what the object has.
        """
        if self._offered.get(key, 0.0) > time.monotonic() or key in self._offers:
            return
        if len(self._offers) >= MOST_OFFERS:
            return
        if self._offers and self._offer_bytes + num_bytes > MOST_OFFER_BYTES:
            return
        self._offer_bytes += num_bytes
        task = self._offers[key] = own_task(self._offer(key, make))

        def ended(_: asyncio.Task[None]) -> None:
            del self._offers[key]
            self._offer_bytes -= num_bytes

        task.add_done_callback(ended)

    async def settled(self) -> None:
        """Wait until the offers under way have been made."""
        await asyncio.gather(*self._offers.values())

    async def _offer(
        self, key: bytes, make: Callable[[], Coroutine[Any, Any, SharedRef | None]]
    ) -> None:
        try:
            reference = await make()
            if reference is None:
                return
            await self._index.keep.remote(key, reference)
        except Exception as error:  # Whatever it is, the process itself has what it needs.
            self._note_failure(error)
            return
        self._has_failed = False
        self.num_offered += 1
        self._offered[key] = time.monotonic() + self._again_seconds
        if len(self._offered) > MOST_OFFERED:
            self._offered.popitem(last=False)

    def _note_failure(self, error: Exception) -> None:
        """Log the first of several failures in a row."""
        if not self._has_failed:
            logger.info("%s are not shared: %s", self._what, type(error).__name__, exc_info=error)
        self._has_failed = True
