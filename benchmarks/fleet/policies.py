"""Policies that choose a replica: ours, and what it is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sensorium.distributed.routing import ReplicaLoad, RequestKey, Router, RoutingCosts


class Policy(Protocol):
    """One router of several, as the simulation drives it."""

    def set_replicas(self, ids: Sequence[str]) -> None: ...

    def report(self, replica: str, load: ReplicaLoad) -> None: ...

    def choose(self, key: RequestKey) -> str: ...

    def sent(self, replica: str, key: RequestKey) -> None: ...

    def first_token(self, replica: str, key: RequestKey) -> None: ...

    def ended(self, replica: str, key: RequestKey) -> None: ...


class _Counting:
    """Sequences at each replica: as reported, and what this router has sent and seen end since."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.ids: list[str] = []
        self.loads = np.zeros(0)
        self._places: dict[str, int] = {}

    def set_replicas(self, ids: Sequence[str]) -> None:
        old = {id: self.loads[place] for id, place in self._places.items()}
        self.ids = list(ids)
        self._places = {id: place for place, id in enumerate(self.ids)}
        self.loads = np.array([old.get(id, 0.0) for id in self.ids])

    def report(self, replica: str, load: ReplicaLoad) -> None:
        if replica in self._places:
            self.loads[self._places[replica]] = load.num_running + load.num_waiting

    def sent(self, replica: str, key: RequestKey) -> None:
        self.loads[self._places[replica]] += 1

    def first_token(self, replica: str, key: RequestKey) -> None:
        pass

    def ended(self, replica: str, key: RequestKey) -> None:
        if replica in self._places:
            self.loads[self._places[replica]] -= 1

    def least(self) -> str:
        """The replica with the fewest sequences, a random one of several."""
        return self.ids[
            int(np.argmin(self.loads + self.draw.random() * 0.5 * _noise(len(self.ids), self.draw)))
        ]


def _noise(count: int, draw: random.Random) -> np.ndarray:
    return np.roll(
        _NOISE[:count] if count <= len(_NOISE) else np.resize(_NOISE, count), draw.randrange(count)
    )


_NOISE = np.random.default_rng(0).random(8192)


class RoundRobin(_Counting):
    """Each replica in turn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._next = self.draw.randrange(1 << 20)

    def choose(self, key: RequestKey) -> str:
        self._next += 1
        return self.ids[self._next % len(self.ids)]


class LeastLoaded(_Counting):
    """The replica with the fewest sequences."""

    def choose(self, key: RequestKey) -> str:
        return self.least()


class CacheAware(_Counting):
    """The longest known prefix, unless replicas are out of balance.

    Like the cache-aware policy of SGLang's router: where at least half of a prompt is known, the
    replica that had it; else the one with the least. Out of balance means that most and least loaded
    differ by more than 32 sequences and by half.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._holder: dict[bytes, str] = {}

    def choose(self, key: RequestKey) -> str:
        low, high = self.loads.min(), self.loads.max()
        if high - low <= 32 or high <= 1.5 * low:
            num = len(key.prefixes)
            for index in reversed(range(num // 2, num)):
                holder = self._holder.get(key.prefixes[index])
                if holder in self._places:
                    return holder
        return self.least()

    def sent(self, replica: str, key: RequestKey) -> None:
        super().sent(replica, key)
        for digest in key.prefixes:
            self._holder[digest] = replica


class Ours(Router):
    """The router of ``sensorium.distributed.routing``; the first choice is taken."""

    def choose(self, key: RequestKey) -> str:  # type: ignore[override]
        return super().choose(key)[0]


def make(name: str, seed: int, num_routers: int = 1, costs: RoutingCosts | None = None) -> Policy:
    """One of so many routers of this policy."""
    if name == "ours":
        return Ours(costs, num_routers=num_routers, seed=seed)
    kinds: dict[str, Callable[[int], Policy]]
    kinds = {"round robin": RoundRobin, "least loaded": LeastLoaded, "cache-aware": CacheAware}
    return kinds[name](seed)


POLICIES = ("round robin", "least loaded", "cache-aware", "ours")
