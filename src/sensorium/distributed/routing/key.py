"""The key of a request: what a router needs to know of its content, in a few hundred bytes."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack
from typing import Protocol

from blake3 import blake3

PREFIX_TOKENS = 32
"""Tokens between the ends of the first prefixes."""
PREFIXES_PER_OCTAVE = 16
LONGEST_PREFIX = 1 << 20
DIGEST_BYTES = 8
"""Two contents with the same digest cost a request that is computed again, nothing else."""
MOST_MEDIA = 32
"""Items of a request that are told apart; further ones count by their tokens only."""


def _prefix_lengths() -> tuple[int, ...]:
    octave = PREFIXES_PER_OCTAVE * PREFIX_TOKENS
    lengths = list(range(PREFIX_TOKENS, octave, PREFIX_TOKENS))
    while octave < LONGEST_PREFIX:
        lengths += range(octave, 2 * octave, octave // PREFIXES_PER_OCTAVE)
        octave *= 2
    return (*lengths, octave)


PREFIX_LENGTHS = _prefix_lengths()
"""Tokens of the prefixes that have digests: 32, 64, … 512, from there on sixteen in each octave.

So the number of digests grows with the logarithm of a prompt, and at most a sixteenth of what two
long prompts share is overlooked.
"""


class _Item(Protocol):
    """Place of an item in a prompt, as ``core.request.ItemSpan`` has it."""

    @property
    def digest(self) -> bytes: ...

    @property
    def start(self) -> int: ...

    @property
    def num_embeds(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Content of a request, as a router sees it; small, hashable, can be pickled.

    Attributes:
        num_tokens: Tokens of the prompt.
        prefixes: Digests of growing prefixes, the first of ``PREFIX_LENGTHS[0]`` tokens, and so on.
            Each covers the salt, the adapter and the items of media in it, like a block of the
            prefix cache.
        media: Digest and number of embeddings of each item; further ones than ``MOST_MEDIA`` are
            one entry with an empty digest.
    """

    num_tokens: int
    prefixes: tuple[bytes, ...] = ()
    media: tuple[tuple[bytes, int], ...] = ()


def request_key(
    token_ids: Sequence[int],
    items: Sequence[_Item] = (),
    *,
    salt: bytes = b"",
    adapter: bytes = b"",
    rope_length: int = 0,
) -> RequestKey:
    """Return the key of a prompt.

    Args:
        token_ids: The prompt, placeholders expanded.
        items: Its media, in the order of the prompt.
        salt: Scope of the prefix cache.
        adapter: Digest of the LoRA adapter; empty for none.
        rope_length: Length that rotary factors are chosen for; 0 for the usual ones.
    """
    num_prefixes = bisect_right(PREFIX_LENGTHS, len(token_ids))
    prefixes = []
    if num_prefixes:
        ends = PREFIX_LENGTHS[:num_prefixes]
        tokens = memoryview(array("q", token_ids[: ends[-1]])).cast("B")
        state = blake3(pack("<QII", rope_length, len(salt), len(adapter)) + salt + adapter)
        waiting, start = list(reversed(items)), 0
        for end in ends:
            while waiting and waiting[-1].start < end:
                item = waiting.pop()
                state.update(pack("<II", item.start, len(item.digest)) + item.digest)
            state.update(tokens[8 * start : 8 * end])
            prefixes.append(state.digest(length=DIGEST_BYTES))
            start = end
    return RequestKey(len(token_ids), tuple(prefixes), _media(items))


def _media(items: Sequence[_Item]) -> tuple[tuple[bytes, int], ...]:
    media = [(item.digest[:DIGEST_BYTES], item.num_embeds) for item in items[:MOST_MEDIA]]
    if len(items) > MOST_MEDIA:
        media.append((b"", sum(item.num_embeds for item in items[MOST_MEDIA:])))
    return tuple(media)
