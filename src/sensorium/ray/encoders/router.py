"""Ray Serve's request router for encoders: an item goes where it is encoded or was before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from sensorium.distributed.routing.ring import HashRing
from sensorium.ray.encoders.fleet import report_of, set_encoders


class EncoderRouter(RequestRouter):
    """Chooses the replica for an item by consistent hashing with bounded loads.

    The first argument of a call is the digest of its item. All routers prefer the same replica for
    it, so that those who want the same item share the work there.
    """

    def initialize_state(self, **_: Any) -> None:
        """Make the state; Ray Serve calls this once, before anything else."""
        self._ring = HashRing()
        self._open: dict[str, str] = {}
        """By Ray Serve's id of a request that has not ended: its replica."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas there are and what they report."""
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that has died, before the controller says so."""
        super().on_replica_actor_died(replica_id)
        self._publish()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas, the best one first, each a rank of its own."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        arguments: list[Any] = pending_request.args if pending_request is not None else []
        if not arguments or not isinstance(arguments[0], bytes):
            return [candidate_replicas]
        order = [name for name in self._ring.walk(arguments[0], len(self._ring)) if name in by_id]
        order += [name for name in by_id if name not in order]
        return [[by_id[name]] for name in bounded(order, Counter(self._open.values()))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note what was sent where."""
        self._open[pending_request.metadata.internal_request_id] = replica_id.unique_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note the end of a request, however it ended. Called from other threads, too."""
        self._event_loop.call_soon_threadsafe(self._open.pop, internal_request_id, None)

    def _publish(self) -> None:
        """Tell this router, and the other threads of this process, what is known of replicas."""
        found = {r.replica_id.unique_id: report_of(r.routing_stats) for r in self._replicas_list}
        self._ring.set(found)
        self._open = {id: name for id, name in self._open.items() if name in found}
        set_encoders(self._deployment_id.app_name, self._deployment_id.name, found)


def bounded(order: Sequence[str], num_open: Mapping[str, int]) -> list[str]:
    """Return names in their order, but those with more than their part of the open items last.

    An encoder makes one item at a time: none should wait while another one is idle.
    """
    total = sum(num_open.get(name, 0) for name in order) + 1
    most = math.ceil(total / max(1, len(order)))
    return sorted(order, key=lambda name: num_open.get(name, 0) >= most)
