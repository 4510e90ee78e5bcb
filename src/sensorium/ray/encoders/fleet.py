"""The replicas of encoders as one process knows them: who is there, and what each said last.

Not beside the router, whose module Ray Serve pickles with its variables.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sensorium.ray.encoders.messages import EncoderReport


@dataclass(frozen=True, slots=True)
class EncoderFleet:
    """A snapshot: reports by replica, None of one that has not reported yet.

    ``down_since``: the time, in seconds, from which on there has been no replica; None where there
    is one.
    """

    reports: Mapping[str, EncoderReport | None]
    down_since: float | None = None

    def is_down(self, patience: float, now: float) -> bool:
        """Return True when there has been no replica for more than ``patience`` seconds."""
        return self.down_since is not None and now - self.down_since > patience

    def may_have(self, spaces: Collection[bytes]) -> bool:
        """Return False when all replicas are known to be none of these identities."""
        found = self.reports.values()
        return not found or any(one is None or one.space in spaces for one in found)


_fleets: dict[tuple[str, str], EncoderFleet] = {}
_taken: dict[int, None] = {}
_lock = threading.Lock()
MOST_TAKEN = 1 << 16
"""Attempts that are remembered to be taken; one that was cancelled meanwhile is never forgotten."""


def encoders_of(application: str, deployment: str) -> EncoderFleet | None:
    """Return the latest snapshot; None before the router of this process knows the replicas."""
    return _fleets.get((application, deployment))


def set_encoders(
    application: str, deployment: str, reports: Mapping[str, EncoderReport | None]
) -> None:
    """Set what is known of the replicas; the router does, on a thread of its own."""
    before = _fleets.get((application, deployment))
    since = None if before is None else before.down_since
    down = (since or time.monotonic()) if not reports else None
    _fleets[application, deployment] = EncoderFleet(reports, down)


def set_taken(number: int) -> None:
    """Note that a replica has taken an attempt of this process, by its number; the router does."""
    with _lock:
        _taken[number] = None
        if len(_taken) > MOST_TAKEN:
            del _taken[next(iter(_taken))]


def is_taken(number: int) -> bool:
    """Return True when a replica has an attempt, whose end it then is that ends the attempt."""
    return number in _taken


def forget_taken(number: int) -> None:
    """Forget an attempt that has ended."""
    with _lock:
        _taken.pop(number, None)
