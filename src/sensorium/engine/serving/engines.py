"""The engines of a model as the frontend sees them: one that is supervised here, or replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from sensorium.core.request import EngineRequest
from sensorium.engine.serving.client import OutputQueue
from sensorium.engine.stats import EncodersApart, EngineFacts, EngineStats
from sensorium.multimodal.items import MediaItem


class ReplicaStats(NamedTuple):
    """Counters of one replica, and True if its engine takes requests."""

    stats: EngineStats
    is_up: bool


class EngineDoor(Protocol):
    """Way to the engine, or to several, that take requests now."""

    def submit(
        self, request: EngineRequest, items: Sequence[MediaItem], output_queue: OutputQueue
    ) -> None:
        """Send a sequence; its updates, or its error, go to ``output_queue`` until it ends.

        Raises EngineDeadError when there is no engine any more.
        """

    def abort(self, request_ids: Sequence[str]) -> None:
        """End sequences; ids of ended ones are ignored."""

    async def stats(self) -> EngineStats:
        """Return the counters; of several engines their sums. Raises EngineDeadError."""
        ...


class Engines(Protocol):
    """The engines of one model. All methods are called on one event loop."""

    @property
    def facts(self) -> EngineFacts:
        """Return what holds for each engine that may get a request."""
        ...

    @property
    def num_restarts(self) -> int:
        """Return how many engines that died were replaced."""
        ...

    async def start(self) -> None:
        """Start, or wait for one that runs. Raises ConfigError when it cannot start."""

    def watch(self, on_start: Callable[[EngineFacts], None]) -> None:
        """Call ``on_start`` with the facts, now and before a request can meet other ones."""

    def current(self) -> EngineDoor:
        """Return the way to the engines that take requests now.

        Raises EngineDeadError with a ``retry_after`` while there are none.
        """
        ...

    async def replica_stats(self) -> dict[str, ReplicaStats]:
        """Return the counters of each replica by its name; nothing where there is one engine."""
        ...

    def encoder_stats(self) -> EncodersApart | None:
        """Return the counters of replicas that encode media apart; None where engines do."""
        ...

    async def load_adapter(self, name: str, path: str, folder: str) -> EngineFacts:
        """Load an adapter and return the facts with it; see ``EngineClient``."""
        ...

    async def unload_adapter(self, name: str) -> EngineFacts:
        """Forget an adapter that no request uses; see ``EngineClient``."""
        ...

    async def stop(self) -> None:
        """Release everything; engines that were started here end."""
