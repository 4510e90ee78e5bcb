"""Encoders apart as a process for HTTP uses them: items out, references to embeddings back.

The features of an item that is seen for the first time go into Ray's object store and to one
encoder; the embeddings come back, and are put into the store by this process, so that they stay
there when the encoder dies. Engines take them in place of features.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from sensorium.engine.stats import EncoderStats
from sensorium.errors import OverloadedError
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.items import Features, MediaItem
from sensorium.ray.encoders.fleet import encoders_of
from sensorium.ray.media.features import FeaturesOut, FeaturesRef, put_features
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Interval at which an item that waits looks if there still are encoders."""
DOWN_SECONDS = 3.0
"""Time without any encoder after which engines encode by themselves."""
MOST_TRIES = 3
"""Encoders that an item is offered to when they die."""
RETRY_SECONDS = 2.0
"""Time after which a client may try again when too many items wait."""
WAITING_SHARE = 0.25
"""Share of the object store that items on their way to encoders may take, of all processes."""


class _Kept(NamedTuple):
    """Features without arrays, reference to these, and their bytes."""

    features: Features
    arrays: Any
    num_bytes: int


class DownError(Exception):
    """There is no encoder."""


class Encoders:
    """Encoders behind a handle of Ray Serve. Used on one event loop.

    ``most_kept``: bytes of the embeddings of the latest items, besides those of requests that run.
    ``most_waiting``: bytes of features on their way; one request alone may have more.
    """

    def __init__(
        self, handle: Any, features: FeaturesOut, *, most_kept: int, most_waiting: int
    ) -> None:
        self._handle = handle
        self._features = features
        self._most_kept, self._most_waiting = most_kept, most_waiting
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._waiting: dict[bytes, int] = {}
        """Bytes of the features of items that are on their way, by digest."""
        self._encoding: SingleFlight[_Kept | None] = SingleFlight()
        self._is_down = False

    def stats(self) -> Mapping[str, EncoderStats]:
        """Return what each replica reported last, by its id."""
        found = encoders_of(self._handle.app_name, self._handle.deployment_name) or {}
        return {name: stats for name, stats in found.items() if stats is not None}

    async def references(
        self, items: Sequence[MediaItem], wanted: Sequence[bytes]
    ) -> tuple[FeaturesRef, ...]:
        """Return references to the embeddings of items, which are encoded where nobody has them.

        ``wanted``: the digest of each item's embeddings. An item whose own digest is another one,
        as an adapter changes its encoder, stays as it is; so do those that are embeddings already,
        that cannot be encoded, and all while there are no encoders.

        Raises OverloadedError when too many items wait.
        """
        own = frozenset(wanted)
        work = [
            asyncio.create_task(self._reference(item, item.digest == digest, own))
            for item, digest in zip(items, wanted, strict=True)
        ]
        try:
            return tuple(await asyncio.gather(*work))
        finally:
            for task in work:
                task.cancel()

    async def _reference(
        self, item: MediaItem, is_plain: bool, own: frozenset[bytes]
    ) -> FeaturesRef:
        found = None
        if is_plain and not item.features.precomputed:
            found = self._find(item.digest)
            if found is None:
                found = await self._encoding.run(item.digest, lambda: self._encoded(item, own))
        if found is None:
            [reference] = await self._features.references([item])
            return reference
        return FeaturesRef(dataclasses.replace(item, features=found.features), found.arrays)

    async def _encoded(self, item: MediaItem, own: frozenset[bytes]) -> _Kept | None:
        """Have an item encoded; None where an engine has to do it.

        ``own``: digests of the items of the request that it came with.
        """
        if self._is_down and not self._is_any_up():
            return None
        size = item.features.num_bytes
        is_alone = self._waiting.keys() <= own
        if not is_alone and sum(self._waiting.values()) + size > self._most_waiting:
            raise _overloaded()
        self._waiting[item.digest] = size
        try:
            reference = await asyncio.to_thread(put_features, item)
            made = await self._asked(item.digest, reference)
        except DownError:
            if not self._is_down:
                logger.warning("no encoder is there: engines encode media themselves meanwhile")
            self._is_down = True
            return None
        finally:
            self._waiting.pop(item.digest, None)
        if self._is_down:
            self._is_down = False
            logger.info("encoders are there again")
        return None if made is None else await self._keep(item.digest, made)

    async def _asked(self, digest: bytes, reference: FeaturesRef) -> Features | None:
        """Return what an encoder makes of an item. Raises DownError, OverloadedError."""
        for _ in range(MOST_TRIES):
            try:
                # Ray Serve takes calls of one context that wait at a time for one.
                return await own_task(self._while_up(digest, reference))
            except BackPressureError:
                raise _overloaded() from None
            except (RayError, RayServeException) as error:
                logger.info("an encoder did not answer: %s", type(error).__name__)
        raise DownError

    async def _while_up(self, digest: bytes, reference: FeaturesRef) -> Features | None:
        """Wait for the answer as long as some encoder is there. Raises DownError."""
        response = self._handle.encode.remote(digest, reference)
        answer = asyncio.ensure_future(_awaited(response))
        last_up = time.monotonic()
        try:
            while True:
                await asyncio.wait((answer,), timeout=LOOK_SECONDS)
                if answer.done():
                    return answer.result()
                now = time.monotonic()
                if self._is_any_up():
                    last_up = now
                elif now - last_up > DOWN_SECONDS:
                    raise DownError
        finally:
            if not answer.done():
                response.cancel()
                answer.cancel()

    def _is_any_up(self) -> bool:
        found = encoders_of(self._handle.app_name, self._handle.deployment_name)
        return found is None or bool(found)

    def _find(self, digest: bytes) -> _Kept | None:
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    async def _keep(self, digest: bytes, made: Features) -> _Kept:
        """Put embeddings into the object store, and give up others where they are too many."""
        arrays = await asyncio.to_thread(ray.put, dict(made.arrays))
        kept = _Kept(dataclasses.replace(made, arrays={}), arrays, made.num_bytes)
        self._kept[digest] = kept
        self._kept_bytes += kept.num_bytes
        while self._kept_bytes > self._most_kept:
            _, gone = self._kept.popitem(last=False)
            self._kept_bytes -= gone.num_bytes
        return kept


def waiting_bytes(num_servers: int) -> int:
    """Return the bytes of features on their way that each of some processes for HTTP may have."""
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    return int(WAITING_SHARE * store / num_servers)


async def _awaited(response: Any) -> Features | None:
    found: Features | None = await response
    return found


def _overloaded() -> OverloadedError:
    error = OverloadedError("Too many media wait for an encoder. Try again later.")
    error.retry_after = int(RETRY_SECONDS)
    return error
