"""Time of a router's decision, and its memory, by the number of replicas; one thread.

    python -m benchmarks.fleet.decisions [--replicas N ...] [--output FILE]

Keys are those of the simulation's traces. Times are of ``choose`` alone, and of all calls for a
request together (``choose``, ``sent``, ``first_token``, ``ended``), in CPU time. Memory is what the
router has allocated once its memory of contents is full, and what it keeps at most.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet.traces import Request, TraceShape, make_trace
from benchmarks.harness import Report, Row
from sensorium.distributed.routing import ReplicaLoad, RequestKey, Router

MOST_MICROSECONDS = 100.0


def keys_of(num_replicas: int, count: int) -> list[RequestKey]:
    """Keys of the turns of a trace, by their arrival."""
    shape = TraceShape(seconds=max(60.0, 3 * count / num_replicas / 0.5))
    requests: list[tuple[float, RequestKey]] = []
    for first in make_trace(shape, num_replicas)[:count]:
        turn: Request | None = first
        now = first.arrival
        while turn is not None:
            now += turn.think_seconds
            requests.append((now, turn.key))
            turn = turn.next
    return [key for _, key in sorted(requests, key=lambda pair: pair[0])][:count]


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.thread_time_ns()
    result = call(*arguments)
    return (time.thread_time_ns() - began) / 1e3, result


def measure(num_replicas: int, count: int) -> dict[str, Any]:
    """Microseconds of decisions with so many replicas, each with some load."""
    router, draw = Router(seed=0), random.Random(0)
    ids = [f"replica-{i}" for i in range(num_replicas)]
    set_us, _ = _timed(router.set_replicas, ids)
    keys = keys_of(num_replicas, count)
    choose, all_calls = [], []
    report: list[float] = []
    open_: list[tuple[str, RequestKey]] = []
    for place, key in enumerate(keys):
        choose_us, chosen = _timed(router.choose, key)
        sent_us, _ = _timed(router.sent, chosen[0], key)
        first_us, _ = _timed(router.first_token, chosen[0], key)
        open_.append((chosen[0], key))
        id, old = open_[max(0, len(open_) - 8 * num_replicas)]
        ended_us, _ = _timed(router.ended, id, old)
        choose.append(choose_us)
        all_calls.append(choose_us + sent_us + first_us + ended_us)
        load = ReplicaLoad(
            draw.randrange(12), draw.randrange(3), draw.randrange(2000), draw.random()
        )
        report.append(_timed(router.report, ids[place % num_replicas], load)[0])
    half = len(choose) // 2
    return {
        "replicas": num_replicas,
        "decisions": len(choose) - half,
        "choose_us": _quantiles(choose[half:]),
        "all_calls_us": _quantiles(all_calls[half:]),
        "report_us": _quantiles(report[half:]),
        "set_replicas_ms": set_us / 1e3,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    return {
        "p50": float(np.quantile(values, 0.5)),
        "p99": float(np.quantile(values, 0.99)),
        "mean": float(np.mean(values)),
    }


def memory(num_replicas: int, capacity: int) -> dict[str, Any]:
    """Bytes of a router whose memory of contents is full, with as many prefixes as media."""
    tracemalloc.start()
    router, draw = Router(seed=0, capacity=capacity), random.Random(0)
    ids = [f"replica-{i}" for i in range(num_replicas)]
    router.set_replicas(ids)
    for key in _new_keys(draw):
        id = ids[draw.randrange(num_replicas)]
        router.sent(id, key)
        router.ended(id, key)
        if router.num_remembered >= 2 * capacity * 0.98:
            break
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"replicas": num_replicas, "capacity": capacity, "bytes": used, "peak_bytes": peak}


def _new_keys(draw: random.Random) -> Iterator[RequestKey]:
    for _ in range(1 << 24):
        digests = tuple(draw.randbytes(8) for _ in range(8))
        yield RequestKey(512, digests, tuple((draw.randbytes(8), 64) for _ in range(8)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 512, 4000])
    parser.add_argument("--decisions", type=int, default=20_000)
    parser.add_argument("--capacity", type=int, default=1 << 18)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {"decisions": options.decisions, "capacity": options.capacity}
    report = Report("fleet-decisions", settings, options.output)
    found = []
    for number in options.replicas:
        found.append(measure(number, options.decisions))
        report.write(decisions=found)
        p50, p99 = found[-1]["choose_us"]["p50"], found[-1]["choose_us"]["p99"]
        print(Row(f"{number} replicas: decision, median", p50, "us", most=MOST_MICROSECONDS))
        print(Row(f"{number} replicas: decision, 99 %", p99, "us"))
        print(Row(f"{number} replicas: all calls", found[-1]["all_calls_us"]["p50"], "us"))
    full = memory(max(options.replicas), options.capacity)
    report.write(memory=full)
    print(Row("memory of a full router", full["peak_bytes"] / 2**20, "MiB"))


if __name__ == "__main__":
    main()
