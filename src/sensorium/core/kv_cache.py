"""The KV cache manager: which sequence holds which blocks, and which blocks can be shared.

It joins the block pool (which blocks are free) and the prefix index (what they contain) for the
things that the scheduler does with them. For one sequence with blocks of 4 tokens::

    token_ids       a b c d | e f g h | i j
    block_ids          7    |    2    |  5
                    matched | computed|  computed, not full
                    (shared)| (own)   |

``match`` finds block 7 by its digest, ``reserve`` shares it and allocates 2 and 5, ``extend`` adds
a block when tokens need it, ``commit`` registers block 2 in the index once it is computed, and
``release`` frees all. ``lend`` adds blocks for tokens that are only tried, and ``take_back`` frees
what is not needed of them. Where every layer has a sliding window, ``commit`` also frees blocks
behind it. A registered block is never written again while a sequence holds it: matches are whole
blocks, and what follows goes into blocks of the sequence's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sensorium.core.blocks import BlockPool, IntegrityError
from sensorium.core.prefix import PrefixIndex, extend_digests
from sensorium.core.request import Sequence


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The cached prefix of a sequence.

    ``waits_for`` is the digest of the next block, when a running sequence is about to compute it.
    """

    block_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    waits_for: bytes | None = None


NO_MATCH = PrefixMatch()
FREED = -1
"""In the place of a block that a sequence has given back, as its window has passed it."""


class KVCacheManager:
    """The blocks of all sequences.

    It is the only writer of ``block_ids``, ``block_digests`` and ``num_registered`` of a
    ``Sequence``. Without ``prefix_caching`` no digests are computed, and nothing is ever found.
    ``window``: tokens before a sequence's next one that are still read; blocks behind them are
    freed while it runs. None: all are read.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        window: int | None = None,
    ) -> None:
        self._pool = BlockPool(num_blocks, block_size)
        self._index = PrefixIndex()
        self._prefix_caching = prefix_caching
        self._window = window
        self._promised: dict[bytes, int] = {}

    @property
    def num_used_blocks(self) -> int:
        """Return the number of blocks that at least one sequence holds."""
        return self._pool.num_used

    @property
    def max_tokens(self) -> int:
        """Return how many tokens fit in all blocks."""
        return self._pool.num_blocks * self._pool.block_size

    def is_promised(self, digest: bytes) -> bool:
        """Return True if a running sequence is going to compute the block with this digest."""
        return digest in self._promised

    def open(self, seq: Sequence) -> None:
        """Compute the digests of a new sequence, once: later matches are look-ups only."""
        self._extend_digests(seq, len(seq.token_ids) // self._pool.block_size)

    def match(self, seq: Sequence) -> PrefixMatch:
        """Return the longest cached prefix of the known tokens; nothing changes.

        The last known token is never part of it: it must be computed to predict the next one.
        """
        max_blocks = min((len(seq.token_ids) - 1) // self._pool.block_size, len(seq.block_digests))
        block_ids = self._index.longest_match(seq.block_digests, max_blocks)
        num_blocks, waits_for = len(block_ids), None
        if num_blocks < max_blocks and seq.block_digests[num_blocks] in self._promised:
            waits_for = seq.block_digests[num_blocks]
        return PrefixMatch(tuple(block_ids), num_blocks * self._pool.block_size, waits_for)

    def reserve(self, seq: Sequence, match: PrefixMatch, *, num_spare: int = 0) -> bool:
        """Give a sequence the matched blocks, and new ones for all its other known tokens.

        They are taken all at once, so that a prompt that has started can finish. Returns False, and
        changes nothing, unless ``num_spare`` blocks stay free for the growth of others.
        """
        num_new = self._num_blocks_for(seq) - len(match.block_ids)
        num_taken = sum(map(self._pool.is_free, match.block_ids))
        if num_new + num_taken + num_spare > self._pool.num_free:
            return False
        for block_id in match.block_ids:
            self._pool.share(block_id)
        seq.block_ids = [*match.block_ids, *self._allocate(num_new)]
        seq.num_registered = len(match.block_ids)
        for digest in seq.block_digests[seq.num_registered :]:
            if digest not in self._index:
                self._promised.setdefault(digest, seq.seq_id)
        return True

    def extend(self, seq: Sequence) -> tuple[int, ...] | None:
        """Allocate blocks for all known tokens; return the new ones, None if too few are free."""
        num_new = self._num_blocks_for(seq) - len(seq.block_ids)
        if num_new <= 0:
            return ()
        if num_new > self._pool.num_free:
            return None
        new_block_ids = self._allocate(num_new)
        seq.block_ids.extend(new_block_ids)
        return tuple(new_block_ids)

    def lend(
        self, seq: Sequence, num_tokens: int, *, num_spare: int = 0
    ) -> tuple[int, tuple[int, ...]]:
        """Make room for tokens beyond the known ones, which may not stay.

        ``num_spare`` blocks stay free. Returns for how many tokens there is room, and new blocks.
        """
        block_size, known = self._pool.block_size, len(seq.token_ids)
        num_free = max(0, self._pool.num_free - num_spare)
        room = (len(seq.block_ids) + num_free) * block_size - known
        num_tokens = max(0, min(num_tokens, room))
        num_new = -(-(known + num_tokens) // block_size) - len(seq.block_ids)
        block_ids = self._allocate(max(0, num_new))
        seq.block_ids.extend(block_ids)
        return num_tokens, tuple(block_ids)

    def take_back(self, seq: Sequence) -> None:
        """Free the blocks beyond those for all known tokens."""
        while len(seq.block_ids) > self._num_blocks_for(seq):
            self._free(seq.block_ids.pop())

    def commit(self, seq: Sequence) -> None:
        """Register the blocks that ``num_computed`` has filled; free those behind the window.

        Blocks of an unsound sequence are not registered.
        """
        if seq.is_sound:
            self._register(seq)
        if self._window is None:
            return
        end = max(0, seq.num_computed - self._window) // self._pool.block_size
        for block in reversed(range(seq.num_freed, end)):
            self._free(seq.block_ids[block])
            seq.block_ids[block] = FREED
        seq.num_freed = max(seq.num_freed, end)

    def _register(self, seq: Sequence) -> None:
        num_full = seq.num_computed // self._pool.block_size
        if num_full <= seq.num_registered or not self._prefix_caching:
            return
        self._extend_digests(seq, num_full)
        for block in range(seq.num_registered, num_full):
            digest = seq.block_digests[block]
            self._index.register(digest, seq.block_ids[block])
            self._promised.pop(digest, None)
        seq.num_registered = num_full

    def release(self, seq: Sequence) -> None:
        """Free all blocks. Registered ones can be found until they are handed out again."""
        self.withdraw(seq)
        for block_id in reversed(seq.block_ids[seq.num_freed :]):
            self._free(block_id)
        seq.block_ids = []
        seq.num_registered = seq.num_freed = 0

    def withdraw(self, seq: Sequence) -> None:
        """Withdraw the promised blocks of a sequence: those that wait for one compute it."""
        for digest in seq.block_digests[seq.num_registered :]:
            if self._promised.get(digest) == seq.seq_id:
                del self._promised[digest]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise ``IntegrityError`` on a contradiction; only ``sequences`` may hold blocks."""
        sequences = list(sequences)
        held = {seq.seq_id: seq.block_ids[seq.num_freed :] for seq in sequences}
        self._pool.check_integrity(b for block_ids in held.values() for b in block_ids)
        self._index.check_integrity()
        holders = {seq.seq_id for seq in sequences if seq.block_ids}
        for digest, seq_id in self._promised.items():
            if seq_id not in holders:
                raise IntegrityError(f"sequence {seq_id} holds no blocks, but promises one")
            if digest in self._index:
                raise IntegrityError(f"sequence {seq_id} promises a block that is there")
        for seq in sequences:
            if len(set(held[seq.seq_id])) != len(held[seq.seq_id]) or FREED in held[seq.seq_id]:
                raise IntegrityError(f"sequence {seq.seq_id} holds a block twice")
            if len(seq.block_ids) * self._pool.block_size < seq.num_computed:
                raise IntegrityError(f"blocks of sequence {seq.seq_id} do not cover its tokens")

    def _num_blocks_for(self, seq: Sequence) -> int:
        return -(-len(seq.token_ids) // self._pool.block_size)

    def _free(self, block_id: int) -> None:
        self._pool.release(block_id, keep=self._index.holds(block_id))

    def _allocate(self, num_blocks: int) -> list[int]:
        block_ids = self._pool.allocate(num_blocks)
        for block_id in block_ids:
            self._index.forget(block_id)
        return block_ids

    def _extend_digests(self, seq: Sequence, end_block: int) -> None:
        if self._prefix_caching:
            request = seq.request
            block_size = self._pool.block_size
            extend_digests(
                seq.block_digests,
                end_block,
                seq.token_ids,
                request.items,
                block_size,
                request.cache_salt,
                seq.rope_length,
                request.adapter,
            )
