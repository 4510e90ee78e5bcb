"""Statistics of a list of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, extremes and percentiles, in the unit of the values."""

    mean: float
    minimum: float
    p50: float
    p90: float
    p95: float
    p99: float
    maximum: float


def summarize(values: Sequence[float]) -> Summary | None:
    """Return the summary of ``values``, None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return Summary(
        mean=math.fsum(ordered) / len(ordered),
        minimum=ordered[0],
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        maximum=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted values, with linear interpolation as numpy's default.

    Raises:
        ValueError: there are no values, or the percentage is outside 0 to 100.
    """
    if not ordered:
        raise ValueError("no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"a percentage must be between 0 and 100, got {percent}")
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    part = position - low
    return ordered[low] * (1 - part) + ordered[high] * part
