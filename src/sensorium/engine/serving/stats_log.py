"""A line in the log about the engine's work, at intervals in which there was any."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sensorium.engine.outputs.request_metrics import status_line
from sensorium.engine.stats import EngineStats
from sensorium.errors import EngineDeadError

logger = logging.getLogger(__name__)


async def log_stats(
    num_made: Callable[[], int],
    read_stats: Callable[[], Awaitable[EngineStats]],
    *,
    interval: float,
    unit: str,
    model: str = "",
) -> None:
    """Log the rate of what was made and the engine's counters, until cancelled.

    Args:
        num_made: Returns how many units have been made since the start.
        read_stats: Returns the counters. While it raises EngineDeadError no line is written, and
            the next one is about this time, too.
        interval: Seconds between two lines.
        unit: What is made, in the plural.
        model: Name that a line ends with; none if empty.
    """
    last, since = 0, time.monotonic()
    while True:
        await asyncio.sleep(interval)
        made, now = num_made(), time.monotonic()
        if made == last:
            since = now
            continue
        try:
            stats = await read_stats()
        except EngineDeadError:
            continue
        status = f"{status_line(stats)}; model: {model}" if model else status_line(stats)
        logger.info("%.1f %s/s; %s", (made - last) / (now - since), unit, status)
        last, since = made, now
