"""Encoders apart as a process for HTTP uses them: items out, references to embeddings back.

The features of an item that is seen for the first time go into Ray's object store and to one
encoder; the embeddings come back, and are put into the store by this process, so that they stay
there when the encoder dies. Engines take them in place of features, if they come from the weights,
on the device and with the options that the engines have.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

from sensorium.engine.stats import EncodersApart, EngineFacts
from sensorium.errors import UnavailableError
from sensorium.metrics.encoder_families import ENCODER_REASONS
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.items import EMBEDS_DTYPE, Features, MediaItem
from sensorium.ray.cluster import own_store_bytes
from sensorium.ray.encoders.asking import Asking, DownError, overloaded
from sensorium.ray.encoders.messages import Answer
from sensorium.ray.media.embeddings import is_bits
from sensorium.ray.media.features import FeaturesOut, FeaturesRef, put_features

logger = logging.getLogger(__name__)

STORE_SHARE = 0.25
"""Share of a machine's object store that items on their way to encoders may take, of all processes
for HTTP, and at most that embeddings which are kept may."""
NO_ENCODER, OTHER_WEIGHTS, FAILED, ADAPTER = ENCODER_REASONS
"""Reasons for which engines encode items."""

Accepted = Mapping[bytes, EngineFacts]
"""The engines that are up, each by the identity of its encoders."""


class _Kept(NamedTuple):
    """Features without arrays, reference to these, their bytes, and the identity of the encoder."""

    features: Features
    arrays: Any
    num_bytes: int
    space: bytes


class Encoders:
    """Encoders behind a handle of Ray Serve. Used on one event loop.

    ``most_kept``: bytes of the embeddings of the latest items, besides those of requests that run.
    ``most_waiting``: bytes of features on their way; one request alone may have more.
    """

    def __init__(
        self, handle: Any, features: FeaturesOut, *, most_kept: int, most_waiting: int
    ) -> None:
        self._asking = Asking(handle)
        self._features = features
        self._most_kept, self._most_waiting = most_kept, most_waiting
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._waiting: dict[bytes, int] = {}
        """Bytes of the features of items that are on their way, by key."""
        self._encoding: SingleFlight[_Kept | str] = SingleFlight()
        self._fallbacks: Counter[str] = Counter()
        self._last: str | None = None
        """Reason for which the item before was not encoded here, of those that last."""

    def stats(self) -> EncodersApart:
        """Return what each replica reported last, and what has become of items."""
        reports = self._asking.fleet().reports.items()
        replicas = {name: report.stats for name, report in reports if report is not None}
        return EncodersApart(replicas, dict(self._fallbacks), self._asking.num_refused)

    async def references(
        self, items: Sequence[MediaItem], wanted: Sequence[bytes], accepted: Accepted
    ) -> tuple[FeaturesRef, ...]:
        """Return references to the embeddings of items, which are encoded where nobody has them.

        ``wanted``: the digest of each item's embeddings. An item whose own digest is another one,
        as an adapter changes its encoder, stays as it is; so do those that are embeddings already,
        that cannot be encoded, and all while no encoder is there that is one of ``accepted``.

        Raises UnavailableError when too many items wait, and for an item that ended encoders.
        """
        own = frozenset(item.digest for item in items)
        work = [
            asyncio.create_task(self._reference(item, item.digest == digest, own, accepted))
            for item, digest in zip(items, wanted, strict=True)
        ]
        try:
            return tuple(await asyncio.gather(*work))
        finally:
            for task in work:
                task.cancel()

    async def plain(self, items: Sequence[MediaItem]) -> tuple[FeaturesRef, ...]:
        """Return references to the features of items, whose embeddings an engine did not accept."""
        self._fallbacks[OTHER_WEIGHTS] += sum(not item.features.precomputed for item in items)
        return await self._features.references(items)

    async def _reference(
        self, item: MediaItem, is_plain: bool, own: frozenset[bytes], accepted: Accepted
    ) -> FeaturesRef:
        if not item.features.precomputed:
            found = await self._found(item, own, accepted) if is_plain else ADAPTER
            if isinstance(found, _Kept):
                whole = dataclasses.replace(item, features=found.features)
                return FeaturesRef(whole, found.arrays, found.space)
            self._fallbacks[found] += 1
        [reference] = await self._features.references([item])
        return reference

    async def _found(
        self, item: MediaItem, own: frozenset[bytes], accepted: Accepted
    ) -> _Kept | str:
        """Return the embeddings of an item, or the reason why an engine has to make them."""
        key = item.digest
        kept = self._find(key, accepted)
        if kept is not None:
            return kept
        try:
            return await self._encoding.run(key, lambda: self._encoded(item, own, accepted))
        except UnavailableError as error:
            placed = copy.copy(error)  # several requests may wait for the item
            placed.param = item.cost.place or None
            raise placed from None

    async def _encoded(
        self, item: MediaItem, own: frozenset[bytes], accepted: Accepted
    ) -> _Kept | str:
        """Have an item encoded. ``own``: keys of the items of the request that it came with."""
        key, size = item.digest, item.features.num_bytes
        # What may have ended an encoder goes to no engine before an encoder has survived it.
        if not self._asking.is_suspect(key) and not self._asking.fleet().may_have(accepted):
            return self._noted(OTHER_WEIGHTS, accepted)
        is_alone = self._waiting.keys() <= own
        if not is_alone and sum(self._waiting.values()) + size > self._most_waiting:
            raise overloaded()
        self._waiting[key] = size
        try:
            reference = await asyncio.to_thread(put_features, item)
            answer = await self._asking.ask(key, reference)
        except DownError:
            return self._noted(NO_ENCODER, accepted)
        finally:
            self._waiting.pop(key, None)
        if answer is None or answer.bits is None:
            return FAILED
        return await self._checked(item, answer, accepted)

    async def _checked(self, item: MediaItem, answer: Answer, accepted: Accepted) -> _Kept | str:
        """Keep an answer that is what the engines would make."""
        facts = accepted.get(answer.space)
        if facts is None:
            return self._noted(OTHER_WEIGHTS, accepted)
        shape = (item.features.num_embeds, facts.embed_bytes)
        if answer.dtype != facts.dtype or not is_bits(answer.bits, shape):
            logger.error("an encoder's answer is not what an item needs: it is not used")
            return FAILED
        self._noted(None, accepted)
        made = dataclasses.replace(
            item.features,
            arrays={"embeds": answer.bits},
            meta={EMBEDS_DTYPE: answer.dtype},
            precomputed=True,
        )
        return await self._keep(item.digest, made, answer.space)

    def _noted(self, reason: str | None, accepted: Accepted) -> str:
        """Log a state that lasts when it begins and ends, and return the reason."""
        if reason != self._last:
            self._last = reason
            if reason is None:
                logger.info("encoders encode media again")
            elif reason == NO_ENCODER:
                logger.warning("no encoder is there: engines encode media themselves meanwhile")
            else:
                reports = self._asking.fleet().reports.values()
                logger.warning(
                    "encoders (%s) have other weights or options, or another device or dtype, than "
                    "the engines (%s), which encode media themselves meanwhile",
                    ", ".join({one.numerics for one in reports if one is not None}) or "unknown",
                    ", ".join({facts.numerics for facts in accepted.values()}) or "unknown",
                )
        return reason or ""

    def _find(self, key: bytes, accepted: Accepted) -> _Kept | None:
        found = self._kept.get(key)
        if found is None:
            return None
        if found.space not in accepted:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return found

    async def _keep(self, key: bytes, made: Features, space: bytes) -> _Kept:
        """Put embeddings into the object store, and give up others where they are too many."""
        arrays = await asyncio.to_thread(ray.put, dict(made.arrays))
        kept = _Kept(dataclasses.replace(made, arrays={}), arrays, made.num_bytes, space)
        self._drop(key)
        self._kept[key] = kept
        self._kept_bytes += kept.num_bytes
        while self._kept_bytes > self._most_kept:
            self._drop(next(iter(self._kept)))
        return kept

    def _drop(self, key: bytes) -> None:
        gone = self._kept.pop(key, None)
        if gone is not None:
            self._kept_bytes -= gone.num_bytes


def share_of_store(num_servers: int) -> int:
    """Return the bytes of this machine's object store for each of some processes for HTTP.

    All of them may be on this machine.
    """
    return int(STORE_SHARE * own_store_bytes() / num_servers)
