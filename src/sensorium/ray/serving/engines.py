"""The engines of a model that are replicas on Ray, as the frontend sees them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import msgspec
from ray.exceptions import RayError

from sensorium import errors
from sensorium.core.request import EngineRequest
from sensorium.distributed.routing import RequestKey, request_key
from sensorium.engine import wire
from sensorium.engine.serving.client import STOPPING, OutputQueue, dead_error
from sensorium.engine.serving.engines import ReplicaStats
from sensorium.engine.stats import EncodersApart, EngineFacts, EngineStats
from sensorium.multimodal.items import MediaItem
from sensorium.ray.encoders.client import Encoders
from sensorium.ray.media.features import FeaturesOut, FeaturesRef
from sensorium.ray.serving.fleet import Fleet, ReplicaReport, common_facts, fleet_of
from sensorium.ray.serving.messages import NOT_TAKEN, OTHER_ENCODER, TAKEN, Clock, Ticket
from sensorium.ray.tasks import own_task

logger = logging.getLogger(__name__)

TAKEN_SECONDS = 30.0
"""Most time until some replica has taken a sequence; replicas take them without a queue."""
RETRY_SECONDS = 5.0
"""Time after which a client may try again when no replica is there."""
MOST_TRIES = 4
"""Replicas without an engine that a sequence is offered to."""
LOOK_SECONDS = 1.0
"""Interval at which facts of the replicas are compared with those before."""


class RayEngines:
    """Replicas behind a handle of Ray Serve. All methods are called on one event loop.

    ``features``: puts those of items into the object store. ``encoders``: they encode items before
    a sequence is sent to an engine; None where engines do that.
    """

    def __init__(
        self, handle: Any, features: FeaturesOut, encoders: Encoders | None = None
    ) -> None:
        self._handle = handle
        self._encoders = encoders
        self._generate = handle.options(stream=True).generate
        self._prefix = f"{secrets.token_hex(6)}-"
        """Makes the ids of sequences unique among all who send to an engine."""
        self._features = features
        self._facts: EngineFacts | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def facts(self) -> EngineFacts:
        """Return what holds for all replicas that are up."""
        if self._facts is None:
            raise errors.EngineDeadError("The engines have not been started.")
        return self._facts

    @property
    def num_restarts(self) -> int:
        """Return how many engine processes the replicas that are there have replaced."""
        reports = self._fleet().reports.values()
        return sum(report.num_restarts for report in reports if report is not None)

    async def start(self) -> None:
        """Wait until a replica is up, and get its facts."""
        data = await self._handle.facts.remote()
        self._facts = msgspec.msgpack.decode(data, type=EngineFacts)

    def watch(self, on_start: Callable[[EngineFacts], None]) -> None:
        """Call ``on_start`` with the facts, now and when they have changed."""
        on_start(self.facts)
        self._watching = asyncio.create_task(self._keep_facts(on_start))

    def current(self) -> RayEngines:
        """Return this object. Raises EngineDeadError while no replica is up."""
        if self._stopping:
            raise errors.EngineDeadError(STOPPING)
        if not self._fleet().is_up:
            raise dead_error(RETRY_SECONDS)
        return self

    def submit(
        self, request: EngineRequest, items: Sequence[MediaItem], output_queue: OutputQueue
    ) -> None:
        """Send a sequence to the replica that the router chooses."""
        running = self._run(request, tuple(items), output_queue)
        self._tasks[request.request_id] = own_task(running)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End sequences; ids of ended ones are ignored."""
        for request_id in request_ids:
            task = self._tasks.pop(request_id, None)
            if task is not None:
                task.cancel()

    async def stats(self) -> EngineStats:
        """Return the sums over the replicas of what each reported last."""
        return summed([found.stats for found in (await self.replica_stats()).values()])

    async def replica_stats(self) -> dict[str, ReplicaStats]:
        """Return what each replica reported last, by its id."""
        reports = self._fleet().reports.items()
        return {
            name: ReplicaStats(_stats_of(report), report.up)
            for name, report in reports
            if report is not None
        }

    def encoder_stats(self) -> EncodersApart | None:
        """Return the counters of encoders apart; None where engines encode media."""
        return None if self._encoders is None else self._encoders.stats()

    async def load_adapter(self, name: str, path: str, folder: str) -> EngineFacts:
        """Refuse: replicas have the adapters of ``--lora-modules``."""
        raise errors.InvalidRequestError("Replicas load no adapters while they run.")

    async def unload_adapter(self, name: str) -> EngineFacts:
        """Refuse, as ``load_adapter``."""
        raise errors.InvalidRequestError("Replicas unload no adapters while they run.")

    async def stop(self) -> None:
        """End all sequences of this process; the replicas go on."""
        self._stopping = True
        tasks = list(self._tasks.values())
        if self._watching is not None:
            tasks.append(self._watching)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fleet(self) -> Fleet:
        fleet = fleet_of(self._handle.app_name, self._handle.deployment_name)
        return fleet if fleet is not None else Fleet({"": None})

    async def _keep_facts(self, on_start: Callable[[EngineFacts], None]) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            reports = [r for r in self._fleet().reports.values() if r is not None and r.up]
            if not reports:
                continue
            facts = common_facts([report.facts for report in reports])
            if facts != self._facts:
                self._facts = facts
                on_start(facts)

    async def _run(
        self, request: EngineRequest, items: tuple[MediaItem, ...], output_queue: OutputQueue
    ) -> None:
        """Run a sequence and pass its updates on; whatever goes wrong becomes its error."""
        try:
            await self._taken_and_run(request, items, output_queue)
        except errors.SensoriumError as error:
            output_queue.put_nowait(error)
        except asyncio.CancelledError:
            if self._stopping:  # who waits for its end was not the one to end it
                output_queue.put_nowait(errors.EngineDeadError(STOPPING))
            raise
        except (RayError, TimeoutError) as error:
            logger.warning("a sequence is lost: %s", _first_line(error))
            output_queue.put_nowait(dead_error(RETRY_SECONDS))
        except Exception:
            logger.exception("a sequence is lost")
            output_queue.put_nowait(dead_error(RETRY_SECONDS))
        finally:
            self._tasks.pop(request.request_id, None)

    async def _taken_and_run(
        self, request: EngineRequest, items: tuple[MediaItem, ...], output_queue: OutputQueue
    ) -> None:
        """Offer a sequence until a replica takes it; it is never sent again after that."""
        features = await self._references(request, items)
        own_id = request.request_id
        sent = dataclasses.replace(request, request_id=self._prefix + own_id)
        message = wire.encode(wire.Submit(sent, ()))
        key = _key_of(request)
        avoid: tuple[str, ...] = ()
        while True:
            self.current()
            answer = self._generate.remote(Ticket(key, avoid), message, features, Clock.now())
            try:
                first = await asyncio.wait_for(anext(answer), TAKEN_SECONDS)
                if first == TAKEN:
                    await self._deliver(answer, own_id, output_queue)
                    return
                if first == OTHER_ENCODER and self._encoders is not None:
                    features = await self._encoders.plain(items)
                    continue
                if not first.startswith(NOT_TAKEN):
                    raise errors.EngineDeadError("The engine sent an unexpected first message.")
            except BaseException:
                answer.cancel()
                raise
            avoid = (*avoid, first.removeprefix(NOT_TAKEN).decode())
            if len(avoid) >= MOST_TRIES:
                raise dead_error(RETRY_SECONDS)

    async def _references(
        self, request: EngineRequest, items: tuple[MediaItem, ...]
    ) -> tuple[FeaturesRef, ...]:
        """Return references to the features of items, or to embeddings that encoders made."""
        if self._encoders is None:
            return await self._features.references(items)
        wanted = [item.digest for item in request.items]
        return await self._encoders.references(items, wanted, self._accepted())

    def _accepted(self) -> dict[bytes, EngineFacts]:
        """Return the facts of the engines that are up, by the identity of their encoders."""
        reports = self._fleet().reports.values()
        up = [report.facts for report in reports if report is not None and report.up]
        return {facts.space: facts for facts in up or [self.facts] if facts.space}

    async def _deliver(self, answer: Any, own_id: str, output_queue: OutputQueue) -> None:
        """Pass on the updates of a sequence until it ends."""
        async for data in answer:
            message = wire.decode_from_engine(data)
            if isinstance(message, wire.Refused):
                raise _error_of(message)
            assert isinstance(message, wire.Updates)
            for update in message.updates:
                output_queue.put_nowait(dataclasses.replace(update, request_id=own_id))


def _stats_of(report: ReplicaReport) -> EngineStats:
    stats = report.stats if report.up else report.stats.at_rest()
    return dataclasses.replace(stats, num_engine_restarts=report.num_restarts)


def summed(all_stats: Sequence[EngineStats]) -> EngineStats:
    """Return the sums of gauges and counters of engines; what is no number is the first one's."""
    total = dataclasses.replace(all_stats[0]) if all_stats else EngineStats()
    for stats in all_stats[1:]:
        for field in dataclasses.fields(EngineStats):
            if field.name in ("block_size", "max_loras"):
                continue
            mine, other = getattr(total, field.name), getattr(stats, field.name)
            setattr(total, field.name, _sum(mine, other))
    return total


def _sum(mine: Any, other: Any) -> Any:
    if isinstance(mine, bool | str):
        return mine
    if isinstance(mine, int | float):
        return mine + other
    if isinstance(mine, dict):
        return {key: mine.get(key, 0) + other.get(key, 0) for key in {**mine, **other}}
    if any(isinstance(value, str) for value in (*mine, *other)):
        return list(dict.fromkeys([*mine, *other]))
    return [a + b for a, b in zip_longest(mine, other, fillvalue=0)]


def _key_of(request: EngineRequest) -> RequestKey:
    return request_key(
        request.token_ids,
        request.items,
        salt=request.cache_salt,
        adapter=request.adapter,
        rope_length=request.rope_length_at(len(request.token_ids)),
    )


def _error_of(message: wire.Refused) -> errors.SensoriumError:
    error = errors.error_of(message.code, message.message, message.param, errors.UnavailableError)
    if isinstance(error, errors.EngineDeadError):
        with contextlib.suppress(AttributeError):
            error.retry_after = int(RETRY_SECONDS)
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
