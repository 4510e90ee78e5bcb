"""The simulation of fleets, tiny: it follows the real scheduler, and shows what routers do."""

from __future__ import annotations

import pytest
from benchmarks.fleet.engine import Engine, EngineShape
from benchmarks.fleet.exact import ExactEngine
from benchmarks.fleet.images import images
from benchmarks.fleet.policies import POLICIES, Ours
from benchmarks.fleet.service import StepCosts, fit
from benchmarks.fleet.simulation import Fleet, FleetShape, simulate
from benchmarks.fleet.tables import PAGE, filled
from benchmarks.fleet.traces import Request, TraceShape, make_trace

COSTS = StepCosts(0.015, 0.0018, 0.0012, 0.0, 0.0, 0.008)


def trace(num_replicas: int, seconds: float) -> list[Request]:
    return make_trace(TraceShape(rate=0.35, seconds=seconds), num_replicas)


def test_skipped_steps_change_little() -> None:
    requests = trace(1, 150)
    runs = [
        simulate(requests, EngineShape(COSTS), FleetShape(1), "ours", kind=kind)
        for kind in (Engine, ExactEngine)
    ]
    fast, exact = runs
    assert fast["requests"] == exact["requests"] > 20
    assert fast["prefix_hit_rate"] == pytest.approx(exact["prefix_hit_rate"], abs=0.02)
    assert fast["media_hit_rate"] == exact["media_hit_rate"]
    assert fast["first_token_p50"] == pytest.approx(exact["first_token_p50"], rel=0.1)
    assert fast["busy"] == pytest.approx(exact["busy"], rel=0.05)


def test_caches_are_met_more_often_and_first_tokens_come_sooner() -> None:
    requests = trace(8, 60)
    shape = FleetShape(8, num_routers=2)
    found = {policy: simulate(requests, EngineShape(COSTS), shape, policy) for policy in POLICIES}
    ours, others = found.pop("ours"), found.values()
    assert ours["prefix_hit_rate"] > max(other["prefix_hit_rate"] for other in others)
    assert ours["first_token_p50"] < min(other["first_token_p50"] for other in others)


def test_a_loss_fails_what_was_in_flight_and_nothing_is_left() -> None:
    shape = FleetShape(10, num_routers=2, lost=0.2)
    fleet = Fleet(trace(10, 40), EngineShape(COSTS), shape, "ours")
    outcome = fleet.run()
    failed = [job for job in outcome.jobs if job.failed]
    dead = {engine.name for engine in outcome.engines if not engine.alive}
    assert len(dead) == 2
    assert failed
    assert all(not job.replica or job.replica in dead for job in failed)
    assert all(job.ended_at >= job.first_token_at for job in outcome.jobs if not job.failed)
    late = outcome.seconds / 2 + shape.notice_seconds
    assert not any(job.failed for job in outcome.jobs if job.sent_at > late)
    for router in fleet.routers:
        assert isinstance(router, Ours)
        assert len(router.waits()) == 8
    for engine in outcome.engines:
        assert not engine.alive or engine.kv.used == 0


def test_repeated_images_meet_a_replica_that_has_them() -> None:
    rows = [row for row in images(1000) if row["policy"] == "ours"]
    assert len(rows) == 2
    for row in rows:
        assert row["repeats_met"] >= 0.95
        assert row["requests_max_over_mean"] < 1.3


def test_the_page_shows_the_newest_results() -> None:
    text = PAGE.read_text()
    assert filled(text) == text


def test_costs_are_found_again() -> None:
    names = ("token", "sequence", "context", "item", "embedding")
    steps = [
        {"token": t, "sequence": s, "context": 50 * s, "item": i, "embedding": 30 * i + t / 10}
        for t in (0, 10, 500)
        for s in (1, 8, 30)
        for i in (0, 1, 4)
    ]
    wanted = StepCosts(0.015, 0.0018, 0.0012, 1e-6, 0.01, 0.001)
    for step in steps:
        step["seconds"] = wanted.seconds(*(step[name] for name in names))
    found = fit(steps)
    for step in steps:
        seconds = found.seconds(*(step[name] for name in names))
        assert seconds == pytest.approx(step["seconds"], rel=0.02)
