"""Seconds of steps by their number of rows, as measured while the engine runs."""

from __future__ import annotations

UNKNOWN_ROW = 0.02
"""Cost of a row, relative to the mean step, as long as nothing was measured."""
KEPT = 0.98
"""Weight of what was measured before, with each new step of a kind."""
DOUBT = 2.0
"""Weight of ``UNKNOWN_ROW`` beside what was measured, as a sum of squared differences of rows."""
KNOWN = 10.0
"""Such a sum from which on a line is trusted."""
MOST_TIMES = 2.0
"""A measurement counts as at most so many times the estimate: what is much slower was disturbed."""


class _Line:
    """A line through the times of steps, by least squares with weights that fade."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = 0.0
        self._squares = self._products = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        if self._weight:
            seconds = min(seconds, MOST_TIMES * self.seconds(num_rows))
        self._weight = KEPT * self._weight + 1.0
        self._rows = KEPT * self._rows + num_rows
        self._seconds = KEPT * self._seconds + seconds
        self._squares = KEPT * self._squares + num_rows**2
        self._products = KEPT * self._products + num_rows * seconds

    @property
    def weight(self) -> float:
        """Return the number of measurements, each with the weight that it has left."""
        return self._weight

    @property
    def spread(self) -> float:
        """Return the weighted sum of squared differences of rows from their mean."""
        if not self._weight:
            return 0.0
        return max(0.0, self._squares - self._rows**2 / self._weight)

    def seconds(self, num_rows: int) -> float:
        if not self._weight:
            return 1.0 + UNKNOWN_ROW * num_rows
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        together = self._products - self._rows * seconds
        slope = (together + DOUBT * UNKNOWN_ROW * seconds) / (self.spread + DOUBT)
        return max(seconds / 10, seconds + max(0.0, slope) * (num_rows - rows))


class StepCosts:
    """Estimates of a step's seconds; without a measurement, some number that grows with the rows.

    Steps of about as many sequences share a line, since attention costs more for as many rows of
    several sequences. All their times together tell what a row costs, so that a few that were
    fast or slow by chance mislead no choice. Where numbers of rows do not differ for long, the cost
    of a row is forgotten, and rows count as cheap until they are tried again.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    def observe(self, num_sequences: int, num_rows: int, seconds: float) -> None:
        """Note the time of a step."""
        if seconds > 0.0:
            self._line(num_sequences).observe(num_rows, seconds)

    def seconds(self, num_sequences: int, num_rows: int) -> float:
        """Return the estimate for a step."""
        return self._line(num_sequences).seconds(num_rows)

    def is_settled(self, num_sequences: int) -> bool:
        """Return whether steps of different numbers of rows tell what a row costs."""
        return self._line(num_sequences).spread >= KNOWN

    def is_measured(self, num_sequences: int) -> bool:
        """Return whether there are any measurements."""
        return self._line(num_sequences).weight > 0.0

    def _line(self, num_sequences: int) -> _Line:
        return self._lines.setdefault(max(0, num_sequences - 1).bit_length(), _Line())
