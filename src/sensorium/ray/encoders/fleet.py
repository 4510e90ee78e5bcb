"""The replicas of encoders as one process knows them: who is there, and what each said last.

Not beside the router, whose module Ray Serve pickles with its variables.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sensorium.engine.stats import EncoderStats

STATS_KEY = "sensorium"
"""Key of a report among the statistics that Ray Serve carries for routers."""

Known = Mapping[str, EncoderStats | None]

_known: dict[tuple[str, str], Known] = {}


def encoders_of(application: str, deployment: str) -> Known | None:
    """Return what each replica reported last, None of one that has not reported yet.

    None before the router of this process knows the replicas.
    """
    return _known.get((application, deployment))


def set_encoders(application: str, deployment: str, known: Known) -> None:
    """Set what is known of the replicas; the router does, on a thread of its own."""
    _known[application, deployment] = known


def report_of(routing_stats: Mapping[str, object]) -> EncoderStats | None:
    """Return the report in the statistics of a replica, None where there is none."""
    data = routing_stats.get(STATS_KEY)
    return msgspec.msgpack.decode(data, type=EncoderStats) if isinstance(data, bytes) else None
