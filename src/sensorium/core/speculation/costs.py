"""Seconds of steps by their number of rows, as measured while the engine runs."""

from __future__ import annotations

import math
from bisect import bisect_left, insort

UNKNOWN_ROW = 0.02
"""Cost of a row, relative to the step, beyond the largest step that was measured."""
FORGOTTEN_AFTER = 256
"""Steps after which a cost that was not measured again counts for a quarter less."""
DOWN, UP = 0.5, 0.15
"""Weights of a measurement below and above the estimate: noise only ever adds to a time."""
MOST_TIMES = 4.0
"""A measurement counts as at most so many times the estimate."""


class _Curve:
    """Seconds by rows, for steps of about as many sequences."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._rows: list[int] = []
        self._measured: dict[int, tuple[float, int]] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        self._num_steps += 1
        rows = rounded(num_rows)
        known = self._measured.get(rows)
        if known is None:
            insort(self._rows, rows)
            self._measured[rows] = (seconds, self._num_steps)
            return
        before = known[0]
        change = min(seconds, MOST_TIMES * before) - before
        estimate = before + (DOWN if change < 0 else UP) * change
        self._measured[rows] = (estimate, self._num_steps)

    def seconds(self, num_rows: int) -> float:
        rows = rounded(num_rows)
        if not self._rows:
            return 1.0 + UNKNOWN_ROW * rows
        at = bisect_left(self._rows, rows)
        if at == len(self._rows):
            last = self._rows[-1]
            return self._present(last) * (1.0 + (rows - last) * min(UNKNOWN_ROW, 1 / last))
        above = self._rows[at]
        if above == rows:
            return self._present(rows)
        if at == 0:
            return self._present(above) / 2
        below = self._rows[at - 1]
        share = (rows - below) / (above - below)
        return self._present(below) * (1.0 - share) + self._present(above) * share

    def _present(self, rows: int) -> float:
        seconds, step = self._measured[rows]
        age = self._num_steps - step
        return seconds * (0.5 + 0.5 * math.pow(0.5, age / FORGOTTEN_AFTER))


class StepCosts:
    """Estimates of a step's seconds; without a measurement, some number that grows with the rows.

    A cost that was not measured for a while is taken for lower, at most by half, so that what once
    did not pay is tried again now and then: the first steps of a kind, and a busy machine, are
    slow. Steps of about as many sequences share estimates, since attention costs more for as many
    rows of several sequences.
    """

    def __init__(self) -> None:
        self._curves: dict[int, _Curve] = {}

    def observe(self, num_sequences: int, num_rows: int, seconds: float) -> None:
        """Note the time of a step."""
        if seconds > 0.0:
            self._curve(num_sequences).observe(num_rows, seconds)

    def seconds(self, num_sequences: int, num_rows: int) -> float:
        """Return the estimate for a step."""
        return self._curve(num_sequences).seconds(num_rows)

    def _curve(self, num_sequences: int) -> _Curve:
        return self._curves.setdefault(max(0, num_sequences - 1).bit_length(), _Curve())


def rounded(num_rows: int) -> int:
    """Return the number of rows up to 16, larger ones rounded up to three or four binary digits."""
    unit = 1 << max(0, (num_rows - 1).bit_length() - 4)
    return -(-num_rows // unit) * unit
