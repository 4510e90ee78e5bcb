"""Embeddings that replicas share: what one of them has encoded, no other has to encode again.

They lie in Ray's object store, and one small deployment knows which there are, by the digest of the
item, within a budget of bytes. A replica asks when it sees an item for the first time, and offers
what it has encoded. Where anything of this fails or is late, the replica encodes the item itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayError

from sensorium import __version__, errors
from sensorium.config import EngineConfig
from sensorium.engine.serving.client import EngineClient
from sensorium.models.loading import checkpoint
from sensorium.models.loading.weight_files import content_of
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

FIND_SECONDS = 0.5
"""Most time that an item waits for embeddings of another replica."""
BACK_OFF_SECONDS = 5.0
"""Time for which nobody asks the index after it failed or was late."""
MOST_OFFERS = 32
"""Offers under way at a time; more are dropped."""
MOST_KNOWN = 1 << 14
"""Digests that a replica remembers to have offered."""


@dataclass(frozen=True, slots=True)
class EmbeddingsRef:
    """Bits of embeddings, uint8 (num_embeds, bytes of one), of numbers in ``dtype``."""

    bits: ray.ObjectRef
    dtype: str
    num_bytes: int


class SharedIndex:
    """Deployment that knows which embeddings there are. ``most_bytes``: of all of them together.

    Those that were asked for longest ago go first. Ray frees what it refers to no more.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._known: OrderedDict[bytes, EmbeddingsRef] = OrderedDict()
        self._num_bytes = 0

    def find(self, key: bytes) -> EmbeddingsRef | None:
        """Return the reference to embeddings, None where there are none."""
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found

    def keep(self, key: bytes, reference: EmbeddingsRef) -> None:
        """Keep a reference in place of the one before, and give up others where it is too much."""
        self.forget(key)
        if reference.num_bytes > self._most_bytes:
            return
        self._known[key] = reference
        self._num_bytes += reference.num_bytes
        while self._num_bytes > self._most_bytes:
            self.forget(next(iter(self._known)))

    def forget(self, key: bytes) -> None:
        """Give up embeddings, such as those of a replica that has gone."""
        gone = self._known.pop(key, None)
        if gone is not None:
            self._num_bytes -= gone.num_bytes

    def stats(self) -> tuple[int, int]:
        """Return the number of items and their bytes."""
        return len(self._known), self._num_bytes


class SharedEmbeddings:
    """The index as a replica uses it. All methods are called on one event loop.

    Args:
        index: Handle of the deployment.
        space: Tells models apart: only embeddings of the same weights are the same.
    """

    def __init__(self, index: Any, space: bytes) -> None:
        self._index = index
        self._space = space
        self._offers: set[asyncio.Task[None]] = set()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._silent_until = 0.0
        self.num_found = self.num_offered = 0

    async def find(self, digest: bytes) -> tuple[np.ndarray, str] | None:
        """Return bits and dtype of the embeddings of an item, None where nobody has them.

        After a failure or a delay the answer is None at once for ``BACK_OFF_SECONDS``.
        """
        if time.monotonic() < self._silent_until:
            return None
        key = self._key(digest)
        try:
            async with asyncio.timeout(FIND_SECONDS):
                found: EmbeddingsRef | None = await self._index.find.remote(key)
                bits = None if found is None else await found.bits
        except ObjectLostError:
            # The replica that had put them there has gone.
            self._index.forget.remote(key)
            return None
        except Exception as error:  # Ray Serve's are no RayError; the replica can do without.
            if time.monotonic() >= self._silent_until:
                logger.info("shared embeddings cannot be had: %s", type(error).__name__)
            self._silent_until = time.monotonic() + BACK_OFF_SECONDS
            return None
        if found is None or bits is None:
            return None
        self.num_found += 1
        return bits, found.dtype

    def offer(self, digests: Iterable[bytes], client: EngineClient) -> None:
        """Let others have the embeddings of items that this replica's engine has encoded.

        What was offered or found here before is not offered again while that is remembered.
        """
        for digest in digests:
            if digest not in self._known and len(self._offers) < MOST_OFFERS:
                self._remember(digest)
                task = own_task(self._offer(digest, client))
                self._offers.add(task)
                task.add_done_callback(self._offers.discard)

    def _remember(self, digest: bytes) -> None:
        self._known[digest] = None
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    async def settled(self) -> None:
        """Wait until the offers under way have been made."""
        await asyncio.gather(*self._offers)

    async def _offer(self, digest: bytes, client: EngineClient) -> None:
        try:
            found = await client.embeddings(digest)
            if found.bits is None:
                return
            reference = await asyncio.to_thread(ray.put, found.bits)
            offered = EmbeddingsRef(reference, found.dtype, found.bits.nbytes)
            await self._index.keep.remote(self._key(digest), offered)
            self.num_offered += 1
        except (errors.EngineDeadError, RayError) as error:
            logger.info("embeddings are not shared: %s", type(error).__name__)

    def _key(self, digest: bytes) -> bytes:
        return self._space + digest


async def shared_embeddings(config: EngineConfig, index: Any) -> SharedEmbeddings | None:
    """Return the embeddings that replicas of a model share, where they do."""
    if index is None:
        return None
    space = await asyncio.to_thread(space_of, config)
    if space is None:
        logger.info("embeddings are not shared: the files of the weights cannot be told")
        return None
    return SharedEmbeddings(index, space)


def space_of(config: EngineConfig) -> bytes | None:
    """Return what tells the encoders of a model from others; None where it cannot be told.

    Reads samples of the weights' files.
    """
    model = config.model
    folder = checkpoint.find(model.model, model.revision, model.download_dir, model.mmproj)
    content = content_of(folder)
    if not content or model.load_format == "dummy":
        return None
    plain = msgspec.json.encode((__version__, content, msgspec.to_builtins(model)))
    return hashlib.sha256(plain).digest()[:16]
