"""Ray Serve's request router around the one of ``sensorium.distributed.routing``."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from sensorium.ray.serving.fleet import Fleet, report_of, set_fleet
from sensorium.ray.serving.messages import Ticket


class EngineRouter(RequestRouter):
    """Chooses the replica of an engine for a sequence. Lives on Ray Serve's loop for routing.

    The request's first argument is a ``Ticket``. Without a key, as of other calls, the less loaded
    of two replicas is taken.
    """

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
        """Return one replica a rank, the best first."""
        ticket = _ticket_of(pending_request)
        usable = [r for r in candidate_replicas if r.replica_id.unique_id not in ticket.avoid]
        two = random.sample(usable or candidate_replicas, min(2, len(usable or candidate_replicas)))
        return [two]

    def _publish(self) -> None:
        reports = {r.replica_id.unique_id: report_of(r.routing_stats) for r in self._replicas_list}
        set_fleet(self._deployment_id.app_name, self._deployment_id.name, Fleet(reports))


def _ticket_of(pending_request: PendingRequest | None) -> Ticket:
    arguments: list[Any] = pending_request.args if pending_request is not None else []
    if arguments and isinstance(arguments[0], Ticket):
        return arguments[0]
    return Ticket()
