"""Choice of the kernel that attention of decoders runs through."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from sensorium.kernels.cpu import amx, tile_check
from sensorium.kernels.cpu.attention.tiles import causal
from sensorium.kernels.cpu.linear import table


@dataclass(frozen=True)
class Route:
    """Kernel of a step: the tiles of ``unit``, or vectors where it is None.

    Tasks of fewer than ``least_rows`` rows take the tiles' sums in vectors.
    """

    unit: amx.Unit | None
    least_rows: int = causal.FEW_ROWS


VECTORS = Route(None)
FORMAT, TILES, NO_TILES = "attention", "tiles", "vectors"
"""Names in the table of measured times."""


def choose(dtype: torch.dtype, head_dim: int) -> Route:
    """Return the route of a model's attention on this machine, the same for all its steps."""
    unit = amx.unit()
    if unit is None or not causal.takes(dtype, head_dim):
        return VECTORS
    return checked(unit)


@functools.cache
def checked(unit: amx.Unit) -> Route:
    """Return the tiles' route as far as they can be trusted on this machine."""
    # The check runs steps, by given routes.
    from sensorium.kernels.cpu.attention.tiles import checks

    found = tile_check.outcome("attention of decoders", checks.causal, unit)
    if found == tile_check.WRONG:
        return VECTORS
    if slower_as_measured():
        return VECTORS
    return Route(unit) if found == tile_check.SAME_BITS else Route(unit, least_rows=1)


def slower_as_measured() -> bool:
    """Return whether attention was measured on this machine, and tiles were the slower ones."""
    times = table.measured().get(FORMAT, {}).values()
    both = [row for row in times if TILES in row and NO_TILES in row]
    return sum(math.log(row[TILES] / row[NO_TILES]) for row in both) > 0
