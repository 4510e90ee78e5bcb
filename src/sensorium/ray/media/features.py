"""The one place where features of items become references that any replica can read, and back.

Who answers HTTP requests puts the features of an item into Ray's object store once, and sends the
reference with each request that has the item. An engine's replica reads it, mapped where it lies
on the same machine, and writes it into shared memory, from where the engine's process maps it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from sensorium.multimodal.items import EMBEDS_DTYPE, Features, MediaItem
from sensorium.ray.media.copies import FeatureCopies
from sensorium.ray.media.embeddings import SharedEmbeddings
from sensorium.ray.tasks import own_task

_SHARED = b"shared"
"""Ends the key of features for which embeddings of another replica may stand."""
_MADE = b"made"
"""Ends the key of embeddings, which an encoder may have made of features with the same digest; the
identity of that encoder follows."""


@dataclass(frozen=True, slots=True)
class FeaturesRef:
    """An item without its arrays, and a reference to them: a mapping of names.

    ``space``: the identity of the encoder that made its embeddings (``media.space``); empty for
    features, and for embeddings that a caller brought.
    """

    item: MediaItem
    arrays: ray.ObjectRef
    space: bytes = b""


def suit(references: Sequence[FeaturesRef], space: bytes) -> bool:
    """Return True where all embeddings that encoders made are those of one identity."""
    return all(one.space in (b"", space) for one in references)


class FeaturesOut:
    """Puts features into the object store; each stays there as long as its arrays are here.

    Used on one event loop; ``references`` copies the arrays in another thread.
    """

    def __init__(self) -> None:
        self._known: dict[int, ray.ObjectRef] = {}
        """By the identity of the arrays, which go with the last request and the cache."""

    def __len__(self) -> int:
        return len(self._known)

    async def references(self, items: Sequence[MediaItem]) -> tuple[FeaturesRef, ...]:
        """Return references to the features of items; each is copied the first time only."""
        new = {id(i.features.arrays): i for i in items if id(i.features.arrays) not in self._known}
        if new:
            made = await asyncio.to_thread(lambda: [put_features(item) for item in new.values()])
            for (key, item), reference in zip(new.items(), made, strict=True):
                if key not in self._known:
                    self._known[key] = reference.arrays
                    weakref.finalize(item.features.arrays, self._known.pop, key, None)
        # Items of several digests may have the same arrays: one by its id, and by its content.
        return tuple(FeaturesRef(_bare(i), self._known[id(i.features.arrays)]) for i in items)


class FeaturesIn:
    """Items by references, in shared memory of this machine; the latest ones are kept.

    Used on one event loop. ``most_bytes``: bytes of those that no request uses any more.
    ``shared``: where other replicas leave the embeddings that they have made.
    """

    def __init__(self, most_bytes: int, shared: SharedEmbeddings | None = None) -> None:
        self._shared = shared
        self._copies = FeatureCopies(most_bytes)

    async def items(
        self, references: Sequence[FeaturesRef], wanted: Sequence[bytes]
    ) -> list[MediaItem]:
        """Return the items, read at the same time; those that others wait for already once.

        ``wanted``: the digest of each item's embeddings, which differs from the item's own where
        an adapter changes the encoder. Those are not shared.

        Raises OverloadedError when there is no room for them, ray.exceptions.RayError when one is
        lost.
        """
        pairs = list(zip(references, wanted, strict=True))
        work = [self._item(ref, ref.item.digest == digest) for ref, digest in pairs]
        return await asyncio.gather(*work)

    def stop_sharing(self) -> None:
        """Use no embeddings of other replicas any more, as the own weights may be others now."""
        self._shared = None

    def close(self) -> None:
        """Remove the shared memory."""
        self._copies.close()

    async def _item(self, reference: FeaturesRef, shareable: bool) -> MediaItem:
        item = reference.item
        is_made = item.features.precomputed
        shareable = shareable and not is_made and self._shared is not None
        end = _MADE + reference.space if is_made else _SHARED if shareable else b""
        key = item.digest + end

        async def load() -> Features:
            # Others may wait for it, too, when the request that came first has gone.
            return await own_task(self._load(reference, shareable))

        features = await self._copies.get(key, load)
        return dataclasses.replace(item, features=features)

    async def _load(self, reference: FeaturesRef, shareable: bool) -> Features:
        features = reference.item.features
        if self._shared is not None and shareable:
            found = await self._shared.find(reference.item)
            if found is not None:
                bits, dtype = found
                return dataclasses.replace(
                    features, arrays={"embeds": bits}, meta={EMBEDS_DTYPE: dtype}, precomputed=True
                )
        return dataclasses.replace(features, arrays=await reference.arrays)


def put_features(item: MediaItem) -> FeaturesRef:
    """Copy the features of an item into the object store, where they stay with the reference."""
    features = item.features
    arrays = {name: np.ascontiguousarray(features.arrays[name]) for name in features.arrays}
    return FeaturesRef(_bare(item), ray.put(arrays))


def _bare(item: MediaItem) -> MediaItem:
    """Return an item without its arrays."""
    meta = dict(item.features.meta)
    return dataclasses.replace(
        item, features=dataclasses.replace(item.features, arrays={}, meta=meta)
    )
