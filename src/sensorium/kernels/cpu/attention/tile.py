"""Inner loop of attention: a few rows of float32 times a narrow matrix, summed in registers.

Scores are queries times keys over the head's dimensions, outputs are probabilities times values
over tokens; with keys stored transposed both are ``c[r, j] += sum_k a[r, k] * b[k, j]`` with b in
the cache's type and j contiguous. As many rows and columns as the registers hold (8 by 32 with
AVX-512, 6 by 16 without) go together, so that each element of b is read and widened once for all
rows. The order of each sum is that of k, whatever the number of rows.

LLVM would not keep such a tile in registers by itself, so its loop is written out here for every
number of rows.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import (
    LINE_BYTES,
    WIDTH,
    _splat,
    for_each_count,
    intrinsic,
    prefetch,
    read_lanes,
    write_lanes,
)

TILE_ROWS, TILE_VECTORS = (8, 2) if levels.has_wide_registers() else (6, 1)
"""Accumulators of a full tile: more would be spilled to memory in every turn of the inner loop."""
TILE_COLUMNS = TILE_VECTORS * WIDTH

_VEC = ir.VectorType(ir.FloatType(), WIDTH)


class _Tile:
    """Operands of one multiplication, as LLVM values."""

    def __init__(self, kinds: Any, args: Any) -> None:
        self.b_kind, self.c_kind = kinds.args[3], kinds.args[6]
        _, self.a, self.a_stride, self.b, self.b_stride, self.depth = args[:6]
        self.c, self.c_stride, self.width, self.add = args[6:10]
        self.ahead: Any = None if isinstance(kinds.args[10], types.NoneType) else args[10]


def _emit(
    builder: ir.IRBuilder, tile: _Tile, num_rows: int, num_vectors: int, count: ir.Value | None
) -> None:
    """Emit code for a fixed number of rows and vectors.

    ``count`` limits the lanes of a single vector.
    """
    zero = ir.Constant(_VEC, [0.0] * WIDTH)
    slots = [
        [cgutils.alloca_once(builder, _VEC) for _ in range(num_vectors)] for _ in range(num_rows)
    ]
    places = []
    for r in range(num_rows):
        row = builder.gep(tile.c, [builder.mul(tile.c_stride, ir.Constant(ir.IntType(64), r))])
        places.append(
            [builder.gep(row, [ir.Constant(ir.IntType(64), v * WIDTH)]) for v in range(num_vectors)]
        )
    with builder.if_else(tile.add) as (some, none):
        with some:
            for r in range(num_rows):
                for v in range(num_vectors):
                    value = read_lanes(builder, tile.c_kind, places[r][v], count)
                    builder.store(value, slots[r][v])
        with none:
            for r in range(num_rows):
                for v in range(num_vectors):
                    builder.store(zero, slots[r][v])
    with cgutils.for_range(builder, tile.depth) as loop:
        b = builder.gep(tile.b, [builder.mul(loop.index, tile.b_stride)])
        columns = [
            read_lanes(
                builder,
                tile.b_kind,
                builder.gep(b, [ir.Constant(ir.IntType(64), v * WIDTH)]),
                count,
            )
            for v in range(num_vectors)
        ]
        if tile.ahead is not None:
            fetch_ahead(builder, tile, loop.index)
        kind = ir.FunctionType(_VEC, [_VEC] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
        for r in range(num_rows):
            at = builder.mul(tile.a_stride, ir.Constant(ir.IntType(64), r))
            scalar = builder.load(builder.gep(tile.a, [builder.add(at, loop.index)]))
            wide = _splat(builder, scalar)
            for v in range(num_vectors):
                summed = builder.call(fma, [wide, columns[v], builder.load(slots[r][v])])
                builder.store(summed, slots[r][v])
    for r in range(num_rows):
        for v in range(num_vectors):
            write_lanes(builder, tile.c_kind, places[r][v], builder.load(slots[r][v]), count)


def fetch_ahead(builder: ir.IRBuilder, tile: _Tile, index: ir.Value) -> None:
    """Prefetch the next ``TILE_COLUMNS`` elements at ``ahead``.

    Each turn prefetches a little, as a burst would block loads.
    """
    size = 4 if tile.b_kind.dtype == types.float32 else 2
    first = builder.mul(index, ir.Constant(ir.IntType(64), TILE_COLUMNS))
    for line in range(TILE_COLUMNS * size // LINE_BYTES):
        offset = ir.Constant(ir.IntType(64), line * LINE_BYTES // size)
        prefetch(builder, builder.gep(tile.ahead, [builder.add(first, offset)]))


@intrinsic
def multiply_tile(
    typingctx: Any,
    rows: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    depth: Any,
    c: Any,
    c_stride: Any,
    width: Any,
    add: Any,
    ahead: Any,
) -> Any:
    """Compute ``c[:rows, :width] (+)= a[:rows, :depth] b[:depth, :width]``.

    a, c: float32 pointers with the given row strides in elements; b: pointer of any element type.
    rows is 1 to TILE_ROWS, width 1 to 16, or TILE_COLUMNS. add: add to c if true, else overwrite
    it. ahead: an address like b's whose next TILE_COLUMNS * depth elements will be needed soon, or
    None.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        tile = _Tile(signature, args)

        def emit(num_rows: int) -> None:
            wide = builder.icmp_signed("==", tile.width, ir.Constant(ir.IntType(64), TILE_COLUMNS))
            with builder.if_else(wide) as (full, part):
                with full:
                    _emit(builder, tile, num_rows, TILE_VECTORS, None)
                with part:
                    _emit(builder, tile, num_rows, 1, tile.width)

        for_each_count(builder, args[0], TILE_ROWS, emit)
        return context.get_dummy_value()

    number = types.int64
    kinds = (number, a, number, b, number, number, c, number, number, types.boolean, ahead)
    return types.void(*kinds), codegen
