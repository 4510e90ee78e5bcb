"""The one place where features of items become references that any replica can read, and back.

Who answers HTTP requests puts the features of an item into Ray's object store once, and sends the
reference with each request that has the item. An engine's replica reads it, mapped where it lies
on the same machine, and writes it into shared memory, from where the engine's process maps it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from sensorium.multimodal.items import EMBEDS_DTYPE, Features, MediaItem
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.ray.media.embeddings import SharedEmbeddings

Kind = tuple[bytes, bool]
"""Digest of an item, and if embeddings of another replica may stand for its features."""


@dataclass(frozen=True, slots=True)
class FeaturesRef:
    """Features of an item, with a reference to their arrays (a mapping of names) in place of them.

    Attributes as of ``MediaItem`` and ``Features``; ``num_bytes`` of all arrays together.
    """

    digest: bytes
    modality: str
    num_embeds: int
    num_bytes: int
    meta: dict[str, Any]
    precomputed: bool
    arrays: ray.ObjectRef


class FeaturesOut:
    """Puts features into the object store; each stays there as long as its arrays are here.

    Used on one event loop; ``references`` copies the arrays in another thread.
    """

    def __init__(self) -> None:
        self._known: dict[int, FeaturesRef] = {}
        """By the identity of the arrays, which go with the last request and the cache."""

    def __len__(self) -> int:
        return len(self._known)

    async def references(self, items: Sequence[MediaItem]) -> tuple[FeaturesRef, ...]:
        """Return references to the features of items; each is copied the first time only."""
        new = {id(i.features.arrays): i for i in items if id(i.features.arrays) not in self._known}
        if new:
            made = await asyncio.to_thread(lambda: [_put(item) for item in new.values()])
            for (key, item), reference in zip(new.items(), made, strict=True):
                if key not in self._known:
                    self._known[key] = reference
                    weakref.finalize(item.features.arrays, self._known.pop, key, None)
        return tuple(self._known[id(item.features.arrays)] for item in items)


class FeaturesIn:
    """Items by references, in shared memory of this machine; the latest ones are kept.

    Used on one event loop. ``most_bytes``: bytes of those that no request uses any more.
    ``shared``: where other replicas leave the embeddings that they have made.
    """

    def __init__(self, most_bytes: int, shared: SharedEmbeddings | None = None) -> None:
        self._most_bytes = most_bytes
        self._shared = shared
        self._folder = SharedArraysFolder()
        self._kept: OrderedDict[Kind, MediaItem] = OrderedDict()
        self._num_bytes = 0
        self._loading: dict[Kind, asyncio.Task[MediaItem]] = {}

    async def items(
        self, references: Sequence[FeaturesRef], wanted: Sequence[bytes]
    ) -> list[MediaItem]:
        """Return the items; those that others wait for already are read once.

        ``wanted``: the digest of each item's embeddings, which differs from the item's own where
        an adapter changes the encoder. Those are not shared.

        Raises OSError when there is no room for them, ray.exceptions.RayError when one is lost.
        """
        pairs = zip(references, wanted, strict=True)
        return [await self._item(ref, ref.digest == digest) for ref, digest in pairs]

    def close(self) -> None:
        """Remove the shared memory."""
        self._folder.close()

    async def _item(self, reference: FeaturesRef, shareable: bool) -> MediaItem:
        kind = reference.digest, shareable and self._shared is not None
        kept = self._kept.get(kind)
        if kept is not None:
            self._kept.move_to_end(kind)
            return kept
        task = self._loading.get(kind)
        if task is None:
            task = self._loading[kind] = asyncio.create_task(self._load(reference, kind))
            task.add_done_callback(lambda _: self._loading.pop(kind, None))
        return await asyncio.shield(task)

    async def _load(self, reference: FeaturesRef, kind: Kind) -> MediaItem:
        arrays, meta, precomputed = None, reference.meta, reference.precomputed
        if self._shared is not None and kind[1] and not precomputed:
            found = await self._shared.find(reference.digest)
            if found is not None:
                bits, dtype = found
                arrays, meta, precomputed = {"embeds": bits}, {EMBEDS_DTYPE: dtype}, True
        if arrays is None:
            arrays = await reference.arrays
        shared = await asyncio.to_thread(self._folder.write, arrays)
        features = Features(
            modality=reference.modality,  # type: ignore[arg-type]
            arrays=shared,
            num_embeds=reference.num_embeds,
            meta=meta,
            precomputed=precomputed,
        )
        item = MediaItem(reference.modality, reference.digest, features)  # type: ignore[arg-type]
        self._keep(kind, item)
        return item

    def _keep(self, kind: Kind, item: MediaItem) -> None:
        self._kept[kind] = item
        self._num_bytes += item.features.num_bytes
        while self._num_bytes > self._most_bytes and self._kept:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.features.num_bytes


def _put(item: MediaItem) -> FeaturesRef:
    features = item.features
    arrays = {name: np.ascontiguousarray(features.arrays[name]) for name in features.arrays}
    return FeaturesRef(
        digest=item.digest,
        modality=features.modality,
        num_embeds=features.num_embeds,
        num_bytes=features.num_bytes,
        meta=dict(features.meta),
        precomputed=features.precomputed,
        arrays=ray.put(arrays),
    )
