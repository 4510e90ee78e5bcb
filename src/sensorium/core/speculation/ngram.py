"""The n-gram index of a sequence: finds what followed the last tokens where they stood before.

A hash table holds the latest end of each n-gram of the shortest length, and a chain leads from
there to earlier ones, as in DEFLATE compressors (RFC 1951, section 4). When the table is full, a
larger one begins, for the tokens from there on: none is entered twice. So a token costs one entry,
a look-up visits a bounded number of places, and all of it is four bytes a token in each of three
kinds of arrays, or little more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

BARRIER = -1
"""In the place of a token that must not be proposed, nor be part of what repeats."""
MOST_PLACES = 16
"""Earlier places of an n-gram that a look-up compares, the latest first."""
LEAST_SIZE = 256
"""Entries of the smallest hash table."""


class Proposal(NamedTuple):
    """Tokens that may come next, and the number of last tokens that stood before them elsewhere.

    ``predicted``: elsewhere is a text that the caller expects as the answer.
    """

    token_ids: tuple[int, ...]
    length: int
    predicted: bool = False


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
        self._tables: list[array[int]] = []
        self._full_at = 0
        self.num_indexed = 0
        """Tokens that have been entered into the index."""

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the arrays."""
        return 4 * (len(self._tokens) + len(self._earlier) + sum(map(len, self._tables)))

    @property
    def num_behind(self) -> int:
        """Return the number of tokens that ``catch_up`` has left to enter."""
        return max(0, len(self._tokens) - 1 - self.num_indexed)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens, or ``BARRIER`` in the place of one."""
        self._tokens.extend(token_ids)

    def catch_up(self, most: int) -> int:
        """Enter up to ``most`` tokens into the index, and return how many were entered.

        All but the last are entered in time: what ends there is what is looked up.
        """
        num = min(most, self.num_behind)
        last = self.num_indexed + num
        while self.num_indexed < last:
            if self.num_indexed >= self._full_at:
                size = max(LEAST_SIZE, 1 << len(self._tokens).bit_length())
                self._tables.append(array("i", bytes(4 * size)))
                self._full_at = self.num_indexed + size
            self._enter(min(last, self._full_at))
        return num

    def _enter(self, last: int) -> None:
        """Enter tokens up to number ``last`` into the latest table."""
        tokens, shortest, earlier = self._tokens, self._shortest, self._earlier
        latest, mask = self._tables[-1], len(self._tables[-1]) - 1
        if last >= len(earlier):
            earlier.extend([0] * (last + 1 - len(earlier)))
        for end in range(max(self.num_indexed + 1, shortest), last + 1):
            place = hash(tuple(tokens[end - shortest : end])) & mask
            earlier[end] = latest[place]
            latest[place] = end
        self.num_indexed = last

    def propose(self, most: int) -> Proposal:
        """Return up to ``most`` tokens that followed the longest repetition of the last ones.

        Of equally long ones the latest counts. A repetition that reaches the end goes on with what
        is proposed itself. Nothing is proposed beyond a barrier, nor what has not been entered.
        """
        if most < 1:
            return NOTHING
        place, length = self.find(self._tokens[-self._longest :])
        return Proposal(self._continuation(place, most), length) if place else NOTHING

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """Return the end of the longest repetition of the last tokens of ``tail``, and its length.

        Of equally long ones the latest counts. (0, 0) without one of the shortest length.
        """
        key = tuple(tail[-self._shortest :])
        best, best_length = 0, self._shortest - 1
        if len(key) < self._shortest or BARRIER in key:
            return 0, 0
        for place in islice(self._places(hash(key)), MOST_PLACES):
            length = self.common_length(place, tail)
            if length > best_length:
                best, best_length = place, length
            if best_length == self._longest:
                break
        return (best, best_length) if best else (0, 0)

    def _places(self, key: int) -> Iterator[int]:
        """Yield the ends of n-grams with the hash ``key``, and of some others, the latest first."""
        for latest in reversed(self._tables):
            place = latest[key & (len(latest) - 1)]
            while place:
                yield place
                place = self._earlier[place]

    def common_length(self, place: int, tail: Sequence[int]) -> int:
        """Return how many tokens before ``place`` and at the end of ``tail`` are the same."""
        tokens, most = self._tokens, min(self._longest, place, len(tail))
        length = 0
        while length < most:
            token = tokens[place - 1 - length]
            if token != tail[-1 - length] or token == BARRIER:
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
