"""Features that came from another process as arrays, copied into shared memory for the engine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

from sensorium.errors import OverloadedError
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import SharedArrays, SharedArraysFolder
from sensorium.multimodal.workers.decode_worker import NO_ROOM


class FeatureCopies:
    """Features in shared memory of this machine by key, each copied once; the latest are kept.

    Used on one event loop. ``most_bytes``: of those that no request uses any more; fewer are kept
    where the file system is small.
    """

    def __init__(self, most_bytes: int) -> None:
        self._folder = SharedArraysFolder()
        self._kept = FeatureCache(min(most_bytes, self._folder.capacity_bytes))
        self._copying: SingleFlight[Features] = SingleFlight()

    async def get(self, key: bytes, load: Callable[[], Coroutine[Any, Any, Features]]) -> Features:
        """Return the features under a key; those that are not there come from ``load``.

        Callers that want the same ones share its run. Raises OverloadedError when there is no room
        for them, and what ``load`` raises.
        """
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        return await self._copying.run(key, lambda: self._copied(key, load))

    def close(self) -> None:
        """Remove the shared memory."""
        self._folder.close()

    async def _copied(
        self, key: bytes, load: Callable[[], Coroutine[Any, Any, Features]]
    ) -> Features:
        features = await load()
        try:
            arrays = await self._written(features)
        except OSError:
            self._kept.clear()
            try:
                arrays = await self._written(features)
            except OSError as error:
                raise OverloadedError(NO_ROOM) from error
        copied = dataclasses.replace(features, arrays=arrays)
        self._kept.put(key, copied)
        return copied

    async def _written(self, features: Features) -> SharedArrays:
        return await asyncio.to_thread(self._folder.write, features.arrays)
