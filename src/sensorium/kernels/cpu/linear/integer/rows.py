"""Rows of activations quantized to 8 bits.

A row is quantized by groups: in each, the number of the largest magnitude m becomes 127 or -127,
every other x the integer nearest to 127 x / m (ties to even), and the group's scale is m / 127.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types

from sensorium.kernels.cpu.linear.integers import (
    BLOCK,
    F32,
    I8,
    I16,
    I32,
    I64,
    at,
    fetch_lines,
    lanes,
)
from sensorium.kernels.cpu.numeric import (
    INLINE,
    LINE_BYTES,
    WIDTH,
    _call,
    f32,
    intrinsic,
    load16,
    load_part,
    njit,
    shifted,
    splat,
    vec16,
)


@intrinsic
def magnitudes(typingctx: Any, peaks: Any, values: Any) -> Any:
    """Return the larger of ``peaks`` and the bits of ``|values|``, compared as integers.

    Infinity is larger than any number, and NaN larger than infinity.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = lanes(I32, WIDTH)
        mask = ir.Constant(kind, [0x7FFFFFFF] * WIDTH)
        bits = builder.and_(builder.bitcast(args[1], kind), mask)
        before = builder.bitcast(args[0], kind)
        larger = builder.select(builder.icmp_signed(">", bits, before), bits, before)
        return builder.bitcast(larger, args[0].type)

    return vec16(vec16, vec16), codegen


@intrinsic
def largest_magnitude(typingctx: Any, peaks: Any) -> Any:
    """Return the largest lane of ``magnitudes``, as a float."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[0], lanes(I32, WIDTH))
        return builder.bitcast(_call(builder, "llvm.vector.reduce.smax.v16i32", I32, [bits]), F32)

    return types.float32(vec16), codegen


def _store_integers(pairs: bool) -> Any:
    """Return the intrinsic that quantizes sixteen values."""

    @intrinsic
    def store_integers(
        typingctx: Any, out: Any, index: Any, values: Any, factor: Any, sums: Any
    ) -> Any:
        """Store the integers nearest to ``values * factor`` from index on; add them to ``sums``.

        ``sums`` holds integers in the bits of a vector of floats.
        """

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            out, index, values, factor, sums = args
            kind = lanes(I32, WIDTH)
            scaled = builder.fmul(values, factor)
            whole = _call(builder, "llvm.lrint.v16i32.v16f32", kind, [scaled])
            if pairs:
                order = [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in range(WIDTH)]
                short = builder.trunc(whole, lanes(I16, WIDTH))
                small = builder.shuffle_vector(short, short, ir.Constant(kind, order))
                index = builder.shl(index, I64(1))
            else:
                small = builder.trunc(whole, lanes(I8, WIDTH))
            builder.store(small, at(builder, out, index, small.type), align=1)
            return builder.bitcast(builder.add(builder.bitcast(sums, kind), whole), sums.type)

        return vec16(types.CPointer(types.int8), types.int64, vec16, vec16, vec16), codegen

    return store_integers


@intrinsic
def sum_of_integers(typingctx: Any, sums: Any) -> Any:
    """Return the sum of sixteen integers in the bits of a vector of floats."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[0], lanes(I32, WIDTH))
        return _call(builder, "llvm.vector.reduce.add.v16i32", I32, [bits])

    return types.int32(vec16), codegen


@intrinsic
def add_pairs(typingctx: Any, sums: Any, values: Any, factor: Any) -> Any:
    """Add to eight of ``sums`` the products of the integers of ``store_integers``, two by two."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        sums, values, factor = args
        kind, short = lanes(I32, WIDTH), lanes(I16, WIDTH)
        whole = _call(builder, "llvm.lrint.v16i32.v16f32", kind, [builder.fmul(values, factor)])
        own = builder.trunc(whole, short)
        order = ir.Constant(kind, [i ^ 1 for i in range(WIDTH)])
        others = builder.shuffle_vector(own, own, order)
        evens = builder.and_(own, ir.Constant(short, [-1, 0] * (WIDTH // 2)))
        half = lanes(I32, WIDTH // 2)
        products = _call(builder, "llvm.x86.avx2.pmadd.wd", half, [evens, others])
        spread = ir.Constant(kind, list(range(WIDTH)))
        wide = builder.shuffle_vector(products, ir.Constant(half, [0] * half.count), spread)
        return builder.bitcast(builder.add(builder.bitcast(sums, kind), wide), sums.type)

    return vec16(vec16, vec16, vec16), codegen


@njit(**INLINE)
def _read(row: Any, index: Any, size: Any) -> Any:
    """Return sixteen elements from ``index`` on, zeros from ``size`` on."""
    if index + WIDTH <= size:
        return load16(row, index)
    if index < size:
        return load_part(row, index, size - index)
    return splat(f32(0.0))


@intrinsic
def _fetch_ahead(typingctx: Any, row: Any) -> Any:
    """Prefetch what a group of 64 elements of 16 bits takes, some groups ahead.

    Another thread has often written the row just now, so that it lies in the cache of its core.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.bitcast(args[0], I8.as_pointer())
        fetch_lines(builder, place, FETCH_AHEAD, 2 * LINE_BYTES)
        return context.get_dummy_value()

    return types.void(row), codegen


FETCH_AHEAD = 1024
"""Bytes by which a row is prefetched ahead."""
_LARGEST = 3.4028234663852886e38
_LEAST = 2.0**-119
"""Groups without a larger magnitude count as zeros: 127 over it would not be finite."""


def build_quantize(pairs: bool) -> Any:
    """Return the inlined function that quantizes one group of a row.

    pairs: write 16-bit integers, those of four inputs in the order 0, 2, 1, 3, as ``avx2`` takes
    them for int8; else bytes.
    """
    store_integers = _store_integers(pairs)

    @njit(**INLINE)
    def quantize(
        row: Any, first: Any, size: Any, whole: Any, out: Any, stride: Any, crossed: Any
    ) -> Any:
        """Quantize ``size`` elements from ``first`` on into ``whole``, a multiple of 16.

        ``stride`` bytes lie between two blocks of the result. Returns the scale, NaN if an element
        is not finite, the sum of the integers, and if the row goes crosswise that of the products
        of each second one and the one before it.
        """
        source = shifted(row, first)
        _fetch_ahead(source)
        peaks = splat(f32(0.0))
        for i in range(0, whole, WIDTH):
            peaks = magnitudes(peaks, _read(source, i, size))
        peak = largest_magnitude(peaks)
        finite = peak <= f32(_LARGEST)  # false for NaN
        zeros = not finite or peak < f32(_LEAST)
        factor = splat(f32(0.0) if zeros else f32(127.0) / peak)
        sums, products = splat(f32(0.0)), splat(f32(0.0))
        for i in range(0, whole, WIDTH):
            own = shifted(out, i // BLOCK * stride)
            values = splat(f32(0.0)) if zeros else _read(source, i, size)
            sums = store_integers(own, i % BLOCK, values, factor, sums)
            if pairs and crossed:
                products = add_pairs(products, values, factor)
        scale = f32(0.0) if zeros else peak / f32(127.0)
        if not finite:
            scale = f32(np.nan)
        return scale, sum_of_integers(sums), sum_of_integers(products)

    return quantize
