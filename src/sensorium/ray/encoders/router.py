"""Ray Serve's request router for encoders: an item goes where it is encoded or was before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from sensorium.distributed.routing.ring import HashRing
from sensorium.ray.encoders.fleet import set_encoders, set_taken
from sensorium.ray.encoders.messages import Ask, EncoderReport
from sensorium.ray.routing import ReplicaRouter, report_of


class EncoderRouter(ReplicaRouter):
    """Chooses the replica for an item by consistent hashing with bounded loads.

    The first argument of a call is an ``Ask``. All routers prefer the same replica for a key, so
    that those who want the same item share the work there.
    """

    def initialize_state(self, **_: Any) -> None:
        """Make the state; Ray Serve calls this once, before anything else."""
        self._ring = HashRing()
        self.num_open: Counter[str] = Counter()
        """Attempts that were sent and have not ended, by replica."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas, the best one first, each a rank of its own."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ask = _ask_of(pending_request)
        if ask is None:
            return [candidate_replicas]
        order = [name for name in self._ring.walk(ask.key, len(self._ring)) if name in by_id]
        order += [name for name in by_id if name not in order]
        return [[by_id[name]] for name in bounded(order, self.num_open)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note what was sent where, until this attempt ends, which it may have done already."""
        ask = _ask_of(pending_request)
        if ask is None:
            return
        name = replica_id.unique_id
        self.num_open[name] += 1
        set_taken(ask.number)
        self.call_at_end(result, self._ended, name)

    def _ended(self, name: str) -> None:
        self.num_open[name] -= 1
        if not self.num_open[name]:
            del self.num_open[name]

    def publish(self) -> None:
        """Tell this router, and the other threads of this process, what is known of replicas."""
        found = {
            replica.replica_id.unique_id: report_of(replica.routing_stats, EncoderReport)
            for replica in self._replicas_list
        }
        self._ring.set(found)
        set_encoders(self._deployment_id.app_name, self._deployment_id.name, found)


def _ask_of(pending_request: PendingRequest | None) -> Ask | None:
    arguments: list[Any] = pending_request.args if pending_request is not None else []
    return arguments[0] if arguments and isinstance(arguments[0], Ask) else None


def bounded(order: Sequence[str], num_open: Mapping[str, int]) -> list[str]:
    """Return names in their order, but those with more than their part of the open items last.

    An encoder makes one item at a time: none should wait while another one is idle.
    """
    total = sum(num_open.get(name, 0) for name in order) + 1
    most = math.ceil(total / max(1, len(order)))
    return sorted(order, key=lambda name: num_open.get(name, 0) >= most)
