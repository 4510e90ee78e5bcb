"""Probabilities that proposed tokens are right, as measured while the engine runs."""

from __future__ import annotations

from bisect import bisect_right

LENGTHS = (1, 3, 6, 12)
"""Repetitions of at least so many tokens are kinds of their own."""
SHARES = (0.3, 0.6, 0.8, 0.92)
"""Sequences of which at least such a share of proposed tokens was right are kinds of their own."""
FIRST = (0.15, 0.45, 0.7, 0.86, 0.95)
"""Probabilities, by the kind of sequence, that are assumed before any token was compared."""
FIRST_SHARE = 0.7
"""Share of a sequence that is assumed then."""
HIGHEST = 0.98
"""Most that is ever assumed."""
FIRST_COUNT = 4
"""Tokens that these assumptions count for."""
OWN_WEIGHT, COMMON_WEIGHT = 0.12, 0.02
"""Weights of a token in the share of its sequence, and at least in the probability of its kind."""


class Odds:
    """Probability that a proposed token is right if those before it are.

    It is measured by the length of the repetition and by the share of right tokens that the
    sequence had lately. A share of few tokens is high or low by chance, and those that are high
    would be chosen: so it only says which tokens are alike, and what became of these is counted.
    """

    def __init__(self) -> None:
        self._shares = [list(FIRST) for _ in range(len(LENGTHS) + 1)]
        self._counts = [[FIRST_COUNT] * len(FIRST) for _ in self._shares]
        self._mean = FIRST_SHARE

    def new_sequence(self) -> float:
        """Return the share that a sequence begins with: the mean of all."""
        return self._mean

    def of(self, length: int, share: float) -> float:
        """Return the probability for a token after a repetition of ``length`` tokens."""
        kind = self._shares[bisect_right(LENGTHS, length)]
        return min(HIGHEST, kind[bisect_right(SHARES, share)])

    def observe(self, length: int, share: float, num_right: int, *, failed: bool) -> float:
        """Count the outcomes of a proposal, and return the share of the sequence after it.

        ``length`` is that of the repetition before the first token, ``share`` the sequence's before
        the step. ``failed``: the token after the right ones was wrong.
        """
        column, after = bisect_right(SHARES, share), share
        for index in range(num_right + failed):
            outcome = float(index < num_right)
            self._count(bisect_right(LENGTHS, length + index), column, outcome)
            self._mean += COMMON_WEIGHT * (outcome - self._mean)
            after += OWN_WEIGHT * (outcome - after)
        return after

    def _count(self, row: int, column: int, outcome: float) -> None:
        """Count an outcome: in the mean of a few, and in a fading one of many."""
        self._counts[row][column] += 1
        weight = max(COMMON_WEIGHT, 1.0 / self._counts[row][column])
        self._shares[row][column] += weight * (outcome - self._shares[row][column])
