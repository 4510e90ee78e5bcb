"""Memory of a router: which replicas were sent which content, and which content is popular."""

from __future__ import annotations

from collections.abc import Mapping

NOBODY: Mapping[int, int] = {}
_NUMBER_BITS = 32
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1

_Holders = int | dict[int, int]
"""One holder as ``mark << 32 | number``, several as marks by number."""


class HolderMemory:
    """Holders of content by digest, the least recently used forgotten first.

    Entries lie in two generations. New and used ones go into the young one; when that has half of
    ``capacity``, it becomes the old one, whose entries are forgotten. So at most ``capacity`` pairs
    of digest and holder are kept, in some 200 bytes each, and a look-up is two look-ups in
    dictionaries. Of more than ``MOST_HOLDERS`` of one content, the first ones are forgotten.
    """

    MOST_HOLDERS = 64

    def __init__(self, capacity: int) -> None:
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}")
        self.capacity = capacity
        self._young: dict[bytes, _Holders] = {}
        self._old: dict[bytes, _Holders] = {}
        self._num_young = self._num_old = 0
        self._forgotten: dict[bytes, _Holders] = {}
        """A generation that is freed entry by entry, as all at once would take milliseconds."""

    def __len__(self) -> int:
        """Return the number of pairs of digest and holder."""
        return self._num_young + self._num_old

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._young or digest in self._old

    def holders(self, digest: bytes) -> Mapping[int, int]:
        """Return the numbers of the holders, each with its mark; the mapping must not be kept."""
        found = self._young.get(digest)
        if found is None:
            found = self._old.get(digest)
            if found is None:
                return NOBODY
        return {found & _NUMBER_MASK: found >> _NUMBER_BITS} if isinstance(found, int) else found

    def add(self, digest: bytes, holder: int, mark: int) -> None:
        """Note that a holder has some content, with a mark of that moment."""
        if self._forgotten:
            self._forgotten.popitem()
        found = self._young.get(digest)
        if found is None:
            found = self._old.pop(digest, None)
            if found is not None:
                size = 1 if isinstance(found, int) else len(found)
                self._num_old -= size
                self._num_young += size
        if found is None or (isinstance(found, int) and found & _NUMBER_MASK == holder):
            self._num_young += found is None
            self._young[digest] = mark << _NUMBER_BITS | holder
        else:
            self._young[digest] = self._with(found, holder, mark)
        if self._num_young > self.capacity // 2:
            self._forgotten = self._old
            self._old, self._num_old = self._young, self._num_young
            self._young, self._num_young = {}, 0

    def _with(self, found: _Holders, holder: int, mark: int) -> dict[int, int]:
        """Return the holders of young content with one more, or with its mark renewed."""
        if isinstance(found, int):
            found = {found & _NUMBER_MASK: found >> _NUMBER_BITS}
        self._num_young -= len(found)
        found.pop(holder, None)
        found[holder] = mark
        if len(found) > self.MOST_HOLDERS:
            del found[next(iter(found))]
        self._num_young += len(found)
        return found


class Popularity:
    """Shares of contents among the latest ones, counted in the present window and the last."""

    LEAST = 64
    """Fewer counts than these say little: what is missing counts as other content."""

    def __init__(self, window: int = 8192) -> None:
        self.window = window
        self._new: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._num_new = self._num_old = 0

    def add(self, digest: bytes) -> None:
        """Count one; an empty digest counts for the total only."""
        if digest:
            self._new[digest] = self._new.get(digest, 0) + 1
        self._num_new += 1
        if self._num_new >= self.window:
            self._old, self._num_old = self._new, self._num_new
            self._new, self._num_new = {}, 0

    def count(self, digest: bytes) -> int:
        """Return how often it was counted."""
        return self._new.get(digest, 0) + self._old.get(digest, 0)

    def share(self, digest: bytes) -> float:
        """Return its share of all that was counted, 0 to 1."""
        return self.count(digest) / max(self.LEAST, self._num_new + self._num_old)
