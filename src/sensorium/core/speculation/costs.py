"""Seconds of steps by their number of rows, as measured while the engine runs."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

UNKNOWN_ROW = 0.02
"""Cost of a row, relative to a step without tried tokens, as long as nothing was measured."""
PLAIN_STEPS, TRYING_STEPS = 8, 16
"""Latest steps that count: those that tried no tokens, and those that tried some."""
FASTEST = 0.125
"""Share of the tried tokens, those of the cheapest steps, from which the cost of a row is taken."""
LIFETIME = 128
"""Steps after which one that tried tokens counts no more."""
KNOWN = 3
"""Steps that tried tokens from which on it is known what a row costs."""


class _Time(NamedTuple):
    number: int
    num_rows: int
    seconds: float


class _Line:
    """The base and the slope of a line through the times of steps.

    Both come from the fastest steps of late: what else runs on a machine, and the capture of a
    step, make some slower, and none faster. The slope is measured from the latest base, so that the
    beginning or end of a time in which all steps are slow does not remain in the cost of a row.
    """

    def __init__(self) -> None:
        self._plain: deque[_Time] = deque(maxlen=PLAIN_STEPS)
        self._trying: deque[_Time] = deque(maxlen=TRYING_STEPS)
        self._num_steps = 0
        self._fitted: tuple[_Time, float] | None = None

    def observe(self, num_rows: int, seconds: float, *, tried: bool) -> None:
        self._num_steps += 1
        (self._trying if tried else self._plain).append(_Time(self._num_steps, num_rows, seconds))
        while self._trying and self._trying[0].number <= self._num_steps - LIFETIME:
            self._trying.popleft()
        self._fitted = None

    @property
    def num_plain(self) -> int:
        """Return the number of steps without tried tokens that count."""
        return len(self._plain)

    @property
    def num_trying(self) -> int:
        """Return the number of steps with tried tokens that count."""
        return len(self._trying)

    def seconds(self, num_rows: int) -> float:
        if not self._plain and not self._trying:
            return 1.0 + UNKNOWN_ROW * num_rows
        if self._fitted is None:
            self._fitted = self._fit()
        base, slope = self._fitted
        return max(base.seconds / 10, base.seconds + slope * (num_rows - base.num_rows))

    def _fit(self) -> tuple[_Time, float]:
        """Return a step that is the base, and the seconds of each further row."""
        base = min(self._plain or self._trying, key=lambda time: time.seconds)
        slopes = [
            (max(0.0, time.seconds - base.seconds) / more, more)
            for time in self._trying
            if (more := time.num_rows - base.num_rows) > 0
        ]
        left = FASTEST * sum(weight for _, weight in slopes)
        for slope, weight in sorted(slopes):
            left -= weight
            if left <= 0.0:
                return base, slope
        return base, UNKNOWN_ROW * base.seconds


class StepCosts:
    """Estimates of a step's seconds; without a measurement, some number that grows with the rows.

    Steps of about as many sequences share a line, since attention costs more for as many rows of
    several sequences. What rows cost is forgotten where none were tried for ``LIFETIME`` steps, and
    so it is where it was measured at a bad moment.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    def observe(self, num_sequences: int, num_rows: int, seconds: float) -> None:
        """Note the time of a step; rows beyond one of each sequence are tried tokens."""
        if seconds > 0.0:
            self._line(num_sequences).observe(num_rows, seconds, tried=num_rows > num_sequences)

    def seconds(self, num_sequences: int, num_rows: int) -> float:
        """Return the estimate for a step."""
        return self._line(num_sequences).seconds(num_rows)

    def is_settled(self, num_sequences: int) -> bool:
        """Return whether steps with and without tried tokens tell what a row costs."""
        line = self._line(num_sequences)
        return line.num_plain > 0 and line.num_trying >= KNOWN

    def is_measured(self, num_sequences: int) -> bool:
        """Return whether there are any measurements."""
        line = self._line(num_sequences)
        return line.num_plain + line.num_trying > 0

    def _line(self, num_sequences: int) -> _Line:
        return self._lines.setdefault(max(0, num_sequences - 1).bit_length(), _Line())
