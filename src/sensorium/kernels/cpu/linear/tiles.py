"""Products of many rows with int8 and int4 weights by matrix tiles (AMX-INT8).

A panel of sixteen outputs lies in memory as the tiles read it: four inputs of each output side by
side. A block of 32 inputs is half a tile; int4 weights are widened into one once for all rows of a
task. Rows go by sixteen, at most 64 at once. A group's sums are exact in int32, and become float32
as in the other forms: with the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import torch
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu import amx, tile_check
from sensorium.kernels.cpu.amx import ROW_BYTES, TILE
from sensorium.kernels.cpu.launch import Launcher
from sensorium.kernels.cpu.linear import table
from sensorium.kernels.cpu.linear.integer.kernel import ManyRows
from sensorium.kernels.cpu.linear.integers import (
    BLOCK,
    F32,
    I8,
    I32,
    I64,
    at,
    lanes,
    local_array,
)
from sensorium.kernels.cpu.numeric import (
    INLINE,
    WIDTH,
    _call,
    for_each_count,
    intrinsic,
    load16,
    njit,
    recast,
    shifted,
    splat,
    vec16,
)
from sensorium.kernels.weight import Multiply

ROW_TILES = 4
"""Most tiles of rows that go through a tile of weights at once."""
_C, _A, _B = (0, 1, 2, 3), (4, 5), 6
CONFIGURATION = amx.configuration(
    [(TILE, ROW_BYTES)] * 4 + [(TILE, BLOCK)] * 2 + [(BLOCK // 4, ROW_BYTES)]
)
_INTS, _FLOATS = lanes(I32, WIDTH), lanes(F32, WIDTH)
BYTES, INTS = types.CPointer(types.uint8), types.CPointer(types.int32)


@functools.cache
def row_product(unit: amx.Unit) -> Any:
    """Return the product of rows with a group of a panel, for ``CONFIGURATION``."""

    @intrinsic
    def multiply_rows(
        typingctx: Any,
        state: Any,
        count: Any,
        rows: Any,
        block_stride: Any,
        weights: Any,
        blocks: Any,
        products: Any,
    ) -> Any:
        """Compute products (16 count, 16) int32 of signed rows with unsigned weights.

        count: 1 to ROW_TILES. rows: of a block of 32 inputs each, the next block of all rows
        ``block_stride`` bytes further. weights: (blocks, 8, 16, 4).
        """

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            emit = functools.partial(_emit, builder, unit, args)
            for_each_count(builder, args[1], ROW_TILES, emit)
            return context.get_dummy_value()

        number = types.int64
        return types.void(amx.STATE, number, BYTES, number, BYTES, number, INTS), codegen

    return multiply_rows


def _emit(builder: ir.IRBuilder, unit: amx.Unit, args: Any, count: int) -> None:
    """Emit the product for a fixed number of row tiles."""
    state, _, rows, block_stride, weights, blocks, products = args
    for number in range(count):
        unit.zero(builder, state, _C[number])
    with cgutils.for_range(builder, blocks) as loop:
        place = builder.gep(weights, [builder.mul(loop.index, I64(BLOCK * TILE))])
        unit.load(builder, state, _B, place, I64(ROW_BYTES))
        own = builder.gep(rows, [builder.mul(loop.index, block_stride)])
        for number in range(count):
            a = _A[number % len(_A)]
            place = builder.gep(own, [I64(number * TILE * BLOCK)])
            unit.load(builder, state, a, place, I64(BLOCK))
            unit.dot(builder, state, "tdpbsud", _C[number], a, _B)
    for number in range(count):
        place = at(builder, builder.bitcast(products, I8.as_pointer()), number * 1024, I8)
        unit.store(builder, state, _C[number], place, I64(ROW_BYTES))


@intrinsic
def add_scaled(
    typingctx: Any, products: Any, row: Any, correction: Any, scale: Any, sums: Any
) -> Any:
    """Add (products[row] + correction) * scale to sums[row], rounded once; rows of sixteen."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        products, row, correction, scale, sums = args
        offset = builder.mul(row, I64(WIDTH))
        place = builder.bitcast(builder.gep(products, [offset]), _INTS.as_pointer())
        first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), correction, I32(0))
        zeros = ir.Constant(_INTS, [0] * WIDTH)
        spread = builder.shuffle_vector(first, ir.Constant(_INTS, ir.Undefined), zeros)
        wide = builder.sitofp(builder.add(builder.load(place, align=4), spread), _FLOATS)
        total = builder.bitcast(builder.gep(sums, [offset]), _FLOATS.as_pointer())
        before = builder.load(total, align=4)
        after = _call(builder, "llvm.fma.v16f32", _FLOATS, [wide, scale, before])
        builder.store(after, total, align=4)
        return context.get_dummy_value()

    floats = types.CPointer(types.float32)
    return types.void(INTS, types.int64, types.int32, vec16, floats), codegen


@intrinsic
def widen_nibbles(typingctx: Any, weights: Any, out: Any) -> Any:
    """Write a group of 32 inputs of int4 weights (256 bytes) as bytes (8, 16, 4)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = lanes(I32, WIDTH)
        mask = ir.Constant(kind, [0x0F0F0F0F] * WIDTH)
        four = ir.Constant(kind, [4] * WIDTH)
        for step in range(4):
            raw = builder.load(at(builder, args[0], step * ROW_BYTES, kind), align=1)
            low, high = builder.and_(raw, mask), builder.and_(builder.lshr(raw, four), mask)
            builder.store(low, at(builder, args[1], step * ROW_BYTES, kind), align=1)
            builder.store(high, at(builder, args[1], (step + 4) * ROW_BYTES, kind), align=1)
        return context.get_dummy_value()

    return types.void(BYTES, BYTES), codegen


def _row_tiles(rows: Any) -> Any:
    """Return how many tiles of rows to multiply at once."""
    return min(ROW_TILES, (rows + TILE - 1) // TILE)


_row_tiles_of = njit(**INLINE)(_row_tiles)
_PRODUCTS = local_array(types.int32, ROW_TILES * TILE * WIDTH)


def _panel(unit: amx.Unit, half_bytes: bool, group_bytes: int) -> Any:
    """Return the inlined function that multiplies rows with a panel, as the other forms have it.

    half_bytes: weights are int4, a group of 32 with its scales in ``group_bytes``; else a panel's
    bytes are one sequence.
    """
    operations = amx.operations(unit, CONFIGURATION)
    own_state, configure, release = operations.state, operations.configure, operations.release
    multiply_rows = row_product(unit)
    unpacked_of = local_array(types.uint8, BLOCK * WIDTH)

    @njit(**INLINE)
    def multiply(
        q: Any,
        scales: Any,
        corrections: Any,
        rows: Any,
        weights: Any,
        inputs: Any,
        group: Any,
        sums: Any,
    ) -> None:
        padded = (inputs + BLOCK - 1) // BLOCK * BLOCK
        state, products, unpacked = own_state(), _PRODUCTS(), unpacked_of()
        configure(state)
        for start in range(0, padded, group):
            place = start // group * rows
            blocks = min(group, padded - start) // BLOCK
            own = shifted(weights, start * WIDTH)
            factors = own
            if half_bytes:
                own = shifted(weights, start // BLOCK * group_bytes)
                factors = shifted(own, BLOCK * WIDTH // 2)
                widen_nibbles(own, unpacked)
                own = unpacked
            own_q = shifted(q, start * rows)
            row = 0
            while row < rows:
                count = _row_tiles_of(rows - row)
                own_rows = recast(shifted(own_q, row * BLOCK), types.uint8)
                multiply_rows(state, count, own_rows, rows * BLOCK, own, blocks, products)
                for r in range(min(count * TILE, rows - row)):
                    scale = splat(scales[place + row + r])
                    if half_bytes:
                        scale = load16(recast(factors, types.int16), 0) * scale
                    own_sums = shifted(sums, row * WIDTH)
                    add_scaled(products, r, corrections[place + row + r], scale, own_sums)
                row += count * TILE
        release(state)

    return multiply


def int8_panel(unit: amx.Unit) -> Any:
    """Return the product with a panel of int8 weights."""
    return _panel(unit, False, 0)


def int4_panel(unit: amx.Unit, group_bytes: int) -> Any:
    """Return the product with a panel of int4 weights in groups of 32, scales included."""
    return _panel(unit, True, group_bytes)


# -- their use ------------------------------------------------------------------------------------

LEAST_ROWS = 16
"""Rows from which on tiles are used where nothing was measured."""
NAME = "tiles"
"""Name of these products in tables of measured times."""


def units() -> dict[str, amx.Unit]:
    """Return the units that products can be compiled for, by the name of their form."""
    unit = amx.unit()
    return {} if unit is None or not amx.has_bytes(unit) else {unit.name: unit}


def least_rows(form: str, vectors: str) -> int | None:
    """Return from how many rows on tiles are the faster ones, as measured; None if never.

    vectors: name of the other product in the table.
    """
    times = table.measured().get(form, {})
    both = {int(n): row for n, row in times.items() if NAME in row and vectors in row}
    if not both:
        return LEAST_ROWS
    won = [rows for rows in sorted(both) if both[rows][NAME] <= both[rows][vectors]]
    lost = [rows for rows in both if both[rows][NAME] > both[rows][vectors]]
    later = [rows for rows in won if rows > max(lost, default=0)]
    return max(min(later), TILE) if later else None


Kernel = Callable[[torch.dtype, str], Launcher]


def many_rows(
    form: str, vectors: str, dtype: torch.dtype, kernel: Kernel, check: tile_check.Check
) -> ManyRows | None:
    """Return the kernel of a weight's format for many rows, None where there are no tiles to use.

    kernel: ``kernel(dtype, name of a unit)``. check: compares it with the vectors' kernel.
    """
    for name, unit in units().items():
        least = least_rows(form, vectors)
        if least is not None and tile_check.outcome(f"products with {form} weights", check, unit):
            return ManyRows(least, kernel(dtype, name))
    return None


def compare(bind_form: Callable[[str], Multiply], num_inputs: int, name: str, vectors: str) -> int:
    """Return whether products by tiles have the bits of those by vectors."""
    x = torch.randn(70, num_inputs, generator=torch.Generator().manual_seed(0))
    same = torch.equal(bind_form(name)(x), bind_form(vectors)(x))
    return tile_check.SAME_BITS if same else tile_check.WRONG
