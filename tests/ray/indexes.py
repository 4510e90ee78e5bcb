"""What tests of shared objects have in common."""

from __future__ import annotations

import asyncio
import time
from typing import Any


async def emptied(index: Any) -> None:
    """Wait until an index has given up all: nobody waits for that."""
    end = time.monotonic() + 60
    while await index.stats.remote() != (0, 0):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
