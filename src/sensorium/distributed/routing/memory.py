"""Memory of a router: which replicas were sent which content."""

from __future__ import annotations

from collections.abc import Mapping

NOBODY: Mapping[int, int] = {}


class HolderMemory:
    """Holders of content by digest, the least recently used forgotten first.

    Entries lie in two generations. New and used ones go into the young one; when that has half of
    ``capacity``, it becomes the old one, whose entries are forgotten. So at most ``capacity`` pairs
    of digest and holder are kept, and a look-up is two look-ups in dictionaries. Of more than
    ``MOST_HOLDERS`` holders of one content, the first ones are forgotten.
    """

    MOST_HOLDERS = 64

    def __init__(self, capacity: int) -> None:
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}")
        self.capacity = capacity
        self._young: dict[bytes, dict[int, int]] = {}
        self._old: dict[bytes, dict[int, int]] = {}
        self._num_young = self._num_old = 0

    def __len__(self) -> int:
        """Return the number of pairs of digest and holder."""
        return self._num_young + self._num_old

    def holders(self, digest: bytes) -> Mapping[int, int]:
        """Return the numbers of the holders, each with its mark; the mapping must not be kept."""
        return self._young.get(digest) or self._old.get(digest) or NOBODY

    def add(self, digest: bytes, holder: int, mark: int) -> None:
        """Note that a holder has some content, with a mark of that moment."""
        holders = self._young.get(digest)
        if holders is None:
            holders = self._old.pop(digest, None)
            if holders is None:
                holders = {}
            self._num_old -= len(holders)
            self._num_young += len(holders)
            self._young[digest] = holders
        self._num_young -= len(holders)
        holders.pop(holder, None)
        holders[holder] = mark
        if len(holders) > self.MOST_HOLDERS:
            del holders[next(iter(holders))]
        self._num_young += len(holders)
        if self._num_young > self.capacity // 2:
            self._old, self._num_old = self._young, self._num_young
            self._young, self._num_young = {}, 0

    def remove(self, digest: bytes, holder: int) -> None:
        """Forget that a holder has some content."""
        young = self._young.get(digest)
        holders = self._old.get(digest) if young is None else young
        if holders is None or holder not in holders:
            return
        del holders[holder]
        if young is None:
            self._num_old -= 1
        else:
            self._num_young -= 1
        if not holders:
            (self._old if young is None else self._young).pop(digest)
