"""Embeddings that replicas share: what one of them has encoded, no other has to encode again.

They lie in Ray's object store, and an index knows which there are, by the digest of the item. A
replica asks when it sees an item for the first time, and offers what it has encoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import ray

from sensorium import __version__
from sensorium.config import EngineConfig
from sensorium.engine.serving.client import EngineClient
from sensorium.engine.stats import EngineFacts
from sensorium.models.loading import checkpoint
from sensorium.models.loading.weight_files import identity_of_checkpoint
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
            return reference.about == self._dtype and _is_bits(bits, shape)

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
            if found.dtype != self._dtype or not _is_bits(found.bits, shape):
                return None
            reference = await asyncio.to_thread(ray.put, found.bits)
            return SharedRef(reference, shape[0] * shape[1], found.dtype, own_node())

        self._client.offer(self._key(item), shape[0] * shape[1], made)

    def _key(self, item: MediaItem) -> bytes:
        return self._space + item.digest


def _is_bits(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape == shape


async def shared_embeddings(
    config: EngineConfig, index: Any, facts: EngineFacts
) -> SharedEmbeddings | None:
    """Return the embeddings that replicas of a model share, where they do."""
    if index is None:
        return None
    space = await asyncio.to_thread(space_of, config, facts)
    if space is None:
        logger.info("embeddings are not shared: the files of the weights cannot be told")
        return None
    return SharedEmbeddings(index, space, facts)


def space_of(config: EngineConfig, facts: EngineFacts) -> bytes | None:
    """Return what tells the encoders of a model from others; None where it cannot be told.

    It covers this program, the checkpoint's files, options of the model, media and kernels, and
    the device, a GPU by its name and a CPU by its instructions: all that decides the bits of
    embeddings, besides the item, whose digest has the processor's options. Reads pieces of the
    weights' files.
    """
    model = config.model
    if model.load_format == "dummy":
        return None
    folder = checkpoint.find(model.model, model.revision, model.download_dir, model.mmproj)
    files = identity_of_checkpoint(folder)
    if not files:
        return None
    options = [msgspec.to_builtins(part) for part in (model, config.parallel, config.media)]
    kind = facts.device.partition(":")[0]
    device = (kind, facts.device_name, facts.dtype, facts.num_ranks, _instructions(kind))
    plain = msgspec.json.encode((__version__, files, options, device))
    return hashlib.sha256(plain).digest()[:16]


def _instructions(device: str) -> str:
    """Return the level of the kernels of a CPU, which decides how its sums are rounded."""
    if device != "cpu":
        return ""
    from sensorium.kernels.cpu.linear import levels

    return levels.level()
