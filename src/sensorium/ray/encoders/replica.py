"""The deployment of encoders: each replica has the towers and projectors of a model in itself."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from ray import serve

from sensorium import environment, errors
from sensorium.config import GIB, EngineConfig
from sensorium.engine.stats import EncoderStats, EngineFacts
from sensorium.forks import OWN_THREADS
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.items import EMBEDS_DTYPE, Features
from sensorium.ray.encoders.fleet import STATS_KEY
from sensorium.ray.media.features import FeaturesRef
from sensorium.ray.start import start_failed, take_cores
from sensorium.ray.tasks import own_task

STUCK_SECONDS = 900.0
"""Time that one item may take until Ray Serve is told to replace the replica."""


class Encoder:
    """One replica, which encodes one item at a time.

    ``per_node``: parts into which the cores of a machine are divided; encoders take the last ones.
    ``num_threads``: of computing on CPUs. ``engines``: handle of the replicas of the engine, which
    say in which dtype they run where ``dtype`` is ``auto``.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        config: EngineConfig,
        per_node: int,
        num_threads: int | None,
        log_level: str,
        engines: Any,
    ) -> None:
        environment.set_log_level(log_level)
        environment.set_progress(False)
        rank = serve.get_replica_context().rank
        take_cores(-1 - (rank.local_rank if rank is not None else 0), per_node)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{OWN_THREADS}encoder")
        self._kept = FeatureCache(int(config.cache.mm_encoder_cache_gb * GIB))
        self._encoding: SingleFlight[Features | None] = SingleFlight()
        self._stats = EncoderStats()
        self._began: float | None = None
        config = await _with_dtype(config, engines)
        try:
            await self._call(self._load, config, num_threads)
        except errors.SensoriumError as error:
            raise start_failed(error) from None

    async def encode(self, digest: bytes, reference: FeaturesRef) -> Features | None:
        """Return the embeddings of an item as precomputed features, by its digest.

        Callers that want the same ones share the work, which ends when all have left. None where
        the item cannot be encoded: an engine that tries it gives the error.
        """
        kept = self._kept.get(digest)
        if kept is not None:
            return kept

        async def run() -> Features | None:
            # The others wait for it, too, when the request that came first has gone.
            return await own_task(self._encoded(digest, reference))

        return await self._encoding.run(digest, run)

    async def record_routing_stats(self) -> dict[str, bytes]:
        """Return what /metrics shows."""
        self._stats.num_waiting = self._encoding.num_running
        return {STATS_KEY: msgspec.msgpack.encode(self._stats)}

    async def check_health(self) -> None:
        """Raise RuntimeError when an item takes far too long."""
        if self._began is not None and time.monotonic() - self._began > STUCK_SECONDS:
            raise RuntimeError(f"an item has taken more than {STUCK_SECONDS:g} s")

    async def __del__(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, config: EngineConfig, num_threads: int | None) -> None:
        # Only here: the processes for HTTP import this module, too, and never torch.
        from sensorium.kernels.cpu import threads

        threads.prepare()
        from sensorium.engine.encoding import ItemEncoder

        self._encoder = ItemEncoder(config, num_threads)
        self._stats.weight_bytes = self._encoder.weight_bytes

    async def _encoded(self, digest: bytes, reference: FeaturesRef) -> Features | None:
        features = dataclasses.replace(reference.item.features, arrays=await reference.arrays)
        made: Features | None = await self._call(self._timed, features)
        if made is not None:
            self._kept.put(digest, made)
        return made

    def _timed(self, features: Features) -> Features | None:
        """Encode an item, and count it. Runs in the thread of the encoder."""
        self._began = began = time.monotonic()
        try:
            made = self._encoder.encode(features)
        finally:
            self._began = None
        self._stats.seconds += time.monotonic() - began
        if made is None:
            self._stats.num_failed += 1
            return None
        self._stats.num_items += 1
        self._stats.num_bytes += made.bits.nbytes
        return dataclasses.replace(
            features,
            arrays={"embeds": made.bits},
            meta={EMBEDS_DTYPE: made.dtype},
            precomputed=True,
        )

    async def _call(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


async def _with_dtype(config: EngineConfig, engines: Any) -> EngineConfig:
    """Return the options with the dtype of the engines, whose choice may depend on free memory."""
    if config.model.dtype != "auto":
        return config
    facts = msgspec.msgpack.decode(await engines.facts.remote(), type=EngineFacts)
    dtype: Any = facts.dtype
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
