"""Simulation of fleets: what routers do to hit rates, times to the first token and balance.

    python -m benchmarks.fleet [SECTION ...] [--replicas N ...] [--quick] [--output FILE]

Sections: ``approximation`` compares the simulated engine with the real scheduler, step by step;
``table`` compares policies by the size of the fleet; ``loss`` ends a tenth of the replicas in the
middle; ``images`` sends 1,000 requests over 50 images; ``constants`` varies those of the router.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.fleet.engine import Engine, EngineShape
from benchmarks.fleet.exact import ExactEngine
from benchmarks.fleet.images import images
from benchmarks.fleet.policies import POLICIES
from benchmarks.fleet.service import StepCosts, of_a_model
from benchmarks.fleet.simulation import FleetShape, simulate
from benchmarks.fleet.traces import TraceShape, make_trace
from benchmarks.harness import Report
from sensorium.distributed.routing import RoutingCosts

SECTIONS = ("approximation", "images", "table", "loss", "constants")
ROUTERS = {1: 1, 8: 1, 64: 2, 512: 8, 4000: 16}
"""Routers by the number of replicas."""
SWEEP: dict[str, tuple[float, ...]] = {
    "sequence": (8.0, 32.0, 128.0),
    "embedding": (1.0, 4.0, 8.0),
    "spread": (0.0, 0.5, 2.0),
    "slack": (128.0, 1024.0, 4096.0),
    "places": (1.0, 2.0, 4.0),
    "excess": (0.0, 64.0, 256.0),
    "prior": (0.0, 0.5, 0.75, 1.0),
}
SHOWN = (
    *("policy", "num_replicas", "num_routers", "prefix_hit_rate", "media_hit_rate"),
    *("first_token_p50", "first_token_p99", "busy_max_over_mean", "failed", "wall_seconds"),
)

Run = tuple[StepCosts, TraceShape, FleetShape, str, dict[str, float], str]


def run(task: Run) -> dict[str, Any]:
    """Run one simulation, maybe in another process."""
    costs, trace_shape, fleet, policy, constants, kind = task
    began = time.perf_counter()
    trace = make_trace(trace_shape, fleet.num_replicas)
    engine = EngineShape(costs)
    chosen = ExactEngine if kind == "exact" else Engine
    found = simulate(trace, engine, fleet, policy, RoutingCosts(**constants), chosen)
    wall = time.perf_counter() - began
    return {"engine": kind, "constants": constants, **found, "wall_seconds": round(wall, 2)}


def tasks_of(section: str, costs: StepCosts, options: argparse.Namespace) -> Iterator[Run]:
    """The simulations of a section."""
    trace = TraceShape(rate=options.rate, seconds=options.seconds)
    sizes = [(n, ROUTERS.get(n, max(1, n // 64))) for n in options.replicas]
    if section == "approximation":
        for n in sorted({1, 8} if max(options.replicas) >= 8 else {1}):
            longer = dataclasses.replace(trace, seconds=trace.seconds * (4 if n == 1 else 2))
            for kind in ("steps skipped", "exact"):
                for policy in ("least loaded", "ours"):
                    yield costs, longer, FleetShape(n), policy, {}, kind
    elif section == "constants":
        n, routers = min(64, max(options.replicas)), 4
        for name, values in SWEEP.items():
            for value in values:
                shape = FleetShape(n, min(routers, n))
                yield costs, trace, shape, "ours", {name: value}, "steps skipped"
    else:
        for n, routers in sizes:
            if section == "loss" and not 8 <= n <= 512:
                continue
            lost = 0.1 if section == "loss" else 0.0
            for policy in POLICIES:
                shape = FleetShape(n, routers, lost=lost)
                yield costs, trace, shape, policy, {}, "steps skipped"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=[])
    parser.add_argument("--replicas", type=int, nargs="+", default=list(ROUTERS))
    parser.add_argument("--rate", type=float, default=0.35, help="requests a second and replica")
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated time")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a tiny fleet, for a test")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.replicas, options.seconds, options.processes = [2, 8], 30.0, 1
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    costs = of_a_model()
    settings = {
        "costs": dataclasses.asdict(costs),
        "rate": options.rate,
        "seconds": options.seconds,
    }
    report = Report("fleet", settings, options.output)
    for section in options.sections or SECTIONS:
        print(section)
        report.write(**{section: list(_results(section, costs, options))})


def _results(
    section: str, costs: StepCosts, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    if section == "images":
        for row in images(100 if options.quick else 1000):
            print("  ", row, flush=True)
            yield row
        return
    tasks = list(tasks_of(section, costs, options))
    pool = ProcessPoolExecutor(options.processes) if options.processes > 1 else None
    found: Iterable[dict[str, Any]] = map(run, tasks) if pool is None else pool.map(run, tasks)
    for row in found:
        line = {name: row[name] for name in SHOWN}
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()]
        print("  ", row["engine"], row["constants"] or "", *cells, flush=True)
        yield row


if __name__ == "__main__":
    main()
