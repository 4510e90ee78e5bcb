"""A text that the caller expects as the answer, and the place that the answer has reached in it."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.core.speculation.ngram import NOTHING, NgramIndex, Proposal

NEAR = 48
"""Tokens behind the last sure place among which a single one that agrees is enough to go on."""


class PredictedText:
    """The tokens of an expected answer, and the place in it that goes with the end of the real one.

    The answer is expected to begin as the text does. Where it turns away, each further token is
    looked up: soon behind the place where they parted, as after words that were changed, and by the
    last tokens anywhere, as after parts that were left out or moved. What agrees longer counts.

    Args:
        token_ids: The text.
        answer_ids: The answer so far.
        shortest: As in ``NgramIndex``: as many tokens that agree make a place sure.
        longest: As in ``NgramIndex``.
    """

    def __init__(
        self, token_ids: Sequence[int], answer_ids: Sequence[int], shortest: int, longest: int
    ) -> None:
        self._tokens = list(token_ids)
        self.index = NgramIndex(shortest, longest)
        """The n-grams of the text."""
        self.index.extend(token_ids)
        self._shortest, self._longest = shortest, longest
        self._num_followed = len(answer_ids)
        self._place = self._length = self._sure_place = 0
        self._is_lost = self._tokens[: len(answer_ids)] != list(answer_ids)
        if not self._is_lost:
            self._place = self._length = len(answer_ids)

    def follow(self, token_ids: Sequence[int], start: int) -> None:
        """Go on to the end of the answer, which begins at ``start`` of the sequence's tokens."""
        for end in range(start + self._num_followed + 1, len(token_ids) + 1):
            on_way = self._tokens[self._place : self._place + 1] == [token_ids[end - 1]]
            if on_way and not self._is_lost:
                self._place += 1
                self._length += 1
            else:
                tail = token_ids[max(start, end - self._longest) : end]
                place, length = self._find(tail)
                # Where nothing agrees, another token may stand in the place of the one expected.
                self._is_lost = length == 0 and self._place != self._sure_place
                self._place = self._place + 1 if length == 0 else place
                self._length = length
            if self._length >= self._shortest:
                self._sure_place = self._place
        self._num_followed = len(token_ids) - start

    def propose(self, most: int) -> Proposal:
        """Return up to ``most`` tokens that follow in the text, and how many before them agree."""
        if self._is_lost or self._place >= len(self._tokens):
            return NOTHING
        found = self._tokens[self._place : self._place + most]
        return Proposal(tuple(found), min(self._length, self._longest), predicted=True)

    def _find(self, tail: Sequence[int]) -> tuple[int, int]:
        """Return the place behind the last tokens of the answer, and how many agree; 0, 0: none."""
        place, length = self.index.find(tail)
        near = self._tokens[self._sure_place : self._sure_place + NEAR]
        if tail[-1] not in near:
            return place, length
        near_place = self._sure_place + near.index(tail[-1]) + 1
        near_length = self.index.common_length(near_place, tail)
        return (place, length) if length > near_length else (near_place, near_length)
