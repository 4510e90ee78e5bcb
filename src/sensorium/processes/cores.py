"""The processors that this process may use, and how many threads are right for them.

All numbers of threads and worker processes are derived from here. What counts:

- *Affinity*: CPUs that the system schedules this process on (``taskset``, cpusets of containers).
- *Quota*: time that its control groups may take, such as ``docker run --cpus``.
- *Physical cores*: two hardware threads of a core share its vector units and its caches. Matrix
  products keep them busy with one.
- *Performance cores*: where a CPU has slow cores, too, all threads of a step would wait for these.
- *Memory nodes* (NUMA): cores read the memory of another socket slower than their own.

A file of the system that is missing or makes no sense is taken for a machine without that feature.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from sensorium.processes.cgroups import SYSTEM, cpu_quota

MOST_THREADS = 128
"""Most threads of an engine by default."""
LEAST_NODE = 8
"""Physical cores that a memory node must offer, for the engine to stay on it."""
_SLOW = 0.5
"""Part of the greatest capacity below which a core counts as a slow one."""

_LAST_CPU = 1 << 16
"""More than Linux can have; what names more is damaged."""

CpuSet = frozenset[int]


@dataclass(frozen=True, slots=True)
class EngineThreads:
    """Number of threads of an engine, the CPUs to keep them on (None: all), and the reason."""

    number: int
    cpus: CpuSet | None
    reason: str


@dataclass(frozen=True, slots=True)
class Cores:
    """Processors of this process.

    ``allowed``: CPUs (hardware threads) that it may run on. ``physical``: the same, by physical
    core. ``slow``: those of them that are efficiency cores. ``nodes``: by memory node, nodes of one
    socket together. ``quota``: how many CPUs' time it may take, None for all.
    """

    allowed: CpuSet
    physical: tuple[CpuSet, ...]
    slow: CpuSet
    nodes: tuple[CpuSet, ...]
    quota: float | None

    @property
    def num_usable(self) -> int:
        """Return the number of CPUs that can be kept busy, at least 1.

        Half a CPU of quota counts as one: two threads in the time of 1.5 CPUs are faster than one,
        in the time of 1 slower (``benchmarks.threads``).
        """
        most = len(self.allowed)
        return most if self.quota is None else max(1, min(most, int(self.quota + 0.5)))

    def fast_cores(self, cpus: CpuSet | None = None) -> list[CpuSet]:
        """Return the physical cores among ``cpus`` (None: all) that are no slow ones."""
        wanted = self.allowed - self.slow
        return [
            core for core in self.physical if core & (wanted if cpus is None else wanted & cpus)
        ]

    def engine_threads(self, asked: int | None = None) -> EngineThreads:
        """Return how many threads an engine is to use, where, and why.

        ``asked``: the number that the user wants; the place is chosen for it.
        """
        node = max(self.nodes, key=lambda cpus: len(self.fast_cores(cpus)))
        of_node = len(self.fast_cores(node))
        is_bound = len(self.nodes) > 1 and of_node >= max(LEAST_NODE, asked or 0)
        cpus = node if is_bound else None
        if asked is not None:
            return EngineThreads(asked, cpus, "as asked for")
        number, reason = of_node if is_bound else len(self.fast_cores()), self._described(is_bound)
        if self.quota is not None and self.num_usable < number:
            number, reason = self.num_usable, f"quota of {self.quota:g} CPUs"
        if number > MOST_THREADS:
            number, reason = MOST_THREADS, f"most by default; {reason}"
        return EngineThreads(number, cpus, reason)

    def rank_threads(self, rank: int, size: int, asked: int | None = None) -> EngineThreads:
        """Return the threads of one of ``size`` processes that share a model, and their CPUs.

        The cores are divided node by node: where there are as many memory nodes as ranks, each
        stays on its own. ``asked``: threads of all ranks together.
        """
        fast = [core for node in self.nodes for core in self.fast_cores(node)]
        own = fast[len(fast) * rank // size : len(fast) * (rank + 1) // size]
        cpus = frozenset().union(*own) if own else None
        if asked is not None:
            return EngineThreads(max(1, asked // size), cpus, f"as asked for, by {size} ranks")
        number = min(max(1, len(own)), max(1, self.num_usable // size), MOST_THREADS)
        return EngineThreads(number, cpus, f"the cores of one rank of {size}")

    def _described(self, is_bound: bool) -> str:
        kind = "performance cores" if self.slow else "physical cores"
        return f"{kind} of one memory node of {len(self.nodes)}" if is_bound else kind


def find(root: Path = SYSTEM, allowed: Collection[int] | None = None) -> Cores:
    """Return the processors of this process.

    ``root``: the folder that holds ``proc`` and ``sys``; ``allowed``: CPUs that it may run on, by
    default those of the calling thread.
    """
    return _find(root, frozenset(_affinity() if allowed is None else allowed) or frozenset({0}))


def cpu_list(cpus: Iterable[int]) -> str:
    """Return CPUs as the system writes them, such as ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _affinity() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


@functools.lru_cache(maxsize=8)
def _find(root: Path, allowed: CpuSet) -> Cores:
    cpus = root / "sys" / "devices" / "system" / "cpu"
    cores: dict[int, CpuSet] = {}
    for cpu in sorted(allowed):
        if cpu not in cores:
            members = _physical_core(cpus / f"cpu{cpu}" / "topology", cpu) & allowed
            core = members.difference(cores)
            cores |= dict.fromkeys(core, core)
    return Cores(
        allowed,
        tuple(dict.fromkeys(cores.values())),
        _slow_cpus(root, allowed),
        _memory_nodes(root, allowed),
        cpu_quota(root),
    )


def _physical_core(topology: Path, cpu: int) -> CpuSet:
    """Return the hardware threads of a CPU's core."""
    # The first is the name since Linux 5.3, the second the one before.
    found = _cpus_in(topology / "core_cpus_list") or _cpus_in(topology / "thread_siblings_list")
    return found if cpu in found else frozenset({cpu})


def _slow_cpus(root: Path, allowed: CpuSet) -> CpuSet:
    """Return the efficiency cores, none if there are no others.

    Linux lists the kinds of Intel's hybrid CPUs as devices of their own, and gives those of Arm
    capacities of up to 1024.
    """
    fast = _cpus_in(root / "sys" / "devices" / "cpu_core" / "cpus") & allowed
    if not fast:
        cpus = root / "sys" / "devices" / "system" / "cpu"
        capacity = {cpu: _number_in(cpus / f"cpu{cpu}" / "cpu_capacity") for cpu in allowed}
        least = _SLOW * max(capacity.values())
        fast = frozenset(cpu for cpu in allowed if capacity[cpu] >= least or capacity[cpu] <= 0)
    return allowed - fast


def _memory_nodes(root: Path, allowed: CpuSet) -> tuple[CpuSet, ...]:
    """Return the allowed CPUs by memory node, nodes within one socket taken together.

    A socket may be divided into several nodes, and a virtual machine may call every CPU a socket:
    nodes count as one if they share a socket, never the other way round.
    """
    found: list[tuple[CpuSet, frozenset[float]]] = []
    cpus = root / "sys" / "devices" / "system" / "cpu"
    for folder in sorted((root / "sys" / "devices" / "system" / "node").glob("node[0-9]*")):
        members = _cpus_in(folder / "cpulist") & allowed
        if not members:
            continue
        names = (cpus / f"cpu{cpu}" / "topology" / "physical_package_id" for cpu in members)
        sockets = frozenset(number for number in map(_number_in, names) if number >= 0)
        joined = [entry for entry in found if entry[1] & sockets]
        found = [entry for entry in found if not entry[1] & sockets]
        found.append(
            (members.union(*(m for m, _ in joined)), sockets.union(*(s for _, s in joined)))
        )
    rest = allowed.difference(*(members for members, _ in found))
    if rest or not found:
        return (allowed,)  # what the system says is not whole
    return tuple(members for members, _ in found)


def _cpus_in(path: Path) -> CpuSet:
    """Return the CPUs of a list such as ``0-3,8``; none if there is no such file."""
    found: set[int] = set()
    try:
        for part in path.read_text(encoding="ascii").strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), min(int(last or first), _LAST_CPU) + 1))
    except (OSError, ValueError):
        return frozenset()
    return frozenset(found)


def _number_in(path: Path) -> float:
    """Return the number in a file; -1 if there is none."""
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return -1.0
