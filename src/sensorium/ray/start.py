"""Start of a replica: the cores that it keeps to, and how its failure is told."""

from __future__ import annotations

import os

from sensorium.errors import SensoriumError
from sensorium.processes import cores

START_FAILED = "The replica could not start: "
"""Begins the message of a replica that cannot start."""


def start_failed(error: SensoriumError) -> RuntimeError:
    """Return an error in place of one whose class Ray would have to find where it is raised."""
    return RuntimeError(f"{START_FAILED}{error.message}")


def take_cores(place: int, per_node: int) -> None:
    """Keep this thread, and processes that it starts, on one of ``per_node`` parts of the cores.

    ``place``: number of the part; negative ones count from the last, and all are taken in turn.
    """
    if per_node < 2 or not hasattr(os, "sched_setaffinity"):
        return
    own = cores.find().rank_threads(place % per_node, per_node).cpus
    if own:
        os.sched_setaffinity(0, own)
