"""Weights of attention for matrix tiles: rounded to bf16, in the order of pairs that tiles read.

Tokens go by granules of 32. In a granule the weights of the tokens i and i + 16 lie side by side,
so that two vectors of weights make one of pairs without a shuffle; values are packed likewise.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types

from sensorium.kernels.cpu.amx import BLOCK
from sensorium.kernels.cpu.attention.softmax import HIDDEN_SCORE, exp2_nonpositive
from sensorium.kernels.cpu.numeric import (
    INLINE,
    OUTLINE,
    WIDTH,
    _splat,
    f32,
    intrinsic,
    largest,
    load16,
    njit,
    peak,
    splat,
    total,
    vec16,
)

_BITS = ir.VectorType(ir.IntType(32), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)

exp2_rough = exp2_nonpositive((0.05516989, 0.24260701, 0.69326091, 0.99992834))
"""2^x for x <= 0 with an error of at most 8e-5, a small part of a rounding step of bf16. The
polynomial is fitted for the smallest relative error."""


def _round_up(number: Any, step: Any) -> Any:
    """Round ``number`` up to a multiple of ``step``."""
    return (number + step - 1) // step * step


up = njit(**INLINE)(_round_up)


def _all(number: int) -> ir.Constant:
    return ir.Constant(_BITS, [number] * WIDTH)


@intrinsic
def store_weights(typingctx: Any, ptr: Any, index: Any, first: Any, second: Any) -> Any:
    """Store numbers in [0, 1] as 32 bf16, in turn one of ``first`` and one of ``second``.

    They are rounded to nearest, ties away from zero.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        low, high = (builder.add(builder.bitcast(x, _BITS), _all(0x8000)) for x in args[2:])
        both = builder.or_(builder.lshr(low, _all(16)), builder.and_(high, _all(0xFFFF0000)))
        place = builder.bitcast(builder.gep(args[0], [args[1]]), _BITS.as_pointer())
        builder.store(both, place, align=2)
        return context.get_dummy_value()

    return types.void(ptr, types.int64, vec16, vec16), codegen


@intrinsic
def interleave16(typingctx: Any, first: Any, second: Any, out: Any, index: Any) -> Any:
    """Store sixteen pairs (uint32) of 16-bit numbers from ``index`` on."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        low, high = (
            builder.zext(builder.load(builder.bitcast(place, _HALVES.as_pointer()), align=2), _BITS)
            for place in args[:2]
        )
        both = builder.or_(low, builder.shl(high, _all(16)))
        place = builder.bitcast(builder.gep(args[2], [args[3]]), _BITS.as_pointer())
        builder.store(both, place, align=4)
        return context.get_dummy_value()

    return types.void(first, second, types.CPointer(types.uint32), types.int64), codegen


@intrinsic
def within(typingctx: Any, values: Any, index: Any, low: Any, high: Any, other: Any) -> Any:
    """Replace the lanes whose number plus ``index`` is not in [low, high) by ``other``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        values, index, low, high, other = args

        def spread(number: ir.Value) -> ir.Value:
            return _splat(builder, builder.trunc(builder.sub(number, index), ir.IntType(32)))

        order = ir.Constant(_BITS, list(range(WIDTH)))
        inside = builder.and_(
            builder.icmp_signed(">=", order, spread(low)),
            builder.icmp_signed("<", order, spread(high)),
        )
        return builder.select(inside, values, _splat(builder, other))

    return vec16(vec16, types.int64, types.int64, types.int64, types.float32), codegen


@njit(**OUTLINE)
def part_weights(
    scores: Any, first: Any, low: Any, visible: Any, last: Any, factor: Any, weights: Any
) -> Any:
    """Turn a row's scores in [low, visible) into weights (bf16) 2^(factor * (score - top)).

    first, last: multiples of 32 around that range, between which all other weights become zero;
    factor is positive. Returns the largest score and the sum of the weights.
    """
    begin, end = low // BLOCK * BLOCK, up(visible, BLOCK)
    best, other = splat(HIDDEN_SCORE), splat(HIDDEN_SCORE)
    for j in range(begin, end, BLOCK):
        left, right = load16(scores, j), load16(scores, j + WIDTH)
        if j < low or j + BLOCK > visible:
            left = within(left, j, low, visible, HIDDEN_SCORE)
            right = within(right, j + WIDTH, low, visible, HIDDEN_SCORE)
        best, other = largest(left, best), largest(right, other)
    top = peak(largest(best, other))
    # The difference is exact at the top and never positive, however large the scores are.
    slope, base, summed = splat(factor), splat(top), splat(f32(0.0))
    for j in range(begin, end, BLOCK):
        left = exp2_rough((load16(scores, j) - base) * slope)
        right = exp2_rough((load16(scores, j + WIDTH) - base) * slope)
        if j < low or j + BLOCK > visible:
            left = within(left, j, low, visible, f32(0.0))
            right = within(right, j + WIDTH, low, visible, f32(0.0))
        store_weights(weights, j, left, right)
        summed = summed + (left + right)
    zero = splat(f32(0.0))
    for j in range(first, begin, BLOCK):
        store_weights(weights, j, zero, zero)
    for j in range(end, last, BLOCK):
        store_weights(weights, j, zero, zero)
    return top, total(summed)
