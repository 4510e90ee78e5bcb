"""Directory of the media that clients name by ids of their own, for several processes for HTTP.

Each process has the features of the items that it got, under the digest of their ids. Where there
are several, the next request for an id may meet another one: that asks the directory, which knows
a reference to the features in Ray's object store. The digests hold the client's API key and cache
salt, so nobody finds what another tenant has named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from sensorium.multimodal.items import Features, MediaItem
from sensorium.ray.media.features import FeaturesOut
from sensorium.ray.media.index import IndexClient, SharedIndex, SharedRef, own_node

STORE_SHARE = 0.25
"""Share of a machine's object store that features under ids may take there."""
DATA_SECONDS = 10.0
"""Most time that a request waits for features that the directory knows: without them it fails."""
AGAIN_SECONDS = 10.0
"""Interval at which a process offers an item that is asked for: another may have died with it."""


class NamesIndex(SharedIndex):
    """Deployment that is the directory. ``most_bytes``: of features, if the stores are large."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(most_bytes)
        self._stores: dict[str, float] = {}
        """Bytes of the object store of each machine that has been asked for."""

    def most_bytes_on(self, node: str) -> float:
        """Return the share of a machine's store; nothing on one that has gone."""
        if node not in self._stores:
            self._stores = {one["NodeID"]: _store_of(one) for one in ray.nodes()}
        return STORE_SHARE * self._stores.get(node, 0.0)


def _store_of(node: Mapping[str, Any]) -> float:
    """Return the bytes of a machine's object store, of what Ray says of the machine."""
    return float(node["Resources"].get("object_store_memory", 0.0)) if node["Alive"] else 0.0


class NamesElsewhere:
    """The directory as one process uses it. Used on one event loop.

    ``index``: handle of the deployment. ``features``: puts those of this process into the store.
    """

    def __init__(self, index: Any, features: FeaturesOut) -> None:
        self._client = IndexClient(index, "media of other processes", DATA_SECONDS, AGAIN_SECONDS)
        self._features = features

    async def find(self, digest: bytes) -> Features | None:
        """Return features, None where nobody is known to have them, or they come late."""
        found = await self._client.find(digest, _is_sound)
        if found is None:
            return None
        reference, arrays = found
        features: Features = dataclasses.replace(reference.about, arrays=arrays)
        return features

    def offer(self, digest: bytes, features: Features) -> None:
        """Let others have the features that were loaded here under an id."""
        item = MediaItem(features.modality, digest, features)

        async def made() -> SharedRef:
            [reference] = await self._features.references([item])
            about = reference.item.features
            return SharedRef(reference.arrays, features.num_bytes, about, own_node())

        self._client.offer(digest, features.num_bytes, made)

    async def settled(self) -> None:
        """Wait until the offers under way have been made."""
        await self._client.settled()


def _is_sound(reference: SharedRef, arrays: Any) -> bool:
    if not isinstance(reference.about, Features) or not isinstance(arrays, dict):
        return False
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        return False
    num_bytes: int = sum(array.nbytes for array in arrays.values())
    return num_bytes == reference.num_bytes
