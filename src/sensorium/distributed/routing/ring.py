"""Consistent hashing: an order of replicas for each content, the same in all routers.

Karger et al., 1997, "Consistent hashing and random trees". A replica that comes or goes moves only
the content that is nearest to it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import numpy as np
from blake3 import blake3

POINTS = 32
"""Points of a replica on the ring: more of them make the parts more equal."""


class HashRing:
    """Points of all replicas on a circle of 64-bit numbers."""

    def __init__(self) -> None:
        self._points: dict[str, np.ndarray] = {}
        self._starts = array("Q")
        self._owners: list[str] = []

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, id: str) -> bool:
        return id in self._points

    def set(self, ids: Iterable[str]) -> None:
        """Replace the replicas."""
        self._points = {id: self._points.get(id, _points(id)) for id in ids}
        if not self._points:
            self._starts, self._owners = array("Q"), []
            return
        names = [id for id in self._points for _ in range(POINTS)]
        starts = np.concatenate(list(self._points.values()))
        order = np.argsort(starts, kind="stable")
        self._starts = array("Q", starts[order].tobytes())
        self._owners = [names[i] for i in order]

    def walk(self, digest: bytes, most: int) -> Iterator[str]:
        """Yield up to ``most`` different replicas, the one that owns the digest first."""
        owners = self._owners
        place = int.from_bytes(blake3(digest).digest(length=8), "little")
        first = bisect_left(self._starts, place)
        seen: set[str] = set()
        for step in range(len(owners)):
            if len(seen) == most:
                return
            owner = owners[(first + step) % len(owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner


def _points(id: str) -> np.ndarray:
    return np.frombuffer(blake3(id.encode()).digest(length=8 * POINTS), np.uint64)
