"""Embeddings that replicas share: what one of them has encoded, no other has to encode again.

They lie in Ray's object store, and an index knows which there are, by the digest of the item. A
replica asks when it sees an item for the first time, and offers what it has encoded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
import ray

from sensorium.engine.serving.client import EngineClient
from sensorium.engine.stats import EngineFacts
from sensorium.multimodal.items import MediaItem
from sensorium.ray.media.index import IndexClient, SharedRef, own_node

logger = logging.getLogger(__name__)

DATA_SECONDS = 2.0
"""Most time that an item waits for embeddings that another replica has: they can be made here."""


class SharedEmbeddings:
    """The embeddings of a model as a replica shares them. Used on one event loop.

    Args:
        index: Handle of the deployment that knows where they are.
        space: Tells models apart: only embeddings that the same weights have made in the same way
            are the same.
        facts: Those of the replica's engine: dtype and size of an embedding.
    """

    def __init__(self, index: Any, space: bytes, facts: EngineFacts) -> None:
        self._client = IndexClient(index, "shared embeddings", DATA_SECONDS)
        self._space = space
        self._dtype, self._embed_bytes = facts.dtype, facts.embed_bytes

    @property
    def num_found(self) -> int:
        """Return the number of items that need not be encoded here."""
        return self._client.num_found

    @property
    def num_offered(self) -> int:
        """Return the number of items whose embeddings others can have from here."""
        return self._client.num_offered

    async def find(self, item: MediaItem) -> tuple[np.ndarray, str] | None:
        """Return bits, uint8 (num_embeds, bytes of one), and dtype of the embeddings of an item.

        None where nobody has them in this form.
        """
        shape = (item.features.num_embeds, self._embed_bytes)

        def is_sound(reference: SharedRef, bits: Any) -> bool:
            return reference.about == self._dtype and is_bits(bits, shape)

        found = await self._client.find(self._key(item), is_sound)
        return None if found is None else (found[1], self._dtype)

    def offer(self, items: Iterable[MediaItem], client: EngineClient) -> None:
        """Let others have the embeddings of items that this replica's engine has encoded."""
        for item in items:
            self._offer(item, client)

    async def settled(self) -> None:
        """Wait until the offers under way have been made."""
        await self._client.settled()

    def _offer(self, item: MediaItem, client: EngineClient) -> None:
        shape = (item.features.num_embeds, self._embed_bytes)

        async def made() -> SharedRef | None:
            found = await client.embeddings(item.digest)
            if found.dtype != self._dtype or not is_bits(found.bits, shape):
                return None
            reference = await asyncio.to_thread(ray.put, found.bits)
            return SharedRef(reference, shape[0] * shape[1], found.dtype, own_node())

        self._client.offer(self._key(item), shape[0] * shape[1], made)

    def _key(self, item: MediaItem) -> bytes:
        return self._space + item.digest


def is_bits(value: Any, shape: tuple[int, int]) -> TypeGuard[np.ndarray]:
    """Return True for bits of embeddings of a shape: (num_embeds, bytes of one)."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape == shape


def shared_embeddings(index: Any, facts: EngineFacts) -> SharedEmbeddings | None:
    """Return the embeddings that replicas of a model share, where they do."""
    if index is None:
        return None
    if not facts.space:
        logger.info("embeddings are not shared: the files of the weights cannot be told")
        return None
    return SharedEmbeddings(index, facts.space, facts)
