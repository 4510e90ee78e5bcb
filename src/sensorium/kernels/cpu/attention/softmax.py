"""Online softmax of rows of scores (Milakov and Gimelshein, 2018), in float32.

A row keeps its highest score, the sum of e^(score - highest) and the values weighted by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir

from sensorium.kernels.cpu.numeric import (
    INLINE,
    OUTLINE,
    WIDTH,
    _call,
    exp1,
    exp16,
    f32,
    fma,
    intrinsic,
    largest,
    load16,
    load_part,
    njit,
    peak,
    splat,
    store16,
    store_part,
    total,
    vec16,
    with_sign,
)

HIDDEN_SCORE = f32(-1e30)


@njit(**OUTLINE)
def cap_row(scores: Any, begin: Any, end: Any, cap: Any) -> None:
    """Replace the scores s in [begin, end) by cap * tanh(s / cap); begin is a multiple of 16.

    tanh(x) = sign(x) (1 - t) / (1 + t) with t = e^(-2 |x|), within 2e-7.
    """
    zero, one = splat(f32(0.0)), splat(f32(1.0))
    wide, slope = splat(cap), splat(f32(-2.0) / cap)
    for j in range(begin, end, WIDTH):
        score = load16(scores, j)
        power = exp16(largest(score, zero - score) * slope)
        store16(scores, j, with_sign((one - power) / (one + power) * wide, score))


@njit(**INLINE)
def hide_and_peak(scores: Any, begin: Any, low: Any, visible: Any, end: Any, top: Any) -> Any:
    """Hide scores outside of [low, visible); return the highest of the rest and ``top``.

    begin, end: multiples of 16 around what is seen.
    """
    for j in range(begin, low):
        scores[j] = HIDDEN_SCORE
    for j in range(visible, end):
        scores[j] = HIDDEN_SCORE
    best = splat(top)
    for j in range(begin, end, WIDTH):
        best = largest(load16(scores, j), best)
    return peak(best)


@njit(**OUTLINE)
def online_softmax_row(
    scores: Any, first: Any, low: Any, visible: Any, count: Any, top: Any
) -> Any:
    """Turn one row of scores into e^(score - new top) in [low, visible), else zero.

    scores holds the columns from ``first`` (a multiple of 16) to ``count``. This is one step of the
    online softmax. Returns (new top, sum).
    """
    begin = low // WIDTH * WIDTH
    padded = (visible + WIDTH - 1) // WIDTH * WIDTH
    new_top = hide_and_peak(scores, begin, low, visible, padded, top)
    base, summed = splat(new_top), splat(f32(0.0))
    for j in range(begin, padded, WIDTH):
        weight = exp16(load16(scores, j) - base)
        store16(scores, j, weight)
        summed = weight + summed
    for j in range(first, low):
        scores[j] = f32(0.0)
    for j in range(visible, max(count, padded)):
        scores[j] = f32(0.0)
    return new_top, total(summed)


@njit(**OUTLINE)
def scale_sums(sums: Any, dim: Any, factor: Any) -> None:
    """Multiply sums (dim,) by ``factor`` in place."""
    wide = splat(factor)
    full = dim - dim % WIDTH
    for d in range(0, full, WIDTH):
        store16(sums, d, load16(sums, d) * wide)
    if full < dim:
        store_part(sums, full, load_part(sums, full, dim - full) * wide, dim - full)


@njit(**OUTLINE)
def merge_part(
    part: Any, part_top: Any, part_total: Any, sums: Any, top: Any, total: Any, dim: Any
) -> Any:
    """Merge the sums (dim,), peak and total of a row's next part into those so far.

    Returns the new (peak, total).
    """
    new_top = max(top, part_top)
    kept, gained = exp1(top - new_top), exp1(part_top - new_top)
    for d in range(0, dim, WIDTH):
        count = min(WIDTH, dim - d)
        held = load_part(sums, d, count) * splat(kept)
        store_part(sums, d, fma(load_part(part, d, count), splat(gained), held), count)
    return new_top, total * kept + part_total * gained


@njit(**OUTLINE)
def clear_rows(rows: Any, dim: Any, sums: Any, tops: Any, totals: Any) -> None:
    """Set sums (rows, dim), peaks and totals (rows) to those of no token."""
    for r in range(rows):
        tops[r] = HIDDEN_SCORE
        totals[r] = f32(0.0)
    for i in range(rows * dim):
        sums[i] = f32(0.0)


def exp2_nonpositive(coefficients: Sequence[float]) -> Any:
    """Return an intrinsic that computes 2^x by lanes for x <= 0.

    x = k + r with |r| <= 1/2; 2^k times a polynomial in r, its coefficients from the highest power
    down. Below -126 the result is that of -126; NaN of NaN.
    """

    @intrinsic
    def compute(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            floats = ir.VectorType(ir.FloatType(), WIDTH)
            bits = ir.VectorType(ir.IntType(32), WIDTH)

            def constant(number: float) -> ir.Constant:
                return ir.Constant(floats, [f32(number).item()] * WIDTH)

            low = constant(-126.0)
            clamped = builder.select(builder.fcmp_ordered(">", low, args[0]), low, args[0])
            # Adding 1.5 * 2^23 rounds to the integer k and leaves it in the lowest bits.
            magic = constant(12582912.0)
            shifted_k = builder.fadd(clamped, magic)
            r = builder.fsub(clamped, builder.fsub(shifted_k, magic))
            p = constant(coefficients[0])
            for coefficient in coefficients[1:]:
                p = _call(builder, "llvm.fma.v16f32", floats, [p, r, constant(coefficient)])
            exponent = builder.shl(
                builder.bitcast(shifted_k, bits), ir.Constant(bits, [23] * WIDTH)
            )
            return builder.bitcast(builder.add(builder.bitcast(p, bits), exponent), floats)

        return vec16(vec16), codegen

    return compute
