"""Processor cache: features by item digest, bounded in bytes, least recently used first out."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import SharedArrays


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of the cache: queries, hits and evictions since the start, and what it holds now."""

    queries: int
    hits: int
    num_entries: int
    num_bytes: int
    capacity_bytes: int
    evictions: int


class FeatureCache:
    """Features by digest, at most ``capacity_bytes`` of them (0: no cache). Thread-safe.

    Pinned digests are not evicted; pins are counted, and may come before their entry. Features that
    do not fit beside the pinned ones are not kept.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._pins: Counter[bytes] = Counter()
        self._num_bytes = 0
        self._queries = 0
        self._hits = 0
        self._evictions = 0
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Return whether the cache keeps anything."""
        return self.capacity_bytes > 0

    @property
    def num_pinned(self) -> int:
        """Number of digests that are pinned."""
        with self._lock:
            return len(self._pins)

    def get(self, digest: bytes) -> Features | None:
        """Return the features under a digest and mark them as used; None if there are none."""
        with self._lock:
            self._queries += 1
            features = self._held(digest)
            if features is not None:
                self._hits += 1
                self._entries.move_to_end(digest)
            return features

    def peek(self, digest: bytes) -> Features | None:
        """Return the features under a digest, without counting a query or marking them as used."""
        with self._lock:
            return self._held(digest)

    def put(self, digest: bytes, features: Features) -> bool:
        """Keep features in place of those under the digest; return False if they do not fit."""
        size = features.num_bytes
        with self._lock:
            old = self._entries.pop(digest, None)
            if old is not None:
                self._num_bytes -= old.num_bytes
            if not self._make_room(size):
                return False
            self._entries[digest] = features
            self._num_bytes += size
            return True

    def pin(self, digests: Iterable[bytes]) -> None:
        """Keep these entries until as many ``unpin`` calls have named them."""
        with self._lock:
            self._pins.update(digests)

    def unpin(self, digests: Iterable[bytes]) -> None:
        """Undo one ``pin`` of each digest. Raises ValueError for one that is not pinned."""
        with self._lock:
            for digest in digests:
                if self._pins[digest] < 1:
                    del self._pins[digest]
                    raise ValueError(f"digest {digest.hex()[:12]} is not pinned")
                self._pins[digest] -= 1
                if not self._pins[digest]:
                    del self._pins[digest]

    def clear(self) -> None:
        """Forget all entries that are not pinned."""
        with self._lock:
            for digest in [d for d in self._entries if d not in self._pins]:
                self._num_bytes -= self._entries.pop(digest).num_bytes

    def stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        with self._lock:
            return CacheStats(
                queries=self._queries,
                hits=self._hits,
                num_entries=len(self._entries),
                num_bytes=self._num_bytes,
                capacity_bytes=self.capacity_bytes,
                evictions=self._evictions,
            )

    def check_integrity(self) -> None:
        """Raise AssertionError if counters and entries disagree."""
        with self._lock:
            held = sum(features.num_bytes for features in self._entries.values())
            if held != self._num_bytes:
                raise AssertionError(f"{held} bytes held, {self._num_bytes} counted")
            if held > self.capacity_bytes:
                raise AssertionError(f"{held} bytes held, capacity {self.capacity_bytes}")
            if any(count < 1 for count in self._pins.values()):
                raise AssertionError("a pin count below 1")
            if self._hits > self._queries:
                raise AssertionError(f"{self._hits} hits of {self._queries} queries")

    def _held(self, digest: bytes) -> Features | None:
        """Return an entry; drop it if its file in shared memory was removed."""
        features = self._entries.get(digest)
        if (
            features is None
            or not isinstance(features.arrays, SharedArrays)
            or features.arrays.is_there
        ):
            return features
        del self._entries[digest]
        self._num_bytes -= features.num_bytes
        return None

    def _make_room(self, size: int) -> bool:
        """Evict until ``size`` bytes fit; evict nothing and return False if they cannot."""
        excess = self._num_bytes + size - self.capacity_bytes
        victims: list[bytes] = []
        for digest, features in self._entries.items():
            if excess <= 0:
                break
            if digest not in self._pins:
                victims.append(digest)
                excess -= features.num_bytes
        if excess > 0:
            return False
        for digest in victims:
            self._num_bytes -= self._entries.pop(digest).num_bytes
            self._evictions += 1
        return True


class NamedFeatures(Protocol):
    """Features that other processes have under callers' ids, by the digests of these."""

    async def find(self, digest: bytes) -> Features | None:
        """Return features, None where nobody is known to have them. Raises nothing."""

    def offer(self, digest: bytes, features: Features) -> None:
        """Let others have the features that were loaded here under an id."""


class DigestMemo:
    """Content digests of the latest ``data:`` URLs, by the digest of their text. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text_digest: bytes) -> bytes | None:
        """Return the content digest of a URL that was decoded before; None if it is not known."""
        with self._lock:
            return self._entries.get(text_digest)

    def put(self, text_digest: bytes, content_digest: bytes) -> None:
        """Remember a URL; forget the oldest beyond the capacity."""
        with self._lock:
            self._entries[text_digest] = content_digest
            self._entries.move_to_end(text_digest)
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
