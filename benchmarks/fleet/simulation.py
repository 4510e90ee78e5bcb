"""The simulation: a trace, routers whose reports are late, replicas, a loss in the middle."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import simpy

from benchmarks.fleet import policies
from benchmarks.fleet.engine import Engine, EngineShape, Job
from benchmarks.fleet.exact import ExactEngine
from benchmarks.fleet.traces import Request
from sensorium.distributed.routing import RoutingCosts

AnyEngine = Engine | ExactEngine
AFTER_LOSS = 20.0
"""Seconds after a loss of replicas whose requests are looked at apart."""


@dataclass(frozen=True, slots=True)
class FleetShape:
    """A fleet: replicas, routers that do not talk, how often and how late replicas report.

    ``lost``: the share of replicas that end in the middle of the trace; routers notice after
    ``notice_seconds``.
    """

    num_replicas: int
    num_routers: int = 1
    report_seconds: float = 1.0
    lag_seconds: float = 0.2
    lost: float = 0.0
    notice_seconds: float = 0.5
    warm_up: float = 0.25


@dataclass(slots=True)
class Outcome:
    """What a run gave: all jobs, the engines, times."""

    jobs: list[Job]
    engines: list[AnyEngine]
    seconds: float
    ended: float
    shape: FleetShape

    def summary(self) -> dict[str, Any]:
        """Rates, times and balance of the requests behind the warm-up."""
        begin = self.shape.warm_up * self.seconds
        jobs = [j for j in self.jobs if j.sent_at >= begin and not math.isnan(j.first_token_at)]
        first = np.array([job.first_token_at - job.sent_at for job in jobs])
        tokens = sum(job.request.num_tokens for job in jobs)
        items = sum(len(job.request.media) for job in jobs)
        alive = [engine for engine in self.engines if engine.alive]
        count, busy = np.array([e.num_jobs for e in alive]), np.array([e.busy for e in alive])
        loss = self.seconds / 2
        after = [j for j in jobs if loss <= j.sent_at < loss + AFTER_LOSS]
        waits = [job.first_token_at - job.sent_at for job in after]
        lost = {"first_token_p99_after_loss": float(np.quantile(waits, 0.99))} if waits else {}
        return {
            "requests": len(self.jobs),
            "failed": sum(job.failed for job in self.jobs),
            "prefix_hit_rate": sum(job.cached for job in jobs) / max(1, tokens),
            "media_hit_rate": sum(job.items_met for job in jobs) / max(1, items),
            "first_token_p50": float(np.quantile(first, 0.5)),
            "first_token_p99": float(np.quantile(first, 0.99)),
            "first_token_mean": float(first.mean()),
            "requests_max_over_mean": float(count.max() / count.mean()),
            "busy_max_over_mean": float(busy.max() / busy.mean()),
            "busy": float(busy.mean() / self.ended),
            **(lost if self.shape.lost else {}),
        }


class Fleet:
    """One run."""

    def __init__(
        self,
        trace: list[Request],
        engine: EngineShape,
        shape: FleetShape,
        policy: str,
        costs: RoutingCosts | None = None,
        seed: int = 0,
        kind: Callable[[simpy.Environment, str, EngineShape], AnyEngine] = Engine,
    ) -> None:
        self.env = simpy.Environment()
        self.trace, self.shape = trace, shape
        names = [f"replica-{i}" for i in range(shape.num_replicas)]
        self.engines = {name: kind(self.env, name, engine) for name in names}
        self.routers = [
            policies.make(policy, seed + i, shape.num_routers, costs)
            for i in range(shape.num_routers)
        ]
        for router in self.routers:
            router.set_replicas(names)
        self.jobs: list[Job] = []
        self.draw = random.Random(seed)
        self.end = trace[-1].arrival

    def run(self) -> Outcome:
        """Run until all requests of the trace have ended."""
        self.env.process(self._arrivals())
        for place, engine in enumerate(self.engines.values()):
            self._report_later(engine, self.shape.report_seconds * place / len(self.engines))
        if self.shape.lost:
            self.env.process(self._loss())
        self.env.run()
        return Outcome(self.jobs, list(self.engines.values()), self.end, self.env.now, self.shape)

    def _arrivals(self) -> Any:
        for request in self.trace:
            if request.arrival > self.env.now:
                yield self.env.timeout(request.arrival - self.env.now)
            self._route(request)

    def _route(self, request: Request) -> None:
        router = self.routers[self.draw.randrange(len(self.routers))]
        chosen = router.choose(request.key)
        router.sent(chosen, request.key)

        def notify(job: Job, event: str) -> None:
            if event == "first":
                router.first_token(chosen, request.key)
            else:
                router.ended(chosen, request.key)
                if request.next is not None and not job.failed:
                    self._route_later(request.next)

        job = Job(request, self.env.now, notify=notify)
        self.jobs.append(job)
        engine = self.engines[chosen]
        if engine.alive:
            engine.submit(job)
        else:
            job.failed = True
            router.ended(chosen, request.key)

    def _route_later(self, request: Request) -> None:
        """Send the next turn when its user has read the answer, until the end of the trace."""
        if self.env.now + request.think_seconds < self.end:
            timeout = self.env.timeout(request.think_seconds)
            timeout.callbacks.append(lambda _: self._route(request))

    def _report_later(self, engine: AnyEngine, seconds: float) -> None:
        timeout = self.env.timeout(seconds)
        timeout.callbacks.append(lambda _: self._report(engine))

    def _report(self, engine: AnyEngine) -> None:
        """Send the load to all routers, which get it later; go on while there are requests."""
        if not engine.alive or self.env.now > self.end:
            return
        load = engine.load()
        timeout = self.env.timeout(self.shape.lag_seconds)
        timeout.callbacks.append(lambda _: self._deliver(engine.name, load))
        self._report_later(engine, self.shape.report_seconds)

    def _deliver(self, name: str, load: Any) -> None:
        for router in self.routers:
            router.report(name, load)

    def _loss(self) -> Any:
        yield self.env.timeout(self.end / 2)
        lost = self.draw.sample(sorted(self.engines), round(self.shape.lost * len(self.engines)))
        failed = [job for name in lost for job in self.engines[name].die()]  # type: ignore[union-attr]
        yield self.env.timeout(self.shape.notice_seconds)
        left = [name for name in self.engines if name not in set(lost)]
        for router in self.routers:
            router.set_replicas(left)
        for job in failed:
            job.notify(job, "ended")


def simulate(
    trace: list[Request],
    engine: EngineShape,
    shape: FleetShape,
    policy: str,
    costs: RoutingCosts | None = None,
    kind: Callable[[simpy.Environment, str, EngineShape], AnyEngine] = Engine,
) -> dict[str, Any]:
    """Run a fleet; return the summary with what it was."""
    found = Fleet(trace, engine, shape, policy, costs, kind=kind).run().summary()
    return {"policy": policy, **asdict(shape), **found}
