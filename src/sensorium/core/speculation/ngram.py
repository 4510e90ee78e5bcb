"""The n-gram index of a sequence: finds what followed the last tokens where they stood before.

A hash table holds the latest end of each n-gram of the shortest length, and a chain leads from
there to earlier ones, as in DEFLATE compressors (RFC 1951, section 4). So a token costs one entry,
a look-up visits a bounded number of places, and all of it is three arrays of four bytes a token,
or little more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

BARRIER = -1
"""In the place of a token that must not be proposed, nor be part of what repeats."""
MOST_PLACES = 16
"""Earlier places of an n-gram that a look-up compares, the latest first."""
INDEXED_AT_ONCE = 4096
"""Tokens that a look-up enters into the index at most; the others follow at the next ones."""
LEAST_SIZE = 256
"""Entries of the smallest hash table."""


class Proposal(NamedTuple):
    """Tokens that may come next, and the number of last tokens that stood before them elsewhere."""

    token_ids: tuple[int, ...]
    length: int


NOTHING = Proposal((), 0)


class NgramIndex:
    """The tokens of one sequence, to which ``extend`` appends.

    Args:
        shortest: Fewest tokens at the end that must have stood elsewhere.
        longest: Most tokens that are compared: longer repetitions count as equally good.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens")
        self._shortest, self._longest = shortest, longest
        self._tokens = array("i")
        self._earlier = array("i", [0])
        self._latest = array("i", bytes(4 * LEAST_SIZE))
        self.num_indexed = 0
        """Tokens that have been entered into the index."""

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the arrays."""
        return 4 * (len(self._tokens) + len(self._earlier) + len(self._latest))

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens, or ``BARRIER`` in the place of one."""
        self._tokens.extend(token_ids)

    def catch_up(self) -> None:
        """Enter tokens into the index, at most ``INDEXED_AT_ONCE``.

        All but the last are entered in time: what ends there is what is looked up.
        """
        tokens, shortest, earlier = self._tokens, self._shortest, self._earlier
        if len(tokens) > len(self._latest):
            size = 1 << (2 * len(tokens)).bit_length()
            self._latest = array("i", bytes(4 * size))
            self.num_indexed = 0
        latest, mask = self._latest, len(self._latest) - 1
        first = self.num_indexed + 1
        last = min(len(tokens) - 1, self.num_indexed + INDEXED_AT_ONCE)
        if last >= len(earlier):
            earlier.extend([0] * (last + 1 - len(earlier)))
        for end in range(max(first, shortest), last + 1):
            place = hash(tuple(tokens[end - shortest : end])) & mask
            earlier[end] = latest[place]
            latest[place] = end
        self.num_indexed = max(self.num_indexed, last)

    def propose(self, most: int) -> Proposal:
        """Return up to ``most`` tokens that followed the longest repetition of the last ones.

        Of equally long ones the latest counts. A repetition that reaches the end goes on with what
        is proposed itself. Nothing is proposed beyond a barrier.
        """
        self.catch_up()
        tokens, end = self._tokens, len(self._tokens)
        if end <= self._shortest or most < 1:
            return NOTHING
        key = tuple(tokens[end - self._shortest : end])
        if BARRIER in key:
            return NOTHING
        place = self._latest[hash(key) & (len(self._latest) - 1)]
        best, best_length = 0, self._shortest - 1
        for _ in range(MOST_PLACES):
            if place == 0 or best_length == self._longest:
                break
            length = self._common_length(place, end)
            if length > best_length:
                best, best_length = place, length
            place = self._earlier[place]
        if not best:
            return NOTHING
        return Proposal(self._continuation(best, most), best_length)

    def _common_length(self, place: int, end: int) -> int:
        """Return how many tokens before ``place`` and before ``end`` are the same."""
        tokens, most = self._tokens, min(self._longest, place)
        length = 0
        while length < most:
            token = tokens[place - 1 - length]
            if token != tokens[end - 1 - length] or token == BARRIER:
                break
            length += 1
        return length

    def _continuation(self, place: int, most: int) -> tuple[int, ...]:
        found = self._tokens[place : place + most].tolist()
        period = len(found)
        while period and len(found) < most:
            found.append(found[len(found) - period])
        if BARRIER in found:
            found = found[: found.index(BARRIER)]
        return tuple(found)


def with_barriers(token_ids: Sequence[int], runs: Iterable[tuple[int, int]]) -> list[int]:
    """Return the tokens with barriers in runs (start, length) of positions."""
    marked = list(token_ids)
    for start, length in runs:
        marked[start : start + length] = [BARRIER] * length
    return marked
