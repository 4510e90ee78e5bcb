"""Requests over few images: do repeats meet a replica that has the image, and who gets how many?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from struct import pack
from typing import Any

from benchmarks.fleet.policies import POLICIES, make
from benchmarks.fleet.traces import Zipf
from sensorium.distributed.routing import ReplicaLoad, RequestKey

NUM_IMAGES = 50
IN_FLIGHT = 16


def images(
    num_requests: int, num_replicas: int = 8, num_routers: int = 2
) -> Iterator[dict[str, Any]]:
    """Yield, by policy and popularity of the images, the share of repeats that meet their image."""
    for exponent in (0.0, 1.0):
        for policy in POLICIES:
            yield {
                "policy": policy,
                "images": NUM_IMAGES,
                "zipf": exponent,
                "num_replicas": num_replicas,
                "num_routers": num_routers,
                **_run(policy, num_requests, num_replicas, num_routers, exponent),
            }


def _run(
    policy: str, count: int, num_replicas: int, num_routers: int, exponent: float
) -> dict[str, float]:
    draw = random.Random(3)
    image_of = Zipf(NUM_IMAGES, exponent, draw)
    names = [f"replica-{i}" for i in range(num_replicas)]
    routers = [make(policy, seed, num_routers) for seed in range(num_routers)]
    for router in routers:
        router.set_replicas(names)
    has: dict[int, set[str]] = {}
    sent: Counter[str] = Counter()
    running: Counter[str] = Counter()
    open_: list[tuple[Any, str, RequestKey]] = []
    repeats = met = 0
    for number in range(count):
        image = image_of()
        prefix = [pack("<II", image, i) for i in range(3)]
        prefix += [pack("<II", 1000 + number, i) for i in range(2)]
        key = RequestKey(160, tuple(prefix), ((pack("<Q", image), 64),))
        router = routers[draw.randrange(num_routers)]
        chosen = router.choose(key)
        router.sent(chosen, key)
        sent[chosen] += 1
        running[chosen] += 1
        if image in has:
            repeats += 1
            met += chosen in has[image]
        has.setdefault(image, set()).add(chosen)
        open_.append((router, chosen, key))
        if len(open_) > IN_FLIGHT:
            ended, id, old = open_.pop(draw.randrange(len(open_)))
            ended.first_token(id, old)
            ended.ended(id, old)
            running[id] -= 1
        if number % IN_FLIGHT == 0:
            for name in names:
                load = ReplicaLoad(num_running=running[name])
                for each in routers:
                    each.report(name, load)
    counts = [sent[name] for name in names]
    return {
        "repeats_met": met / max(1, repeats),
        "requests_max_over_mean": max(counts) * num_replicas / count,
    }
