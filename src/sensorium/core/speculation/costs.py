"""Seconds of steps by their number of rows, as measured while the engine runs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

UNKNOWN_ROW = 0.02
"""Cost of a row, relative to a step without tried tokens, as long as nothing was measured."""
PLAIN_STEPS, TRYING_STEPS = 4, 16
"""Latest steps that count: those that tried no tokens, and those that tried some. With each of the
latter, as many of the former just before and after it are compared."""
FASTEST = 0.25
"""Share of the tried tokens, those of the cheapest steps, from which the cost of a row is taken."""
LIFETIME = 64
"""Steps after which one that tried tokens counts no more."""
KNOWN = 3
"""Steps that tried tokens, and that tried none, from which on it is known what a row costs."""


class _Time(NamedTuple):
    num_rows: int
    seconds: float


@dataclass(slots=True)
class _Trial:
    """A step that tried tokens, and the fastest of those around it that tried none."""

    number: int
    time: _Time
    base: _Time | None
    num_after: int = 0
    """Steps after it that were looked at for the base."""

    @property
    def num_more(self) -> int:
        return 0 if self.base is None else self.time.num_rows - self.base.num_rows

    @property
    def row_cost(self) -> float:
        """Return the seconds of each further row, relative to the base."""
        assert self.base is not None
        return max(0.0, self.time.seconds / self.base.seconds - 1.0) / self.num_more


class _Line:
    """The base and the slope of a line through the times of steps.

    The slope is relative to the base: it comes from steps that tried tokens beside those just
    before and after them that tried none, so that it stays where all steps get slower or faster.
    The cheaper steps count, since what else runs on a machine, and the capture of a step, make some
    slower, and none faster.
    """

    def __init__(self) -> None:
        self._plain: deque[_Time] = deque(maxlen=PLAIN_STEPS)
        self._trying: deque[_Trial] = deque(maxlen=TRYING_STEPS)
        self._num_steps = 0
        self._slope: float | None = None

    def observe(self, num_rows: int, seconds: float, *, tried: bool) -> None:
        self._num_steps += 1
        self._slope = None
        time = _Time(num_rows, seconds)
        if tried:
            base = min(self._plain, key=_seconds) if self._plain else None
            self._trying.append(_Trial(self._num_steps, time, base))
        else:
            for trial in self._trying:
                if trial.num_after < PLAIN_STEPS:
                    trial.base = time if trial.base is None else min(trial.base, time, key=_seconds)
                    trial.num_after += 1
            self._plain.append(time)
        while self._trying and self._trying[0].number <= self._num_steps - LIFETIME:
            self._trying.popleft()

    @property
    def num_plain(self) -> int:
        """Return the number of steps without tried tokens that count."""
        return len(self._plain)

    @property
    def num_trying(self) -> int:
        """Return the number of steps with tried tokens that count."""
        return len(self._trying)

    def seconds(self, num_rows: int) -> float:
        if self._slope is None:
            self._slope = self._fit()
        if self._plain:
            base = min(self._plain, key=_seconds)
        elif self._trying:
            base = min((trial.time for trial in self._trying), key=_seconds)
        else:
            base = _Time(0, 1.0)
        return base.seconds * max(0.1, 1.0 + self._slope * (num_rows - base.num_rows))

    def _fit(self) -> float:
        """Return the seconds of each further row, relative to the base."""
        costs = [(trial.row_cost, trial.num_more) for trial in self._trying if trial.num_more > 0]
        left = FASTEST * sum(weight for _, weight in costs)
        for cost, weight in sorted(costs):
            left -= weight
            if left <= 0.0:
                return cost
        return UNKNOWN_ROW


def _seconds(time: _Time) -> float:
    return time.seconds


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
        return line.num_plain >= KNOWN and line.num_trying >= KNOWN

    def is_measured(self, num_sequences: int) -> bool:
        """Return whether there are any measurements."""
        line = self._line(num_sequences)
        return line.num_plain + line.num_trying > 0

    def _line(self, num_sequences: int) -> _Line:
        return self._lines.setdefault(max(0, num_sequences - 1).bit_length(), _Line())
