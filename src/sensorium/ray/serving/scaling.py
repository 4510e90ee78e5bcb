"""The number of replicas that Ray Serve's controller should run, by their queues and KV caches.

Ray Serve copies this module into its controller, so it imports nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LOAD = "sensorium_load"
"""Name of the statistic that a replica records: see ``load_of``."""
FULL_KV_CACHE = 0.8
"""Use of the KV cache that counts as full: beyond it sequences begin to displace each other."""
TARGET = 0.75
"""Load of a replica that is aimed at."""


def load_of(num_sequences: int, max_num_seqs: int, kv_usage: float) -> float:
    """Return the load of a replica: 1 where its steps or its KV cache are just full.

    ``num_sequences``: running and waiting; more than a step takes make it greater than 1.
    """
    return max(num_sequences / max_num_seqs, kv_usage / FULL_KV_CACHE)


def wanted_replicas(loads: Mapping[Any, float], least: int, most: int) -> int:
    """Return the number of replicas that gives each the load aimed at, within bounds."""
    return min(most, max(least, math.ceil(sum(loads.values()) / TARGET - 1e-9)))


def scale(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas for Ray Serve, which waits some time before it follows."""
    loads = (context.aggregated_metrics or {}).get(LOAD) or {}
    if not loads:
        return context.target_num_replicas, {}
    bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return wanted_replicas(loads, *bounds), {}
