"""Trust in kernels with matrix tiles: each is compared with vectors at its first use on a machine.

A tile kernel may never have run on the CPU at hand: tests run it by an emulation (``amx``). So a
small random problem is computed both ways first, and what was found is kept beside the compiled
kernels. A kernel whose numbers differ is not used, and a warning says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from sensorium.kernels.cpu import amx, findings

logger = logging.getLogger(__name__)

WRONG, RIGHT, SAME_BITS = 0, 1, 2
"""Outcomes: other numbers, the same but for rounding, the same bits."""

Check = Callable[[amx.Unit], int]


@functools.cache
def outcome(name: str, check: Check, unit: amx.Unit) -> int:
    """Return what ``check`` finds about the kernels ``name``, run once on a machine."""
    found = findings.find(f"tiles {unit.name} {name}", lambda: check(unit), keep=lambda: True)
    if found == WRONG:
        logger.warning(
            "the matrix tiles (AMX) of this CPU give other numbers than its vectors in %s: they "
            "are not used there, which costs speed; please report it",
            name,
        )
    return found
