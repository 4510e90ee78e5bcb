"""Integer products of attention: a few rows of 16-bit numbers times a narrow matrix of bytes.

Scores are queries times keys over pairs of channels, outputs are weights times values over pairs of
tokens: ``c[r, j] += a[r, 2 p] b[p, j, 0] + a[r, 2 p + 1] b[p, j, 1]``, in int32. Bytes are widened
to 16 bits in registers and multiplied in pairs (``vpmaddwd``, which LLVM joins with the addition to
``vpdpwssd`` where there is VNNI). The sums are exact, so their order does not matter, and any
CPU gets the same bits.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.attention.tile import TILE_COLUMNS, TILE_ROWS, TILE_VECTORS
from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import (
    LINE_BYTES,
    OUTLINE,
    WIDTH,
    _call,
    _splat,
    for_each_count,
    intrinsic,
    njit,
    prefetch,
    vec16,
)

LEAST_WEIGHT = 1e-37
"""Weights up to it count as zero. ``exp16`` makes 1.6e-38 of scores that are not to count."""
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SUMS, _FLOATS = ir.VectorType(_I32, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)
_BYTES, _SHORTS = ir.VectorType(_I8, 2 * WIDTH), ir.VectorType(_I16, 2 * WIDTH)


def _chosen(builder: ir.IRBuilder, vector: ir.Value, lanes: list[int]) -> ir.Value:
    order = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def _sums_of_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return the sums of the products of pairs: <32 x i16> times <32 x i16> -> <16 x i32>."""
    if levels.is_x86() and levels.has("avx512bw"):
        return _call(builder, "llvm.x86.avx512.pmaddw.d.512", _SUMS, [a, b])
    if levels.is_x86() and levels.has("avx2"):
        half = ir.VectorType(_I32, WIDTH // 2)
        parts = [
            _call(
                builder,
                "llvm.x86.avx2.pmadd.wd",
                half,
                [_chosen(builder, each, list(range(start, start + WIDTH))) for each in (a, b)],
            )
            for start in (0, WIDTH)
        ]
        order = ir.Constant(_SUMS, list(range(WIDTH)))
        return builder.shuffle_vector(parts[0], parts[1], order)
    products = [
        builder.mul(
            *(
                builder.sext(_chosen(builder, each, list(range(first, 2 * WIDTH, 2))), _SUMS)
                for each in (a, b)
            )
        )
        for first in (0, 1)
    ]
    return builder.add(*products)


class _Product:
    """Operands of one multiplication, as LLVM values."""

    def __init__(self, args: Any) -> None:
        _, self.a, self.a_stride, self.b, self.b_stride, self.depth = args[:6]
        self.c, self.c_stride, self.width, self.add = args[6:10]
        self.ahead = args[10]


def _emit(builder: ir.IRBuilder, own: _Product, num_rows: int, num_vectors: int) -> None:
    """Emit code for a fixed number of rows and vectors of sixteen columns."""
    slots = [
        [cgutils.alloca_once(builder, _SUMS) for _ in range(num_vectors)] for _ in range(num_rows)
    ]
    places = []
    for r in range(num_rows):
        row = builder.gep(own.c, [builder.mul(own.c_stride, _I64(r))])
        places.append(
            [
                builder.bitcast(builder.gep(row, [_I64(v * WIDTH)]), _SUMS.as_pointer())
                for v in range(num_vectors)
            ]
        )
    with builder.if_else(own.add) as (some, none):
        with some:
            for r in range(num_rows):
                for v in range(num_vectors):
                    builder.store(builder.load(places[r][v], align=4), slots[r][v])
        with none:
            for r in range(num_rows):
                for v in range(num_vectors):
                    builder.store(ir.Constant(_SUMS, [0] * WIDTH), slots[r][v])
    with cgutils.for_range(builder, own.depth) as loop:
        b = builder.gep(own.b, [builder.mul(loop.index, own.b_stride)])
        columns = []
        for v in range(num_vectors):
            place = builder.gep(b, [_I64(v * 2 * WIDTH)])
            raw = builder.load(builder.bitcast(place, _BYTES.as_pointer()), align=1)
            columns.append(builder.sext(raw, _SHORTS))
        step = builder.mul(loop.index, _I64(2 * WIDTH * num_vectors))
        prefetch(builder, builder.gep(own.ahead, [step]))
        for r in range(num_rows):
            at = builder.add(builder.mul(own.a_stride, _I64(r)), builder.shl(loop.index, _I64(1)))
            place = builder.bitcast(builder.gep(own.a, [at]), _I32.as_pointer())
            pair = builder.bitcast(_splat(builder, builder.load(place, align=4)), _SHORTS)
            for v in range(num_vectors):
                product = _sums_of_pairs(builder, columns[v], pair)
                builder.store(builder.add(builder.load(slots[r][v]), product), slots[r][v])
    for r in range(num_rows):
        for v in range(num_vectors):
            builder.store(builder.load(slots[r][v]), places[r][v], align=4)


@intrinsic
def multiply_pairs(
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
    """Compute ``c[:rows, :width] (+)= a[:rows, :2 depth] b[:depth, :width, :2]``.

    a: int16; b: int8, ``b_stride`` bytes from one pair to the next; c: int32. Strides of a and c
    are in elements, and a's is even. rows is 1 to TILE_ROWS, width 16 or TILE_COLUMNS. add: add to
    c if true, else overwrite it. ahead: an address like b's whose next 2 * width * depth bytes will
    be needed soon.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        own = _Product(args)

        def emit(num_rows: int) -> None:
            wide = builder.icmp_signed("==", own.width, _I64(TILE_COLUMNS))
            with builder.if_else(wide) as (full, part):
                with full:
                    _emit(builder, own, num_rows, TILE_VECTORS)
                with part:
                    _emit(builder, own, num_rows, 1)

        for_each_count(builder, args[0], TILE_ROWS, emit)
        return context.get_dummy_value()

    number = types.int64
    kinds = (number, a, number, b, number, number, c, number, number, types.boolean, ahead)
    return types.void(*kinds), codegen


@njit(**OUTLINE)
def product(
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
) -> None:
    """Run ``multiply_pairs``, whose code is large, so that there is one copy of it."""
    multiply_pairs(rows, a, a_stride, b, b_stride, depth, c, c_stride, width, add, ahead)


@intrinsic
def fetch_line(typingctx: Any, ptr: Any, index: Any) -> Any:
    """Prefetch the line of element ``index``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        prefetch(builder, builder.bitcast(builder.gep(args[0], [args[1]]), _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(ptr, types.int64), codegen


# -- integers and floats --------------------------------------------------------------------------


@intrinsic
def load_integers(typingctx: Any, ptr: Any, index: Any) -> Any:
    """Load sixteen int32 as floats."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.bitcast(builder.gep(args[0], [args[1]]), _SUMS.as_pointer())
        return builder.sitofp(builder.load(place, align=4), _FLOATS)

    return vec16(types.CPointer(types.int32), types.int64), codegen


def _stored(kind: ir.IntType, element: types.Type) -> Any:
    """Return the intrinsic that stores rounded floats as integers."""

    @intrinsic
    def store_integers(typingctx: Any, out: Any, index: Any, values: Any, factor: Any) -> Any:
        """Store the integers nearest to ``values * factor``, which must fit, from index on.

        Those of NaN are arbitrary.
        """

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            out, index, values, factor = args
            scaled = builder.fmul(values, factor)
            whole = _call(builder, "llvm.lrint.v16i32.v16f32", _SUMS, [scaled])
            small = builder.trunc(whole, ir.VectorType(kind, WIDTH))
            place = builder.bitcast(builder.gep(out, [index]), small.type.as_pointer())
            builder.store(small, place, align=1)
            return context.get_dummy_value()

        return types.void(types.CPointer(element), types.int64, vec16, vec16), codegen

    return store_integers


store_bytes = _stored(_I8, types.int8)
store_shorts = _stored(_I16, types.int16)


@intrinsic
def rounded_up(typingctx: Any, value: Any) -> Any:
    """Round a positive float32 up to one that bf16 holds."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[0], _I32)
        above = builder.and_(builder.add(bits, _I32(0xFFFF)), _I32(-0x10000))
        return builder.bitcast(above, ir.FloatType())

    return types.float32(types.float32), codegen


@intrinsic
def counted_product(typingctx: Any, a: Any, b: Any) -> Any:
    """Return a * b in lanes where a is more than a hidden score's weight, else zero."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        zero = ir.Constant(_FLOATS, [0.0] * WIDTH)
        least = ir.Constant(_FLOATS, [LEAST_WEIGHT] * WIDTH)
        counts = builder.fcmp_ordered(">", args[0], least)
        return builder.select(counts, builder.fmul(args[0], args[1]), zero)

    return vec16(vec16, vec16), codegen


def _exchange(step: int) -> Any:
    """Return the intrinsic of one round of the Hadamard transform within a vector."""

    @intrinsic
    def exchange(typingctx: Any, x: Any) -> Any:
        """Replace lanes j and j + step by their sum and their difference."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            others = _chosen(builder, args[0], [lane ^ step for lane in range(WIDTH)])
            signs = [-1.0 if lane & step else 1.0 for lane in range(WIDTH)]
            return builder.fadd(others, builder.fmul(args[0], ir.Constant(_FLOATS, signs)))

        return vec16(vec16), codegen

    return exchange


exchange1, exchange2, exchange4, exchange8 = map(_exchange, (1, 2, 4, 8))

assert 2 * TILE_COLUMNS <= LINE_BYTES, "one line is prefetched for each pair"
