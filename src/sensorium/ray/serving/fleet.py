"""The engine replicas as one process knows them: who is there, and what each said last."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from sensorium.engine.stats import EngineFacts, EngineStats


class ReplicaReport(msgspec.Struct, frozen=True):
    """Report of a replica on itself, once a second.

    ``up``: its engine takes requests. ``num_restarts``: how often that was replaced. ``number``:
    of the report, from 1.
    """

    up: bool
    facts: EngineFacts
    stats: EngineStats
    num_restarts: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """A snapshot: reports by replica; None of one that has not reported yet."""

    reports: Mapping[str, ReplicaReport | None]

    @property
    def is_up(self) -> bool:
        """Return True while some replica takes requests, as far as is known."""
        return any(report is None or report.up for report in self.reports.values())


_lock = threading.Lock()
_fleets: dict[tuple[str, str], Fleet] = {}


def fleet_of(application: str, deployment: str) -> Fleet | None:
    """Return the latest snapshot; None before the router of this process knows the replicas."""
    return _fleets.get((application, deployment))


def set_fleet(application: str, deployment: str, fleet: Fleet) -> None:
    """Set the latest snapshot; the router does, on a thread of its own."""
    with _lock:
        _fleets[application, deployment] = fleet


def common_facts(all_facts: Sequence[EngineFacts]) -> EngineFacts:
    """Return facts that hold for each of some engines: the smallest context, common adapters."""
    least = min(all_facts, key=lambda facts: (facts.max_model_len, facts.num_kv_blocks))
    digests = [{adapter.digest for adapter in facts.adapters} for facts in all_facts]
    common = set.intersection(*digests)
    adapters = tuple(adapter for adapter in least.adapters if adapter.digest in common)
    return dataclasses.replace(least, adapters=adapters)
