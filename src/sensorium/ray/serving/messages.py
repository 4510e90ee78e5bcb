"""Values that travel between who answers HTTP requests and the engines' replicas."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TAKEN = b"taken"
"""First item of an answer: the engine has the sequence. It stays with this replica from then on."""
NOT_TAKEN = b"not taken"
"""Only item of an answer, with the id of the replica behind it: no engine runs there, and another
replica may be tried."""

OTHER_ENCODER = b"other encoder"
"""Only item of an answer: embeddings came from an encoder whose weights, dtype or device are not
those of this engine, and features are wanted in their place."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Facts of a request that a router needs, and more that goes with it.

    ``key``: a ``distributed.routing.RequestKey``. ``avoid``: replicas that did not take it.
    """

    key: object = None
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Clock:
    """A reading of the monotonic clock of a machine, which counts from its start.

    ``boot``: of the start of that machine.
    """

    boot: str
    seconds: float

    @classmethod
    def now(cls) -> Clock:
        """Read the clock of this machine."""
        return cls(_boot(), time.monotonic())

    def offset(self) -> float:
        """Return what to add to times of this clock for those of the machine that asks.

        0 on the same machine. On others the time that the reading has travelled is part of it.
        """
        here = Clock.now()
        return 0.0 if here.boot == self.boot else here.seconds - self.seconds


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
