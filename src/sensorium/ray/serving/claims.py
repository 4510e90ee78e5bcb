"""Starts of ``sensorium serve`` that have a part in an application, in the store of the cluster.

In the store, and not in the replicas: who asks gets an answer while none is up, and no replica has
to be replaced when another start comes. Each start takes the next number, which only one can get;
clocks of machines differ and decide nothing. Ray knows which of the programs still run: those that
were killed have no part any more.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import ray
from ray._private.state import jobs
from ray.experimental import internal_kv

_NAMESPACE = b"sensorium"
_DIGITS = 12


class Phase(enum.Enum):
    """Step of the start that ends an application."""

    DRAINING = b"draining"
    """Its processes refuse requests for good, so a start that comes now has to replace all."""
    DELETING = b"deleting"
    """A start that comes now has to wait: what it deploys would be deleted with the rest."""


@dataclass(frozen=True, slots=True)
class Start:
    """A start that still runs: its number, and the program, by its job of Ray and its place."""

    number: int
    job: str
    place: str


class Claims:
    """Entries of starts in the application ``name``, as one of them sees them."""

    def __init__(self, name: str) -> None:
        self._prefix = f"serve:{name}:starts:"
        self._ending = f"serve:{name}:ending"
        self._number: int | None = None

    def add(self) -> list[Start]:
        """Note the own start as the latest one; return the others that still run.

        Entries of starts that were killed go.
        """
        job = ray.get_runtime_context().get_job_id()
        found = self._entries()
        others = self._running(found)
        number = max(found, default=0) + 1
        while _put(self._key(number), job.encode(), overwrite=False):
            number += 1  # another start has just taken it
        self._number = number
        running = {start.number for start in others}
        for dead in found.keys() - running:
            _delete(self._key(dead))
        return others

    def ending(self) -> Phase | None:
        """Return what a start that ends the application does or did, None where none does.

        A start that was killed while it deleted has left the rest draining.
        """
        value = _get(self._ending)
        if value is None:
            return None
        phase, _, job = value.partition(b" ")
        if phase == Phase.DELETING.value and job.decode() in _running_jobs():
            return Phase.DELETING
        return Phase.DRAINING

    def deployed(self) -> None:
        """Note that what was draining has been replaced.

        Not before: where this start is killed first, the next one has to replace it.
        """
        _delete(self._ending)

    def remove(self) -> None:
        """Take the own entry back."""
        if self._number is not None:
            _delete(self._key(self._number))
            self._number = None

    def others(self) -> list[Start]:
        """Return the other starts that still run."""
        return [s for s in self._running(self._entries()) if s.number != self._number]

    def are_latest(self) -> bool:
        """Return whether no other start that runs has come after the own one."""
        running = [start.number for start in self._running(self._entries())]
        return self._number is not None and max(running, default=0) == self._number

    def end(self, phase: Phase) -> bool:
        """Say that the own start ends the application; False when another one has taken over."""
        if not self.are_latest():
            return False
        before = _get(self._ending)
        job = ray.get_runtime_context().get_job_id()
        _put(self._ending, phase.value + b" " + job.encode())
        # Another start either sees this, or is seen here.
        if self.are_latest():
            return True
        if before is None:
            _delete(self._ending)
        else:
            _put(self._ending, before)
        return False

    def clear(self) -> None:
        """Forget the own start and those before it: the application has been ended."""
        for number in self._entries():
            if self._number is not None and number <= self._number:
                _delete(self._key(number))
        self._number = None
        _delete(self._ending)

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:0{_DIGITS}}"

    def _entries(self) -> dict[int, str]:
        """Return the jobs of Ray of all starts, by their numbers."""
        found = {}
        for key in internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE):
            value = _get(key)
            if value is not None:
                found[int(key.decode().removeprefix(self._prefix))] = value.decode()
        return found

    def _running(self, entries: dict[int, str]) -> list[Start]:
        """Return the starts whose programs still run."""
        running = _running_jobs()
        return [Start(n, job, running[job]) for n, job in entries.items() if job in running]


def _running_jobs() -> dict[str, str]:
    """Return where each program runs that is connected to the cluster, by its job of Ray."""
    return {
        job["JobID"]: f"process {job['DriverPid']} on {job['DriverIPAddress']}"
        for job in jobs()
        if not job["IsDead"]
    }


def _put(key: str, value: bytes, *, overwrite: bool = True) -> bool:
    """Write; return True where there was a value before, which stays without ``overwrite``."""
    return bool(internal_kv._internal_kv_put(key, value, overwrite, namespace=_NAMESPACE))


def _get(key: str | bytes) -> bytes | None:
    value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return value


def _delete(key: str) -> None:
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
