"""The deployment of engines: each replica owns one engine process, supervised as in one server."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from ray import serve

from sensorium import environment, errors
from sensorium.config import GIB, EngineConfig
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine import wire
from sensorium.engine.serving.client import OutputQueue
from sensorium.engine.serving.supervisor import EngineSupervisor
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.multimodal.items import MediaItem
from sensorium.ray.media.embeddings import shared_embeddings
from sensorium.ray.media.features import FeaturesIn, FeaturesRef, suit
from sensorium.ray.media.space import Space
from sensorium.ray.routing import as_stats
from sensorium.ray.serving.fleet import ReplicaReport
from sensorium.ray.serving.messages import NOT_TAKEN, OTHER_ENCODER, TAKEN, Clock, Ticket
from sensorium.ray.serving.scaling import LOAD, load_of
from sensorium.ray.start import start_failed, take_cores
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

LOST_SECONDS = 120.0
"""Time without an engine after which Ray Serve is told to replace the whole replica, once an
attempt to bring it back has failed: one that loads gets the time it takes."""
STATS_SECONDS = 1.0
"""Interval of reports, and most time that the engine gets to answer for one."""


class Loss:
    """Judges from what is seen every few seconds whether an engine can still be brought back."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._is_final = False

    def is_final(self, alive: bool, loading: bool, now: float) -> bool:
        """Take over what is seen ``now``, in seconds; return whether to replace the replica.

        Not while an engine loads, unless that has been said already.
        """
        if alive:
            self._since, self._is_final = None, False
            return False
        if self._since is None:
            self._since = now
        self._is_final |= not loading and now - self._since > LOST_SECONDS
        return self._is_final


class Engine:
    """One replica. ``per_node``: replicas that share the cores of a machine, at most.

    ``index``: handle to the embeddings that replicas share, None for each on its own.
    The engine's process is a child as in a single server, and is replaced when it dies.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: EngineConfig, per_node: int, log_level: str, index: Any = None
    ) -> None:
        environment.set_log_level(log_level)
        context = serve.get_replica_context()
        self._id: str = context.replica_id.unique_id
        take_cores(context.rank.local_rank if context.rank is not None else 0, per_node)
        self._supervisor = EngineSupervisor(config)
        self._stats = EngineStats()
        self._num_reports = 0
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._loss = Loss()
        self._space = Space(config)
        await self._space.look_before()
        try:
            await self._supervisor.start()
        except errors.SensoriumError as error:
            await self._supervisor.stop()
            raise start_failed(error) from None
        await self._space.look(self._supervisor.facts.numerics)
        self._shared = shared_embeddings(index, self._facts)
        self._features = FeaturesIn(int(config.cache.mm_processor_cache_gb * GIB), self._shared)
        self._num_starts = 0
        self._supervisor.watch(self._started)

    async def generate(
        self, ticket: Ticket, message: bytes, features: tuple[FeaturesRef, ...], clock: Clock
    ) -> AsyncGenerator[bytes, None]:
        """Run a sequence; ``message`` is a ``wire.Submit`` without features.

        Yields ``TAKEN``, ``NOT_TAKEN`` or ``OTHER_ENCODER``, then ``wire.Updates`` with all that
        has come meanwhile, or ``wire.Refused``, which ends it. Closing ends the sequence in the
        engine.
        """
        if not suit(features, self._space.value):
            yield OTHER_ENCODER
            return
        queue: OutputQueue = asyncio.Queue()
        offset = clock.offset()
        submit = wire.decode_to_engine(message)
        assert isinstance(submit, wire.Submit)
        request = _at_home(submit.request, offset)
        wanted = [item.digest for item in request.items]
        try:
            client = self._supervisor.current()
            items = await self._features.items(features, wanted)
            client.submit(request, items, queue)
        except errors.EngineDeadError:
            yield NOT_TAKEN + self._id.encode()
            return
        except errors.SensoriumError as error:
            yield TAKEN
            yield wire.encode(_refused(request.request_id, error))
            return
        try:
            yield TAKEN
            ended = False
            while not ended:
                news = [await queue.get()]
                if items and self._shared is not None:
                    # Once: the first update comes after all items have been encoded.
                    self._shared.offer(_own(items, wanted), client)
                    items = []
                while not queue.empty():
                    news.append(queue.get_nowait())
                for data, is_last in _messages(news, request.request_id, offset):
                    ended = is_last
                    yield data
        finally:
            client.abort([request.request_id])

    async def facts(self) -> bytes:
        """Return an ``EngineFacts`` in MessagePack."""
        return msgspec.msgpack.encode(self._facts)

    async def record_routing_stats(self) -> dict[str, bytes]:
        """Return what routers need to know, and what /metrics shows."""
        report = await self._report()
        return as_stats(report)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the number of replicas follows."""
        stats = self._stats
        usage = stats.kv_blocks_used / max(1, stats.kv_blocks_total)
        return {LOAD: load_of(stats.num_running + stats.num_waiting, self._max_num_seqs, usage)}

    async def check_health(self) -> None:
        """Raise RuntimeError when the engine has been gone for long."""
        if self._loss.is_final(self._supervisor.alive, self._supervisor.loading, time.monotonic()):
            raise RuntimeError("the engine cannot be brought back")

    async def __del__(self) -> None:
        await self._supervisor.stop()
        self._features.close()

    @property
    def _facts(self) -> EngineFacts:
        return dataclasses.replace(self._supervisor.facts, space=self._space.value)

    def _started(self, facts: EngineFacts) -> None:
        """Find out which weights the engine has, after each start but the first."""
        self._num_starts += 1
        if self._num_starts > 1:
            before = self._space.value
            self._space.forget()
            own_task(self._look(before, facts.numerics))

    async def _look(self, before: bytes, numerics: str) -> None:
        if await self._space.look(numerics) != before:
            self._shared = None
            self._features.stop_sharing()

    async def _report(self) -> ReplicaReport:
        up = self._supervisor.alive
        try:
            client = self._supervisor.current()
            self._stats = await asyncio.wait_for(client.stats(), STATS_SECONDS)
        except errors.EngineDeadError:
            self._stats = self._stats.at_rest()
        except TimeoutError:
            pass  # a long step: the last ones are shown
        self._num_reports += 1
        return ReplicaReport(
            up,
            self._facts,
            self._stats,
            self._supervisor.num_restarts,
            self._num_reports,
        )


def _own(items: Sequence[MediaItem], wanted: Sequence[bytes]) -> list[MediaItem]:
    """Return the items that the model's encoder, without an adapter, has encoded."""
    return [
        item
        for item, digest in zip(items, wanted, strict=True)
        if item.digest == digest and not item.features.precomputed
    ]


def _at_home(request: EngineRequest, offset: float) -> EngineRequest:
    """Return a request with its times by the clock of this machine."""
    if not offset:
        return request
    return dataclasses.replace(request, arrival_time=request.arrival_time + offset)


def _messages(
    news: list[SequenceUpdate | errors.SensoriumError], request_id: str, offset: float
) -> list[tuple[bytes, bool]]:
    """Return news of a sequence as messages, each with whether it is the last one."""
    found: list[tuple[bytes, bool]] = []
    updates = [_by_clock(one, offset) for one in news if isinstance(one, SequenceUpdate)]
    if updates:
        ended = updates[-1].finish_reason is not None
        found.append((wire.encode(wire.Updates(updates)), ended))
    refused = (_refused(request_id, one) for one in news if isinstance(one, errors.SensoriumError))
    return found + [(wire.encode(message), True) for message in refused]


def _refused(request_id: str, error: errors.SensoriumError) -> wire.Refused:
    return wire.Refused(request_id, error.message, error.code, error.param)


def _by_clock(update: SequenceUpdate, offset: float) -> SequenceUpdate:
    """Return an update with its times by the clock of the machine that asked."""
    if not offset:
        return update
    first, prefilled = update.first_scheduled_time, update.prefilled_time
    return dataclasses.replace(
        update,
        first_scheduled_time=None if first is None else first - offset,
        prefilled_time=None if prefilled is None else prefilled - offset,
        encoded=tuple((begin - offset, end - offset, n) for begin, end, n in update.encoded),
    )
