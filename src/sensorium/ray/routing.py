"""Request router of Ray Serve for replicas of any kind, and the reports that it reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from ray.serve.request_router import ReplicaID, RequestRouter, RunningReplica

Report = TypeVar("Report", bound=msgspec.Struct)

_STATS_KEY = "sensorium"
"""Key of a report among the statistics that Ray Serve carries for routers."""


def as_stats(report: msgspec.Struct) -> dict[str, bytes]:
    """Return a replica's report on itself as statistics that Ray Serve carries for routers."""
    return {_STATS_KEY: msgspec.msgpack.encode(report)}


def report_of(routing_stats: Mapping[str, object], kind: type[Report]) -> Report | None:
    """Return the report in the statistics of a replica, None where there is none."""
    data = routing_stats.get(_STATS_KEY)
    return msgspec.msgpack.decode(data, type=kind) if isinstance(data, bytes) else None


class ReplicaRouter(RequestRouter):
    """Router that tells the threads of its process which replicas there are.

    Lives on Ray Serve's loop for routing.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas there are and what they report."""
        super().update_replicas(replicas)
        self.publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that has died, before the controller says so."""
        super().on_replica_actor_died(replica_id)
        self.publish()

    @abstractmethod
    def publish(self) -> None:
        """Tell this router, and the other threads of this process, what is known of replicas."""

    def call_at_end(self, result: Any, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function on the loop of the router when an attempt ends, perhaps at once.

        ``result``: of the attempt, as ``on_request_routed`` gets it. A rejected attempt never comes
        there, but Ray Serve calls ``on_request_completed`` for it as well, with the id that its
        next attempt has. So the end is that of ``result``.
        """
        loop = self._event_loop
        # Called at once for what has ended, from other threads, too.
        result.add_done_callback(lambda _: loop.call_soon_threadsafe(function, *arguments))
