"""Ray Serve's request router around the one of ``sensorium.distributed.routing``."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from sensorium.distributed.routing import ReplicaLoad, RequestKey, Router
from sensorium.ray.routing import ReplicaRouter, report_of
from sensorium.ray.serving.fleet import Fleet, ReplicaReport, set_fleet
from sensorium.ray.serving.messages import Ticket


class EngineRouter(ReplicaRouter):
    """Chooses the replica of an engine for a sequence. Lives on Ray Serve's loop for routing.

    The request's first argument is a ``Ticket``. For calls without a key the router of
    ``sensorium.distributed.routing`` compares two replicas at random.
    """

    def initialize_state(self, num_routers: int = 1, **_: Any) -> None:
        """Make the state; Ray Serve calls this once, before anything else.

        ``num_routers``: processes that have a router of their own.
        """
        self.router = Router(num_routers=num_routers)
        self._by_id: dict[str, RunningReplica] = {}
        self._reported: dict[str, object] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas, the best one first, each a rank of its own."""
        ticket = _ticket_of(pending_request)
        by_id, among = self._by_id, None
        # Ray Serve's own list is all that there are: with thousands of replicas, looking at each
        # of them would take longer than the decision.
        if candidate_replicas is not self._replicas_list or ticket.avoid:
            by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            among = [name for name in by_id if name not in ticket.avoid] or list(by_id)
        key = ticket.key if isinstance(ticket.key, RequestKey) else None
        chosen = self.router.choose(key, among)
        return [[by_id[name]] for name in chosen if name in by_id] or [candidate_replicas]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note what was sent where, until this attempt ends, which it may have done already."""
        key = _ticket_of(pending_request).key
        if isinstance(key, RequestKey):
            name = replica_id.unique_id
            self.router.sent(name, key)
            self.call_at_end(result, self.router.ended, name, key)

    def publish(self) -> None:
        """Tell the router, and the other threads of this process, what is known of replicas."""
        self._by_id = {replica.replica_id.unique_id: replica for replica in self._replicas_list}
        reports = {
            name: report_of(replica.routing_stats, ReplicaReport)
            for name, replica in self._by_id.items()
        }
        self.router.set_replicas(list(reports))
        for name, report in reports.items():
            if report is not None and self._reported.get(name) != report.number:
                self.router.report(name, _load_of(report))
        self._reported = {n: r.number for n, r in reports.items() if r is not None}
        set_fleet(self._deployment_id.app_name, self._deployment_id.name, Fleet(reports))


def _ticket_of(pending_request: PendingRequest | None) -> Ticket:
    arguments: list[Any] = pending_request.args if pending_request is not None else []
    if arguments and isinstance(arguments[0], Ticket):
        return arguments[0]
    return Ticket()


def _load_of(report: ReplicaReport) -> ReplicaLoad:
    stats = report.stats
    return ReplicaLoad(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        waiting_tokens=stats.waiting_tokens,
        kv_usage=stats.kv_blocks_used / max(1, stats.kv_blocks_total),
        healthy=report.up,
        kv_tokens=stats.kv_blocks_total * stats.block_size,
        computed_tokens=stats.computed_tokens,
        encoder_items=stats.encoder_items,
        encoder_evictions=stats.encoder_evictions,
    )
