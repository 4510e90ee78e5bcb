"""Stop strings, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """Text that a piece released.

    Text that may be sent, and the stop string that ended the generation, if any.
    """

    text: str
    stop: str | None


class StopChecker:
    """Search for the first stop string in a text that comes in pieces.

    Holds back what may become one.

    The stop string that is complete first wins; of several that end at the same character, the
    longest. The outcome does not depend on how the text is cut into pieces. Nothing from the stop
    string on is released, unless ``include_stop_str`` asks for the string itself. Costs constant
    time per character and stop string (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stop: Sequence[str], include_stop_str: bool = False) -> None:
        self._stops = sorted(set(stop), key=len, reverse=True)
        self._tables = [_borders(s) for s in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include_stop_str
        self._held = ""
        self._stopped = False

    def feed(self, new_text: str, *, may_stop: bool = True) -> StopResult:
        """Add text. After a stop string was found, all further text is dropped.

        ``may_stop=False``: the generation may not end yet (``min_tokens``), so this text is
        released as it is, and no stop string begins in it.
        """
        if self._stopped:
            return StopResult("", None)
        if not self._stops or not may_stop:
            return StopResult(self.flush() + new_text, None)
        for i, char in enumerate(new_text):
            stop = self._step(char)
            if stop is not None:
                seen = self._held + new_text[: i + 1]
                self._stopped, self._held = True, ""
                kept = len(seen) if self._include else len(seen) - len(stop)
                return StopResult(seen[:kept], stop)
        seen = self._held + new_text
        num_held = max(self._matched)
        safe = len(seen) - num_held
        self._held = seen[safe:]
        return StopResult(seen[:safe], None)

    def flush(self) -> str:
        """Return the text held back, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> str | None:
        """Advance each stop string by one character; the longest one that is now complete."""
        found = None
        for i, stop in enumerate(self._stops):
            k = self._matched[i]
            while k and stop[k] != char:
                k = self._tables[i][k - 1]
            if stop[k] == char:
                k += 1
            if k == len(stop):
                found = found or stop
                k = self._tables[i][k - 1]
            self._matched[i] = k
        return found


def _borders(text: str) -> list[int]:
    """Return the length of the longest proper border of each prefix of ``text``."""
    table = [0] * len(text)
    k = 0
    for i in range(1, len(text)):
        while k and text[i] != text[k]:
            k = table[k - 1]
        if text[i] == text[k]:
            k += 1
        table[i] = k
    return table
