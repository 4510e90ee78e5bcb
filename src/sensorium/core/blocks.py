"""The pool of KV-cache blocks: which are free, and how many sequences use the others.

The pool does not know what blocks contain; the prefix index does. An unused block stays in the free
list with its contents until it is handed out again, so a later request can reuse what an earlier
one computed as long as the room was not needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class IntegrityError(AssertionError):
    """The bookkeeping contradicts itself: a bug in this package, not a caller's mistake."""


class BlockPool:
    """Block ids ``0 .. num_blocks - 1`` with reference counts and a free list.

    The free list is an ``OrderedDict`` without values, whose front is handed out next. It removes a
    block from the middle at constant cost, when a free block holds a wanted prefix; neither a deque
    nor a heap does. (A plain dict would, but finding its first key slows down with every key that
    was deleted before it.) ::

        front                                                  back
        blank blocks (useless contents) | kept blocks, least recently used first
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a pool needs blocks with room: {num_blocks} blocks of {block_size} tokens"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Return the number of blocks that can be allocated."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Return the number of blocks that at least one sequence uses."""
        return self.num_blocks - len(self._free)

    def is_free(self, block_id: int) -> bool:
        """Return True if no sequence uses the block."""
        return self._num_refs[block_id] == 0

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out blocks with one reference each: blank ones first, then the least recently used.

        The prefix index must forget their contents. Raises ``ValueError``, and changes nothing,
        when fewer are free.
        """
        if num_blocks > len(self._free):
            raise ValueError(f"{num_blocks} blocks wanted, {len(self._free)} are free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_refs[block_id] = 1
        return block_ids

    def share(self, block_id: int) -> None:
        """Add a reference; a free block leaves the free list with its contents."""
        if self._num_refs[block_id] == 0:
            del self._free[block_id]
        self._num_refs[block_id] += 1

    def release(self, block_id: int, *, keep: bool = False) -> None:
        """Drop a reference; the last one frees the block.

        With ``keep`` it goes to the back of the free list, else to the front. Release the blocks of
        a sequence last to first: its tail is then evicted before its head, and the rest is still a
        prefix.
        """
        if self._num_refs[block_id] < 1:
            raise ValueError(f"block {block_id} is released, but nobody uses it")
        self._num_refs[block_id] -= 1
        if self._num_refs[block_id] == 0:
            self._free[block_id] = None
            if not keep:
                self._free.move_to_end(block_id, last=False)

    def check_integrity(self, used: Iterable[int]) -> None:
        """Compare the counts with ``used``: every block id, once per sequence that holds it."""
        expected = [0] * self.num_blocks
        for block_id in used:
            expected[block_id] += 1
        if expected != self._num_refs:
            wrong = [b for b in range(self.num_blocks) if expected[b] != self._num_refs[b]]
            raise IntegrityError(f"reference counts are wrong for blocks {wrong[:8]}")
        if set(self._free) != {b for b in range(self.num_blocks) if expected[b] == 0}:
            raise IntegrityError("the free list is not the list of unused blocks")
