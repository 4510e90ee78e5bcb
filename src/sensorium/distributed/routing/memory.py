"""Memory of a router: which replicas were sent which content, and which content is popular."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    The look-up is written out in each method: a call would make the searches a sixth slower.
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

    def mark(self, digest: bytes, holder: int) -> int | None:
        """Return the mark of a holder, None for one that is not known to have the content."""
        found = self._young.get(digest)
        if found is None:
            found = self._old.get(digest)
            if found is None:
                return None
        if isinstance(found, int):
            return found >> _NUMBER_BITS if found & _NUMBER_MASK == holder else None
        return found.get(holder)

    def num_known(self, digests: Sequence[bytes]) -> int:
        """Return how many of the growing prefixes of a prompt somebody has.

        Who is sent a prompt has all its prefixes, and of two the shorter one is never forgotten
        first. So this and the searches below halve what is left, in place of looking at each.
        """
        young, old = self._young, self._old
        low, high = 0, len(digests)
        while low < high:
            middle = (low + high) // 2
            digest = digests[middle]
            if digest in young or digest in old:
                low = middle + 1
            else:
                high = middle
        return low

    def next_wider(self, digests: Sequence[bytes], num: int) -> int:
        """Return the most prefixes below ``num`` that more holders share than ``num``; else 0.

        Those between have the same holders, but where these are ``MOST_HOLDERS``.
        """
        size = self._size(digests[num - 1])
        if size >= self.MOST_HOLDERS:
            return num - 1
        low, high = 0, num - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._size(digests[middle - 1]) > size:
                low = middle
            else:
                high = middle - 1
        return low

    def num_held(self, digests: Sequence[bytes], num: int, holder: int) -> int:
        """Return how many of the first ``num`` prefixes a holder has."""
        low, high = 0, num
        middle = num  # the first try: often it has all of them
        while low < high:
            if self._may_have(digests[middle - 1], holder):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        # Of contents with many holders, some of these are forgotten.
        while low and self.mark(digests[low - 1], holder) is None:
            low -= 1
        return low

    def _size(self, digest: bytes) -> int:
        """Return the number of holders."""
        found = self._young.get(digest)
        if found is None:
            found = self._old.get(digest)
            if found is None:
                return 0
        return 1 if isinstance(found, int) else len(found)

    def _may_have(self, digest: bytes, holder: int) -> bool:
        """Return whether a holder has the content, as far as is known."""
        found = self._young.get(digest)
        if found is None:
            found = self._old.get(digest)
            if found is None:
                return False
        if isinstance(found, int):
            return found & _NUMBER_MASK == holder
        return holder in found or len(found) >= self.MOST_HOLDERS

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

    def num_repeated(self, digests: Sequence[bytes], num: int) -> int:
        """Return how many of the first ``num`` prefixes end with one that was counted twice."""
        new, old = self._new, self._old
        for place in range(num, 0, -1):
            digest = digests[place - 1]
            if (digest in new or digest in old) and self.count(digest) > 1:
                return place
        return 0

    def share(self, digest: bytes) -> float:
        """Return its share of all that was counted, 0 to 1."""
        return self.count(digest) / max(self.LEAST, self._num_new + self._num_old)
