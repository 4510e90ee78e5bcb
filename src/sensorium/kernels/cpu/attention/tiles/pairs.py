"""Products of few rows with the bits that matrix tiles give.

A tile instruction adds to c, for 32 steps of depth at a time, the sum of the first and the sum of
the second elements of sixteen pairs, each begun at zero (``amx``). Here the same sums run in vector
registers: ``even`` is the chain of the first elements, ``odd`` that of the second ones. Denormal
numbers must be flushed (``denormals``).

b is read where it is stored, so that few rows need no packed copy of it.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.amx import BLOCK, DEPTH, TILE
from sensorium.kernels.cpu.attention.steps import PART_TOKENS
from sensorium.kernels.cpu.attention.tiles.softmax import up
from sensorium.kernels.cpu.numeric import (
    OUTLINE,
    WIDTH,
    _call,
    _splat,
    for_each_count,
    intrinsic,
    njit,
    prefetch,
    read_lanes,
    shifted,
    write_lanes,
)

PAIR_ROWS, PAIR_VECTORS = 6, 2
"""Rows and vectors of a product, twice as many accumulators."""
PAIR_COLUMNS = PAIR_VECTORS * WIDTH
SCORE_STRIDE, WEIGHT_STRIDE = PART_TOKENS + WIDTH, PART_TOKENS + 2 * WIDTH
"""Lengths of rows in scratch memory. Multiples of a page would all map to one set of the CPU's
caches."""
_LINE = 32
"""bf16 elements of a cache line."""
_I64 = ir.IntType(64)
_VEC = ir.VectorType(ir.FloatType(), WIDTH)
_BF16 = types.CPointer(types.uint16)
_FLOATS = types.CPointer(types.float32)


def _grid(builder: ir.IRBuilder, rows: int, vectors: int) -> list[list[ir.Value]]:
    """Return stack slots of zeros, which LLVM keeps in registers."""
    zero = ir.Constant(_VEC, [0.0] * WIDTH)
    slots = [[cgutils.alloca_once(builder, _VEC) for _ in range(vectors)] for _ in range(rows)]
    for own in slots:
        for slot in own:
            builder.store(zero, slot)
    return slots


def _step(
    builder: ir.IRBuilder,
    args: Any,
    index: ir.Value,
    parity: int,
    slots: list[list[ir.Value]],
) -> None:
    """Add one step to the chains of a parity."""
    a, a_stride, b, b_stride = args[1], args[2], args[3 + parity], args[5]
    row = builder.gep(b, [builder.mul(index, b_stride)])
    columns = [
        read_lanes(builder, _BF16, builder.gep(row, [_I64(v * WIDTH)]))
        for v in range(len(slots[0]))
    ]
    at = builder.add(builder.shl(index, _I64(1)), _I64(parity))
    for r, own in enumerate(slots):
        place = builder.gep(a, [builder.add(builder.mul(a_stride, _I64(r)), at)])
        bits = builder.shl(builder.zext(builder.load(place), ir.IntType(32)), ir.IntType(32)(16))
        wide = _splat(builder, builder.bitcast(bits, ir.FloatType()))
        for slot, column in zip(own, columns, strict=True):
            total = _call(builder, "llvm.fma.v16f32", _VEC, [wide, column, builder.load(slot)])
            builder.store(total, slot)


def _fetch(builder: ir.IRBuilder, ahead: ir.Value, index: ir.Value) -> None:
    """Prefetch what two steps over full columns read, at the same place behind ``ahead``."""
    first = builder.mul(index, _I64(2 * PAIR_COLUMNS))
    for line in range(2 * PAIR_COLUMNS // _LINE):
        prefetch(builder, builder.gep(ahead, [builder.add(first, _I64(line * _LINE))]))


def _emit(builder: ir.IRBuilder, args: Any, rows: int, vectors: int) -> None:
    """Emit the product for a fixed number of rows and vectors."""
    evens, odds, c, c_stride, add, ahead = args[6], args[7], args[8], args[9], args[11], args[12]
    even, odd = _grid(builder, rows, vectors), _grid(builder, rows, vectors)
    with cgutils.for_range(builder, odds) as loop:
        _step(builder, args, loop.index, 0, even)
        _step(builder, args, loop.index, 1, odd)
        _fetch(builder, ahead, loop.index)
    with cgutils.for_range(builder, builder.sub(evens, odds)) as loop:
        _step(builder, args, builder.add(odds, loop.index), 0, even)
    for r in range(rows):
        for v in range(vectors):
            offset = builder.add(builder.mul(c_stride, _I64(r)), _I64(v * WIDTH))
            place = builder.gep(c, [offset])
            held = read_lanes(builder, _FLOATS, place)
            before = builder.select(add, held, ir.Constant(_VEC, [0.0] * WIDTH))
            both = builder.fadd(builder.load(even[r][v]), builder.load(odd[r][v]))
            write_lanes(builder, _FLOATS, place, builder.fadd(before, both))


@intrinsic
def _multiply_pairs(
    typingctx: Any,
    rows: Any,
    a: Any,
    a_stride: Any,
    b_even: Any,
    b_odd: Any,
    b_stride: Any,
    evens: Any,
    odds: Any,
    c: Any,
    c_stride: Any,
    width: Any,
    add: Any,
    ahead: Any,
) -> Any:
    """Compute ``c[:rows, :width] (+)= (a[:, ::2] b_even) + (a[:, 1::2] b_odd)``.

    a, b: bf16 pointers; c: float32; strides in elements. rows is 1 to PAIR_ROWS, width WIDTH or
    PAIR_COLUMNS. evens, odds: steps of the two sums, at most 16, and odds not more than evens. add:
    add to c if true, else overwrite it. ahead: an address like b's that will be needed soon.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        wide = builder.icmp_signed("==", args[10], _I64(PAIR_COLUMNS))

        def emit(count: int) -> None:
            with builder.if_else(wide) as (full, part):
                with full:
                    _emit(builder, args, count, PAIR_VECTORS)
                with part:
                    _emit(builder, args, count, 1)

        for_each_count(builder, args[0], PAIR_ROWS, emit)
        return context.get_dummy_value()

    number = types.int64
    left = (number, _BF16, number, _BF16, _BF16, number, number, number)
    return types.void(*left, _FLOATS, number, number, types.boolean, _BF16), codegen


@njit(**OUTLINE)
def multiply_pairs(
    rows: Any,
    a: Any,
    a_stride: Any,
    b_even: Any,
    b_odd: Any,
    b_stride: Any,
    evens: Any,
    odds: Any,
    c: Any,
    c_stride: Any,
    width: Any,
    add: Any,
    ahead: Any,
) -> None:
    """Compute ``_multiply_pairs``, compiled once for all who call it."""
    _multiply_pairs(
        *(rows, a, a_stride, b_even, b_odd, b_stride, evens, odds),
        *(c, c_stride, width, add, ahead),
    )


@njit(**OUTLINE)
def score_pairs(
    q: Any,
    rows: Any,
    dim: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    head_at: Any,
    begin: Any,
    first: Any,
    last: Any,
    end: Any,
    block_size: Any,
    scores: Any,
) -> None:
    """Compute the scores of few rows for the columns [first, last) from token ``begin`` on.

    Blocks that begin behind ``end`` are not read.
    """
    depth = up(dim, DEPTH)
    step = PAIR_COLUMNS if block_size % PAIR_COLUMNS == 0 else WIDTH
    for column in range(first, last, step):
        token = begin + column
        if token >= end:
            break
        block = types.int64(table[token // block_size])
        offset = token % block_size
        place = block * head_at[0] + head_at[1]
        keys, ahead = shifted(k_cache, place + offset), shifted(v_cache, place + offset * dim)
        for r in range(0, rows, PAIR_ROWS):
            for d in range(0, dim, DEPTH):
                pairs = min(DEPTH, dim - d) // 2
                even = shifted(keys, d * block_size)
                multiply_pairs(
                    *(min(PAIR_ROWS, rows - r), shifted(q, r * depth + d), depth),
                    *(even, shifted(even, block_size), 2 * block_size, pairs, pairs),
                    *(shifted(scores, r * SCORE_STRIDE + column), SCORE_STRIDE, step, d > 0),
                    shifted(ahead, d * step),
                )


@njit(**OUTLINE)
def weigh_pairs(
    weights: Any,
    rows: Any,
    dim: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    head_at: Any,
    begin: Any,
    first: Any,
    last: Any,
    end: Any,
    block_size: Any,
    sums: Any,
) -> None:
    """Compute the weighted values of few rows for the columns [first, last): sums (rows, dim)."""
    for column in range(first, last, BLOCK):
        token = begin + column
        evens, odds = min(TILE, end - token), min(TILE, max(0, end - token - TILE))
        block = types.int64(table[token // block_size])
        even = shifted(v_cache, block * head_at[0] + head_at[1] + token % block_size * dim)
        odd = even
        if odds > 0:
            block = types.int64(table[(token + TILE) // block_size])
            place = block * head_at[0] + head_at[1]
            odd = shifted(v_cache, place + (token + TILE) % block_size * dim)
        later = types.int64(table[min(token + PART_TOKENS // 2, end - 1) // block_size])
        ahead = shifted(k_cache, later * head_at[0] + head_at[1])
        for r in range(0, rows, PAIR_ROWS):
            d = 0
            while d < dim:
                width = PAIR_COLUMNS if dim - d >= PAIR_COLUMNS else WIDTH
                multiply_pairs(
                    *(min(PAIR_ROWS, rows - r), shifted(weights, r * WEIGHT_STRIDE + column)),
                    *(WEIGHT_STRIDE, shifted(even, d), shifted(odd, d), dim, evens, odds),
                    *(shifted(sums, r * dim + d), dim, width, column > first),
                    shifted(ahead, d * BLOCK),
                )
                d += width
