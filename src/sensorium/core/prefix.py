"""The prefix cache: chained digests of blocks, and the index from digest to block.

The keys and values of a token depend on everything before it, so a block is identified by the whole
prefix that it ends. Its digest is::

    H( head | token ids | media )
       head   the digest of the block before it, or for the first block the cache salt, the
              digest of the adapter and the length that rotary factors are chosen for (0 for the
              usual ones)
       media  for each slice of the block that is filled from an item: the item's digest, where
              the slice starts in the block, its length, and its first embedding in the item

Every part carries a tag or a length, so that no two different structures give the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from blake3 import blake3

from sensorium.core.blocks import IntegrityError
from sensorium.core.request import ItemSpan


class MediaSlice(NamedTuple):
    """Consecutive positions of one block that hold consecutive embeddings of one item.

    ``block_pos`` is relative to the block's first token, ``item_pos`` counts the item's embeddings.
    """

    digest: bytes
    block_pos: int
    num_embeds: int
    item_pos: int


def block_digest(
    parent_digest: bytes | None,
    token_ids: Sequence[int],
    media: Sequence[MediaSlice] = (),
    *,
    salt: bytes = b"",
    adapter: bytes = b"",
    rope_length: int = 0,
) -> bytes:
    """Return the digest (32 bytes) of a full block.

    ``salt``, ``adapter`` and ``rope_length`` only count for the first block, which has no parent;
    later blocks inherit them.
    """
    sizes = struct.pack("<QII", rope_length, len(salt), len(adapter))
    first = (b"\x00", sizes, salt, adapter)
    parts = [*first] if parent_digest is None else [b"\x01", parent_digest]
    parts.append(struct.pack(f"<I{len(token_ids)}q", len(token_ids), *token_ids))
    for slice_ in media:
        frame = (len(slice_.digest), slice_.block_pos, slice_.num_embeds, slice_.item_pos)
        parts += [struct.pack("<4I", *frame), slice_.digest]
    return blake3(b"".join(parts)).digest()


def media_by_block(
    items: Sequence[ItemSpan], block_size: int, first_block: int, end_block: int
) -> dict[int, list[MediaSlice]]:
    """Return the slices in blocks ``first_block .. end_block - 1``.

    Blocks without media are absent.

    Example: blocks of 4 and an item with the one run (2, 5) give ``{0: [(digest, 2, 2, 0)],
    1: [(digest, 0, 3, 2)]}``.
    """
    slices: dict[int, list[MediaSlice]] = {}
    low, high = first_block * block_size, end_block * block_size
    for item in items:
        if item.end <= low or item.start >= high:
            continue
        item_pos = 0
        for start, length in item.runs:
            pos, end = max(start, low), min(start + length, high)
            while pos < end:
                block, block_pos = divmod(pos, block_size)
                num_embeds = min(block_size - block_pos, end - pos)
                slices.setdefault(block, []).append(
                    MediaSlice(item.digest, block_pos, num_embeds, item_pos + pos - start)
                )
                pos += num_embeds
            item_pos += length
    return slices


def extend_digests(
    digests: list[bytes],
    end_block: int,
    token_ids: Sequence[int],
    items: Sequence[ItemSpan],
    block_size: int,
    salt: bytes,
    rope_length: int = 0,
    adapter: bytes = b"",
) -> None:
    """Append the missing ones of the digests of blocks ``0 .. end_block - 1`` to ``digests``."""
    first_block = len(digests)
    if end_block <= first_block:
        return
    media = media_by_block(items, block_size, first_block, end_block)
    for block in range(first_block, end_block):
        digests.append(
            block_digest(
                digests[-1] if digests else None,
                token_ids[block * block_size : (block + 1) * block_size],
                media.get(block, ()),
                salt=salt,
                adapter=adapter,
                rope_length=rope_length,
            )
        )


class PrefixIndex:
    """One-to-one map from digests to blocks whose contents are complete.

    When two sequences compute the same block side by side, the first to finish is registered.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._block_of

    def holds(self, block_id: int) -> bool:
        """Return True if the block is registered."""
        return block_id in self._digest_of

    def register(self, digest: bytes, block_id: int) -> bool:
        """Register the block; return False when the digest or the block already has an entry."""
        if digest in self._block_of or block_id in self._digest_of:
            return False
        self._block_of[digest] = block_id
        self._digest_of[block_id] = digest
        return True

    def forget(self, block_id: int) -> None:
        """Remove the entry of a block, if there is one, because its contents change."""
        digest = self._digest_of.pop(block_id, None)
        if digest is not None:
            del self._block_of[digest]

    def longest_match(self, digests: Sequence[bytes], max_blocks: int) -> list[int]:
        """Return the blocks of the longest run of known digests from the start."""
        block_ids: list[int] = []
        for digest in digests[:max_blocks]:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless both directions agree."""
        if {block: digest for digest, block in self._block_of.items()} != self._digest_of:
            raise IntegrityError("the prefix index's two directions differ")
