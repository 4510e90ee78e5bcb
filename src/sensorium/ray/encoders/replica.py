"""The deployment of encoders: each replica has the towers and projectors of a model in itself."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from sensorium import environment, errors
from sensorium.config import GIB, EngineConfig
from sensorium.engine.serving.worker import StepWatch
from sensorium.engine.stats import EncoderStats, EngineFacts
from sensorium.forks import OWN_THREADS
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.items import Features
from sensorium.ray.encoders.messages import Answer, Ask, EncoderReport
from sensorium.ray.media.features import FeaturesRef
from sensorium.ray.media.space import Space
from sensorium.ray.routing import as_stats
from sensorium.ray.start import start_failed, take_cores
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0
"""Time after which engines are asked again what they run."""


class Encoder:
    """One replica, which encodes one item at a time.

    An item that takes longer than a step of an engine may (``--engine-step-timeout``) ends it.

    ``per_node``: parts into which the cores of a machine are divided; encoders take the last ones.
    ``num_threads``: of computing on CPUs. ``engines``: handle of the replicas of the engine, which
    say in which dtype and with how many threads they run.
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
        self._encoding: SingleFlight[Answer] = SingleFlight()
        self._stats = EncoderStats()
        self._watch = StepWatch(config.scheduler.engine_step_timeout)
        # The options before their dtype is chosen: engines are told by the same ones.
        self._space = Space(config)
        await self._space.look_before()
        facts = await _facts(engines)
        try:
            own = _with_dtype(config, facts)
            await self._call(self._load, own, num_threads, facts.num_threads)
        except errors.SensoriumError as error:
            raise start_failed(error) from None
        await self._space.look(self._encoder.numerics)

    async def encode(self, ask: Ask, reference: FeaturesRef) -> Answer:
        """Return the embeddings of an item.

        Callers that want the same ones share the work, which ends when all have left.
        """
        kept = self._kept.get(ask.key)
        if kept is not None:
            return Answer(self._space.value, kept.arrays["embeds"], self._encoder.dtype)

        async def run() -> Answer:
            # The others wait for it, too, when the request that came first has gone.
            return await own_task(self._encoded(ask.key, reference))

        return await self._encoding.run(ask.key, run)

    async def record_routing_stats(self) -> dict[str, bytes]:
        """Return what those who ask need to know, and what /metrics shows."""
        self._stats.num_waiting = self._encoding.num_running
        report = EncoderReport(self._space.value, self._encoder.numerics, self._stats)
        return as_stats(report)

    async def __del__(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, config: EngineConfig, num_threads: int | None, engine_threads: int) -> None:
        # Only here: the processes for HTTP import this module, too, and never torch.
        from sensorium.kernels.cpu import threads

        threads.prepare()
        from sensorium.engine.encoding import ItemEncoder

        self._encoder = ItemEncoder(config, num_threads, engine_threads)
        self._stats.weight_bytes = self._encoder.weight_bytes

    async def _encoded(self, key: bytes, reference: FeaturesRef) -> Answer:
        features = dataclasses.replace(reference.item.features, arrays=await reference.arrays)
        bits: np.ndarray | None = await self._call(self._timed, features)
        if bits is not None:
            made = dataclasses.replace(features, arrays={"embeds": bits}, precomputed=True)
            self._kept.put(key, made)
        return Answer(self._space.value, bits, self._encoder.dtype)

    def _timed(self, features: Features) -> np.ndarray | None:
        """Encode an item, and count it. Runs in the thread of the encoder."""
        began = time.monotonic()
        self._watch.step_begins()
        try:
            bits = self._encoder.encode(features)
        finally:
            self._watch.rest()
        self._stats.seconds += time.monotonic() - began
        if bits is None:
            self._stats.num_failed += 1
            return None
        self._stats.num_items += 1
        self._stats.num_bytes += bits.nbytes
        return bits

    async def _call(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


async def _facts(engines: Any) -> EngineFacts:
    """Return what an engine says of itself, once one is up: nobody needs encoders before."""
    while True:
        try:
            return msgspec.msgpack.decode(await engines.facts.remote(), type=EngineFacts)
        except (RayError, RayServeException) as error:  # it ended meanwhile
            logger.info("an engine did not say what it runs: %s", type(error).__name__)
            await asyncio.sleep(AGAIN_SECONDS)


def _with_dtype(config: EngineConfig, facts: EngineFacts) -> EngineConfig:
    """Return the options with the dtype of the engines, whose choice may depend on free memory."""
    if config.model.dtype != "auto":
        return config
    dtype: Any = facts.dtype
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
