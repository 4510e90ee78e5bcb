"""Bookkeeping of the encoder cache: which encoder outputs are on the device, and who needs them.

Encoder outputs have a cache of their own beside the KV cache: keyed by the digest of the item,
counted in embeddings, shared between requests. A sequence *pins* an item from the step that first
reads it to the step that computes past its end. Outputs that no sequence pins stay for later
requests with the same item until room is needed; the least recently used go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from sensorium.core.blocks import IntegrityError
from sensorium.core.plan import EncodeJob
from sensorium.core.request import ItemSpan, Sequence


class EncoderCacheBudget:
    """The resident encoder outputs, within ``capacity`` embeddings.

    |----------------------- capacity ------------------------|
    | pinned (num_pinned)  |  idle, evictable  |  never used  |
                           |------------ num_room ------------|
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0, got {capacity}")
        self.capacity = capacity
        self.num_resident = 0
        self.num_pinned = 0
        self._sizes: dict[bytes, int] = {}
        self._num_pins: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._held: dict[int, dict[int, ItemSpan]] = {}

    @property
    def num_room(self) -> int:
        """Return how many embeddings fit if everything idle were evicted."""
        return self.capacity - self.num_pinned

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._sizes

    def is_idle(self, digest: bytes) -> bool:
        """Return True for a resident item that no sequence pins."""
        return digest in self._idle

    def holds(self, seq_id: int, item: ItemSpan) -> bool:
        """Return True if the sequence pins the item at this place; an image may come twice."""
        held = self._held.get(seq_id)
        return held is not None and item.start in held

    def holders(self, digest: bytes) -> list[int]:
        """Return the ids of the sequences that pin the item."""
        return [
            seq_id
            for seq_id, held in self._held.items()
            if any(item.digest == digest for item in held.values())
        ]

    def pin(self, seq_id: int, item: ItemSpan) -> None:
        """Keep a resident item until the sequence unpins it."""
        digest = item.digest
        if digest in self._idle:
            del self._idle[digest]
            self.num_pinned += self._sizes[digest]
        self._num_pins[digest] = self._num_pins.get(digest, 0) + 1
        self._held.setdefault(seq_id, {})[item.start] = item

    def admit(self, seq_id: int, item: ItemSpan) -> list[bytes]:
        """Add a new item, pinned, and return the digests that were evicted for it.

        Raises ``ValueError``, and changes nothing, when pinned items leave too little room.
        """
        if item.digest in self._sizes:
            raise ValueError("the item is resident already")
        if item.num_embeds > self.num_room:
            raise ValueError(f"{item.num_embeds} embeddings wanted, room for {self.num_room}")
        evicted = []
        while self.num_resident + item.num_embeds > self.capacity:
            digest, _ = self._idle.popitem(last=False)
            self.num_resident -= self._sizes.pop(digest)
            evicted.append(digest)
        self._sizes[item.digest] = item.num_embeds
        self._idle[item.digest] = None
        self.num_resident += item.num_embeds
        self.pin(seq_id, item)
        return evicted

    def unpin_passed(self, seq_id: int, num_computed: int) -> None:
        """Unpin the items that end at or before the position ``num_computed``."""
        held = self._held.get(seq_id)
        if held is None:
            return
        for start in [start for start, item in held.items() if item.end <= num_computed]:
            self._unpin(held.pop(start).digest)
        if not held:
            del self._held[seq_id]

    def unpin_all(self, seq_id: int) -> None:
        """Unpin all items of the sequence."""
        for item in self._held.pop(seq_id, {}).values():
            self._unpin(item.digest)

    def forget(self, digest: bytes) -> None:
        """Remove an item whose encoding failed. Raises ``ValueError`` while it is pinned."""
        if digest in self._num_pins:
            raise ValueError("an item that sequences need cannot be forgotten")
        if digest in self._sizes:
            del self._idle[digest]
            self.num_resident -= self._sizes.pop(digest)

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """Raise ``IntegrityError`` on a contradiction; ``sequences`` are all that may pin items."""
        num_pins: dict[bytes, int] = {}
        for held in self._held.values():
            for item in held.values():
                num_pins[item.digest] = num_pins.get(item.digest, 0) + 1
        if num_pins != self._num_pins:
            raise IntegrityError("pins are miscounted")
        if set(self._idle) != set(self._sizes) - set(num_pins):
            raise IntegrityError("idle items are not the resident ones without pins")
        if self.num_resident != sum(self._sizes.values()) or self.num_resident > self.capacity:
            raise IntegrityError(f"{self.num_resident} embeddings of {self.capacity} miscounted")
        if self.num_pinned != sum(self._sizes[digest] for digest in num_pins):
            raise IntegrityError(f"{self.num_pinned} pinned embeddings miscounted")
        num_computed = {seq.seq_id: seq.num_computed for seq in sequences}
        for seq_id, held in self._held.items():
            if seq_id not in num_computed:
                raise IntegrityError(f"sequence {seq_id} is gone, but pins items")
            if any(item.end <= num_computed[seq_id] for item in held.values()):
                raise IntegrityError(f"sequence {seq_id} pins an item that it has passed")

    def _unpin(self, digest: bytes) -> None:
        self._num_pins[digest] -= 1
        if self._num_pins[digest] == 0:
            del self._num_pins[digest]
            self._idle[digest] = None
            self.num_pinned -= self._sizes[digest]


class EncodePlanner:
    """Plans the encoding of one step: how far spans may reach, what is encoded, what is evicted.

    Sequences come in queue order. Once one of them had to stop before an item because the cache has
    no room, those behind it may only use items that they already pin; otherwise a stream of small
    items could keep a large one out forever. When only the ``encode_budget`` of the step is used
    up, those behind it may still use all that is resident.
    """

    def __init__(self, cache: EncoderCacheBudget, encode_budget: int) -> None:
        self.jobs: list[EncodeJob] = []
        self.evicted: list[bytes] = []
        self.num_queries = 0
        self.num_hits = 0
        self._cache = cache
        self._encode_left = encode_budget
        self._closed = False

    def reach(self, seq: Sequence, end: int) -> int:
        """Return how far a span from ``seq.num_computed`` can go, at most ``end``.

        It ends before the first item that is neither resident nor can be encoded in this step.
        Nothing changes; ``pin_items`` must follow for the span that is planned.
        """
        room, encode_left = self._cache.num_room, self._encode_left
        wanted: set[bytes] = set()
        for _, item in self._items_to_pin(seq, end):
            digest = item.digest
            if digest in wanted:
                continue
            wanted.add(digest)
            resident = digest in self._cache
            if not resident and item.num_embeds > encode_left:
                self._encode_left = 0
                return max(item.start, seq.num_computed)
            needs_room = not resident or self._cache.is_idle(digest)
            if self._closed or (needs_room and item.num_embeds > room):
                self._closed = True
                return max(item.start, seq.num_computed)
            if needs_room:
                room -= item.num_embeds
            if not resident:
                encode_left -= item.num_embeds
        return end

    def pin_items(self, seq: Sequence, end: int) -> None:
        """Pin the items of the span up to ``end``, and plan to encode those that are missing."""
        to_pin = list(self._items_to_pin(seq, end))
        self.num_queries += len(to_pin)
        missing = []
        for index, item in to_pin:  # resident ones first, so that new ones do not evict them
            if item.digest in self._cache:
                self._cache.pin(seq.seq_id, item)
                self.num_hits += 1
            else:
                missing.append((index, item))
        for index, item in missing:
            if item.digest in self._cache:  # twice in this span
                self._cache.pin(seq.seq_id, item)
                self.num_hits += 1
                continue
            self.evicted += self._cache.admit(seq.seq_id, item)
            self._encode_left -= item.num_embeds
            self.jobs.append(EncodeJob(item.digest, seq.seq_id, index, item.num_embeds))

    def _items_to_pin(self, seq: Sequence, end: int) -> Iterator[tuple[int, ItemSpan]]:
        items = seq.request.items
        if not items or items[-1].end <= seq.num_computed:
            return
        for index, item in enumerate(items):
            if item.start >= end:
                return
            if item.end > seq.num_computed and not self._cache.holds(seq.seq_id, item):
                yield index, item
