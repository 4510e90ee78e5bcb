"""Metrics of several processes for HTTP in one answer.

Each scrape meets one process, another one each time. So that answers with those of all, each with a
label of its own, and a counter never seems to jump. Engines are told of once: all processes know
the same of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from sensorium.metrics.families import COMMON_LABELS, ENGINE, SERVER, SERVERS_MISSING


@dataclass(frozen=True, slots=True)
class OtherServers:
    """Answers of the other processes.

    ``own_name``: of the process that has asked. ``families``: of the others by their names, as
    ``of_process`` returns them. ``num_missing``: processes that did not answer.
    """

    own_name: str
    families: Mapping[str, Sequence[Metric]]
    num_missing: int = 0


def of_process(families: Iterable[Metric]) -> list[Metric]:
    """Return the families with the series of the process alone, without those of replicas."""
    own = (_with(family, filter(_is_of_process, family.samples)) for family in families)
    return [family for family in own if family.samples]


def merged(own: Sequence[Metric], others: OtherServers, prefix: str) -> list[Metric]:
    """Return families of all processes, each once; the series of a process name it.

    ``own``: all of the process that has asked. ``prefix``: of the names.
    """
    found = {
        family.name: _with(family, (_named(s, others.own_name) for s in family.samples))
        for family in own
    }
    for name, families in others.families.items():
        for family in families:
            known = found.setdefault(family.name, _with(family, ()))
            known.samples.extend(_named(sample, name) for sample in family.samples)
    missing = GaugeMetricFamily(
        SERVERS_MISSING.full_name(prefix), SERVERS_MISSING.help, labels=COMMON_LABELS
    )
    missing.add_metric(("", ENGINE), others.num_missing)
    return [*found.values(), missing]


def registry_of(families: Sequence[Metric]) -> CollectorRegistry:
    """Return a registry that has just these families."""
    registry = CollectorRegistry()
    registry.register(_Fixed(families))
    return registry


class _Fixed(Collector):
    """Collector of families that are known."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        yield from self._families


def _is_of_process(sample: Sample) -> bool:
    return sample.labels.get("engine", ENGINE) == ENGINE


def _named(sample: Sample, server: str) -> Sample:
    """Return a series with the name of its process; one of a replica as it is."""
    if not _is_of_process(sample):
        return sample
    return sample._replace(labels={**sample.labels, SERVER: server})


def _with(family: Metric, samples: Iterable[Sample]) -> Metric:
    """Return a family with other series."""
    new = Metric(family.name, family.documentation, family.type, family.unit)
    new.samples = list(samples)
    return new
