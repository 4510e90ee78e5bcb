"""Low-rank adapters of a layer, several in one batch: one launch adds them to the layer's results.

The launch has two phases. The first makes ``h = x A^T`` of each tile (rows of one lane, see
``RowAdapters``) in float32, sixteen ranks a task. The second adds ``scale * h B^T`` to the results,
``CHUNK_PANELS`` times sixteen outputs a task, and multiplies and shifts them where a part says so.
Everything that depends on the step or on the loaded adapters is read from two tables in memory, so
that a captured step serves any mix of adapters.

A of a part of rank r lies in panels of sixteen ranks, [r/16][K][16], padded by zeros; B in panels
of sixteen outputs, [N/16][r][16].

Each sum is the same chain of fused multiply-adds for any number of rows: of h two chains, over the
even and the odd inputs; of a result one over the ranks. So a row has the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import types

from sensorium.kernels.adapters import FIXED_ROWS, AdaptedProduct, LowRank, PackedPart, RowAdapters
from sensorium.kernels.cpu.elementwise import kernel
from sensorium.kernels.cpu.launch import Args, float_bits
from sensorium.kernels.cpu.linear.product import DONE, TAKEN, rows_that_fit, scratch
from sensorium.kernels.cpu.linear.sharing import wait_for
from sensorium.kernels.cpu.numeric import (
    INLINE,
    WIDTH,
    as_float,
    f32,
    fetch_add,
    fma,
    load,
    load16,
    load_part,
    njit,
    pointer,
    shifted,
    splat,
    store16,
    store_part,
)

MOST_PARTS = 4
"""Parts of an adapter in one layer: q, k and v, or gate and up, of a fused projection."""
CHUNK_PANELS = 16
"""Panels of outputs of a task."""
_PART_FIELDS = 7
_LANE_FIELDS = 2 + MOST_PARTS * _PART_FIELDS
_HEADER = 2
_TILE_FIELDS = 3


# -- kernel ---------------------------------------------------------------------------------------


@njit(**INLINE)
def shrink_row(x: Any, a: Any, inputs: Any, out: Any) -> None:
    """Write x A^T for one row and sixteen ranks: float32."""
    even, odd = splat(f32(0.0)), splat(f32(0.0))
    pairs = inputs - inputs % 2
    for k in range(0, pairs, 2):
        even = fma(splat(load(x, k)), load16(a, k * WIDTH), even)
        odd = fma(splat(load(x, k + 1)), load16(a, (k + 1) * WIDTH), odd)
    if pairs < inputs:
        even = fma(splat(load(x, pairs)), load16(a, pairs * WIDTH), even)
    store16(out, 0, even + odd)


@njit(**INLINE)
def shrink_four(x: Any, a: Any, inputs: Any, out: Any, width: Any) -> None:
    """Do as ``shrink_row`` for four rows, which share the reading of A."""
    x1, x2, x3 = shifted(x, inputs), shifted(x, 2 * inputs), shifted(x, 3 * inputs)
    zero = splat(f32(0.0))
    even0, even1, even2, even3 = zero, zero, zero, zero
    odd0, odd1, odd2, odd3 = zero, zero, zero, zero
    pairs = inputs - inputs % 2
    for k in range(0, pairs, 2):
        column = load16(a, k * WIDTH)
        even0 = fma(splat(load(x, k)), column, even0)
        even1 = fma(splat(load(x1, k)), column, even1)
        even2 = fma(splat(load(x2, k)), column, even2)
        even3 = fma(splat(load(x3, k)), column, even3)
        column = load16(a, (k + 1) * WIDTH)
        odd0 = fma(splat(load(x, k + 1)), column, odd0)
        odd1 = fma(splat(load(x1, k + 1)), column, odd1)
        odd2 = fma(splat(load(x2, k + 1)), column, odd2)
        odd3 = fma(splat(load(x3, k + 1)), column, odd3)
    if pairs < inputs:
        column = load16(a, pairs * WIDTH)
        even0 = fma(splat(load(x, pairs)), column, even0)
        even1 = fma(splat(load(x1, pairs)), column, even1)
        even2 = fma(splat(load(x2, pairs)), column, even2)
        even3 = fma(splat(load(x3, pairs)), column, even3)
    store16(out, 0, even0 + odd0)
    store16(out, width, even1 + odd1)
    store16(out, 2 * width, even2 + odd2)
    store16(out, 3 * width, even3 + odd3)


@njit(**INLINE)
def add_scaled(y: Any, sums: Any, scale: Any, affine: Any, panels: Any, lanes: Any) -> None:
    """Add ``scale * sums`` to the first ``lanes`` results of a panel.

    affine: address of the panel's factors, 0 for none; its shifts are ``panels`` panels behind.
    """
    whole = lanes == WIDTH
    result = fma(sums, scale, load16(y, 0) if whole else load_part(y, 0, lanes))
    if affine != 0:
        factors = pointer(affine, types.float32)
        result = fma(result, load16(factors, 0), load16(factors, panels * WIDTH))
    if whole:
        store16(y, 0, result)
    else:
        store_part(y, 0, result, lanes)


@njit(**INLINE)
def expand_row(
    hidden: Any, b: Any, rank: Any, scale: Any, affine: Any, panels: Any, y: Any, lanes: Any
) -> None:
    """Add ``scale * h B^T`` to one row of a panel; see ``add_scaled``."""
    sums = splat(f32(0.0))
    for j in range(rank):
        sums = fma(splat(load(hidden, j)), load16(b, j * WIDTH), sums)
    add_scaled(y, sums, scale, affine, panels, lanes)


@njit(**INLINE)
def expand_four(
    hidden: Any,
    width: Any,
    b: Any,
    rank: Any,
    scale: Any,
    affine: Any,
    panels: Any,
    y: Any,
    outputs: Any,
    lanes: Any,
) -> None:
    """Do as ``expand_row`` for four rows, which share the reading of B."""
    zero = splat(f32(0.0))
    sums0, sums1, sums2, sums3 = zero, zero, zero, zero
    h1, h2, h3 = shifted(hidden, width), shifted(hidden, 2 * width), shifted(hidden, 3 * width)
    for j in range(rank):
        column = load16(b, j * WIDTH)
        sums0 = fma(splat(load(hidden, j)), column, sums0)
        sums1 = fma(splat(load(h1, j)), column, sums1)
        sums2 = fma(splat(load(h2, j)), column, sums2)
        sums3 = fma(splat(load(h3, j)), column, sums3)
    add_scaled(y, sums0, scale, affine, panels, lanes)
    add_scaled(shifted(y, outputs), sums1, scale, affine, panels, lanes)
    add_scaled(shifted(y, 2 * outputs), sums2, scale, affine, panels, lanes)
    add_scaled(shifted(y, 3 * outputs), sums3, scale, affine, panels, lanes)


def build_adapt(element: Any) -> Callable[[Any], None]:
    """Build the kernel that adds adapters.

    args: x, y, inputs, outputs, table of the layer, table of tiles, h (float32), its row length.
    """

    def adapt(args: Any) -> None:
        inputs, outputs, width = args[5], args[6], args[10]
        layer, tiles = pointer(args[7], types.int64), pointer(args[8], types.int64)
        panels, chunks = layer[0], layer[1]
        tasks = tiles[0] * panels
        while True:
            task = fetch_add(args, TAKEN, 1)
            if task >= tasks:
                break
            tile = shifted(tiles, 1 + task // panels * _TILE_FIELDS)
            lane = shifted(layer, _HEADER + tile[0] * _LANE_FIELDS)
            panel, row = task % panels, tile[1]
            if panel < lane[0]:
                place, part = panel, 2
                while place >= (lane[part + 2] + WIDTH - 1) // WIDTH:
                    place -= (lane[part + 2] + WIDTH - 1) // WIDTH
                    part += _PART_FIELDS
                a = shifted(pointer(lane[part], element), place * inputs * WIDTH)
                x = shifted(pointer(args[3], element), row * inputs)
                hidden = shifted(pointer(args[9], types.float32), row * width + panel * WIDTH)
                if tile[2] == 4:
                    shrink_four(x, a, inputs, hidden, width)
                else:
                    for i in range(tile[2]):
                        shrink_row(shifted(x, i * inputs), a, inputs, shifted(hidden, i * width))
            fetch_add(args, DONE, 1)
        wait_for(args, DONE, tasks)
        tasks = tiles[0] * chunks
        while True:
            task = fetch_add(args, 0, 1)
            if task >= tasks:
                break
            tile = shifted(tiles, 1 + task // chunks * _TILE_FIELDS)
            lane = shifted(layer, _HEADER + tile[0] * _LANE_FIELDS)
            chunk, row = task % chunks, tile[1]
            if chunk < lane[1]:
                part, ranks = 2, 0
                own = (lane[part + 4] + WIDTH * CHUNK_PANELS - 1) // (WIDTH * CHUNK_PANELS)
                while chunk >= own:
                    chunk -= own
                    ranks += (lane[part + 2] + WIDTH - 1) // WIDTH * WIDTH
                    part += _PART_FIELDS
                    own = (lane[part + 4] + WIDTH * CHUNK_PANELS - 1) // (WIDTH * CHUNK_PANELS)
                rank, first, count = lane[part + 2], lane[part + 3], lane[part + 4]
                scale = splat(as_float(lane[part + 5]))
                hidden = shifted(pointer(args[9], types.float32), row * width + ranks)
                panels = (count + WIDTH - 1) // WIDTH
                affine = lane[part + 6]
                start = chunk * WIDTH * CHUNK_PANELS
                if affine != 0:
                    affine += start * 4
                while start < min(count, (chunk + 1) * WIDTH * CHUNK_PANELS):
                    b = shifted(pointer(lane[part + 1], element), start * rank)
                    y = shifted(pointer(args[4], element), row * outputs + first + start)
                    lanes = min(WIDTH, count - start)
                    if tile[2] == 4:
                        expand_four(
                            hidden, width, b, rank, scale, affine, panels, y, outputs, lanes
                        )
                    else:
                        for i in range(tile[2]):
                            expand_row(
                                shifted(hidden, i * width),
                                b,
                                rank,
                                scale,
                                affine,
                                panels,
                                shifted(y, i * outputs),
                                lanes,
                            )
                    start += WIDTH
                    if affine != 0:
                        affine += WIDTH * 4

    return adapt


# -- memory and launches --------------------------------------------------------------------------


class CpuAdapted(AdaptedProduct):
    """Adapters of a layer with ``num_outputs`` results of ``num_inputs`` values, for a CPU."""

    def __init__(
        self, num_inputs: int, num_outputs: int, num_lanes: int, dtype: torch.dtype
    ) -> None:
        self._shape = num_inputs, num_outputs
        self._dtype = dtype
        self._kernel = kernel(build_adapt, dtype)
        self._table = np.zeros(_HEADER + num_lanes * _LANE_FIELDS, np.int64)
        self._held: dict[int, list[PackedPart]] = {}
        self._work = 0

    def pack(self, part: LowRank) -> PackedPart:
        num_inputs, num_outputs = self._shape
        rank, count = part.a.shape[0], part.b.shape[0]
        if part.a.shape[1] != num_inputs or part.first + count > num_outputs:
            raise ValueError(f"an adapter's part does not fit a layer of {self._shape}")
        a, b = in_panels(part.a.to(self._dtype)), in_panels(part.b.to(self._dtype))
        affine = None
        if part.affine is not None:
            affine = part.affine.new_zeros((2, -(-count // WIDTH) * WIDTH))
            affine[:, :count] = part.affine
        return PackedPart(a, b, part.scale, rank, part.first, count, affine)

    def set(self, lane: int, parts: Sequence[PackedPart]) -> None:
        if len(parts) > MOST_PARTS:
            raise ValueError(f"{len(parts)} parts of an adapter in one layer")
        entry = np.zeros(_LANE_FIELDS, np.int64)
        for index, part in enumerate(parts):
            addresses = part.a.data_ptr(), part.b.data_ptr()
            place = part.rank, part.first, part.num_outputs
            affine = 0 if part.affine is None else part.affine.data_ptr()
            fields = (*addresses, *place, float_bits(part.scale), affine)
            entry[2 + index * _PART_FIELDS : 2 + (index + 1) * _PART_FIELDS] = fields
            entry[0] += -(-part.rank // WIDTH)
            entry[1] += -(-part.num_outputs // (WIDTH * CHUNK_PANELS))
        start = _HEADER + lane * _LANE_FIELDS
        self._table[start : start + _LANE_FIELDS] = entry
        self._held.pop(lane, None)
        if parts:
            self._held[lane] = list(parts)
        lanes = self._table[_HEADER:].reshape(-1, _LANE_FIELDS)
        self._table[0], self._table[1] = lanes[:, 0].max(), lanes[:, 1].max()
        ranks = int(self._table[0]) * WIDTH
        self._work = ranks * sum(self._shape)

    def packed_bytes(self, rank: int, num_outputs: int, is_affine: bool = False) -> int:
        ranks, outputs = (-(-size // WIDTH) * WIDTH for size in (rank, num_outputs))
        numbers = ranks * self._shape[0] + outputs * rank
        return numbers * self._dtype.itemsize + 8 * outputs * is_affine

    def add(self, x: torch.Tensor, y: torch.Tensor, rows: RowAdapters) -> None:
        width, num_rows = int(self._table[0]) * WIDTH, x.shape[0]
        if width == 0 or num_rows == 0:
            return
        # A captured step goes through at once: its tiles are those of the whole step.
        most_rows = rows_that_fit(width * 4, FIXED_ROWS)
        if num_rows <= most_rows:
            self._add(x, y, rows, width)
            return
        for first in range(0, num_rows, most_rows):
            stop = min(first + most_rows, num_rows)
            with rows.narrowed(first, stop):
                self._add(x[first:stop], y[first:stop], rows, width)

    def _add(self, x: torch.Tensor, y: torch.Tensor, rows: RowAdapters, width: int) -> None:
        """Do as ``add`` for rows whose products with A, of ``width`` numbers each, fit at once."""
        num_rows, num_inputs = x.shape
        tiles = rows.tiles(num_rows)
        hidden, _ = scratch(num_rows * width * 4)
        args = Args(
            *(0, 0, 0, x.data_ptr(), y.data_ptr(), num_inputs, self._shape[1]),
            *(self._table.ctypes.data, tiles.table.ctypes.data, hidden, width),
        )
        self._kernel.for_weight(num_rows * self._work)(args)


def in_panels(matrix: torch.Tensor) -> torch.Tensor:
    """Lay (R, C) out by panels of sixteen rows, [R/16][C][16]; rows that are missing are zeros.

    Computed by the calling thread alone: others may be running the model.
    """
    num_rows, num_columns = matrix.shape
    num_panels = -(-num_rows // WIDTH)
    found = torch.empty((num_panels, num_columns, WIDTH), dtype=matrix.dtype)
    # NumPy has no bfloat16; where numbers go does not depend on what they are.
    integers = {2: torch.int16, 4: torch.int32}[matrix.dtype.itemsize]
    to, rows = found.view(integers).numpy(), matrix.contiguous().view(integers).numpy()
    whole = num_rows // WIDTH
    to[:whole] = rows[: whole * WIDTH].reshape(whole, WIDTH, num_columns).transpose(0, 2, 1)
    if whole < num_panels:
        rest = num_rows - whole * WIDTH
        to[whole, :, :rest] = rows[whole * WIDTH :].T
        to[whole, :, rest:] = 0
    return found
