"""Resident memory of a server's processes, read when it is scraped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sensorium.metrics.families import COMMON_LABELS, PROCESS_KINDS, PROCESS_MEMORY

_MODULES = {
    "sensorium.engine.serving.worker": "engine",
    "sensorium.engine.prompts.media_worker": "media",
}
"""Kinds of processes by the module that they run; forked workers keep their parent's command."""


def resident_bytes() -> dict[str, int]:
    """Return the resident bytes of this process and of those below it, by kind.

    Pages that several processes share count for each of them.
    """
    found = dict.fromkeys(PROCESS_KINDS, 0)
    own = psutil.Process()
    found["server"] = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            command, size = child.cmdline(), child.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
        kinds = (_MODULES[word] for word in command if word in _MODULES)
        found[next(kinds, "other")] += size
    return found


class MemoryCollector(Collector):
    """Collector of ``PROCESS_MEMORY``. ``labels``: values of ``COMMON_LABELS``."""

    def __init__(self, prefix: str, labels: Sequence[str]) -> None:
        self._prefix = prefix
        self._labels = list(labels)

    def describe(self) -> Iterator[Metric]:
        """Yield the family without values."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """Yield the family with its values."""
        family = self._family()
        for kind, size in resident_bytes().items():
            family.add_metric([*self._labels, kind], size)
        yield family

    def _family(self) -> GaugeMetricFamily:
        labels = [*COMMON_LABELS, *PROCESS_MEMORY.labels]
        name = PROCESS_MEMORY.full_name(self._prefix)
        return GaugeMetricFamily(name, PROCESS_MEMORY.help, labels=labels)
