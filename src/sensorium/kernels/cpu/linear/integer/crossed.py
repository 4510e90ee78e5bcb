"""Products of many rows with int8 weights by AVX2, with few multiplications.

After S. Winograd, "A New Algorithm for Inner Product", IEEE Transactions on Computers C-17 (1968):
``a0 w0 + a1 w1 = (a0 + w1) (a1 + w0) - a0 a1 - w0 w1``. The products of the activations are summed
once, when a row is quantized, and those of the weights once for all rows of a task. What is left is
one multiplication and two additions in 16 bits for two inputs, in place of two multiplications:
more units of a CPU add than multiply, and these few are the limit. Nothing is rounded: sums are at
most 382, their products fit 18 bits, and a group's sum fits int32.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear.integer.kernel import no_rows
from sensorium.kernels.cpu.linear.integers import (
    BLOCK,
    I64,
    STEP,
    STEP_BYTES,
    Form,
    local_array,
    opaque,
    tile_function,
)
from sensorium.kernels.cpu.numeric import INLINE, WIDTH, intrinsic, njit

GROUP = 64
"""Inputs of a row that share a scale."""
CROSSED_ROWS = 4
"""Rows that are multiplied crosswise at once."""
LEAST_CROSSED = 16
"""Rows of a run from which on it is worth widening the weights of a group once for all of them."""
SUMS_BYTES = 4 * WIDTH
"""Bytes of the sums that ``widen`` writes before the weights."""

buffer = local_array(types.uint8, SUMS_BYTES + 2 * GROUP * WIDTH)
"""Memory that ``widen`` writes into."""


@njit(**INLINE)
def crossed_rows(rows: Any) -> Any:
    """Return how many of the rows of a run go crosswise on AVX2: the first ones, in whole tiles."""
    return rows - rows % CROSSED_ROWS if rows >= LEAST_CROSSED else 0


def rows_of(form: str) -> Any:
    """Return the inlined function of how many rows of a run go crosswise in a form."""
    return crossed_rows if form == "avx2" else no_rows


@intrinsic
def widen(typingctx: Any, weights: Any, steps: Any, out: Any) -> Any:
    """Write the bytes of weights as 16-bit numbers: for each step the even ones, the odd ones.

    Before them it writes minus the sum of the products of each even one and the odd one behind it,
    int32 for each output.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        form = Form(builder, "avx2")
        size = 4 * form.width
        zero = form.constant(form.sums, 0)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(form.parts)]
        with cgutils.for_range(builder, args[1]) as loop:
            start = builder.mul(loop.index, I64(STEP_BYTES))
            offsets = [builder.add(start, I64(p * size)) for p in range(form.parts)]
            loaded = [form.load(args[0], offset, form.bytes) for offset in offsets]
            even, odd = form.halves(loaded)
            for slot, a, b in zip(sums, even, odd, strict=True):
                products = form.multiply_shorts(a, b)
                builder.store(builder.sub(builder.load(slot), products), slot)
            to = builder.add(builder.shl(start, I64(1)), I64(SUMS_BYTES))
            for i, value in enumerate(even + odd):
                form.store(args[2], builder.add(to, I64(i * size)), value)
        for p, slot in enumerate(sums):
            form.store(args[2], p * size, builder.load(slot))
        return context.get_dummy_value()

    return types.void(weights, types.int64, out), codegen


def _emit_crossed_step(
    form: Form, sums: list[list[ir.Value]], own: ir.Value, rows: ir.Value
) -> None:
    """Add the products of one step to the sums (stack slots) of each row and part."""
    builder, size = form.builder, 4 * form.width
    loaded = [form.load(own, i * size, form.shorts) for i in range(2 * form.parts)]
    even, odd = loaded[: form.parts], loaded[form.parts :]
    for r, slots in enumerate(sums):
        first, second = (
            form.repeated(rows, 2 * r * BLOCK + 4 * half, form.shorts) for half in range(2)
        )
        for p, slot in enumerate(slots):
            factors = builder.add(odd[p], first), builder.add(even[p], second)
            products = form.multiply_shorts(*factors)
            builder.store(builder.add(builder.load(slot), products), slot)


def _emit_crossed_tile(builder: ir.IRBuilder, num_rows: int, args: Any) -> None:
    """Emit the products of a group of ``num_rows`` rows with a widened panel."""
    q, scales, corrections, stride, weights, blocks, totals = args
    form = Form(builder, "avx2")
    own_sums = [form.load(weights, 4 * p * form.width, form.sums) for p in range(form.parts)]
    sums = []
    for r in range(num_rows):
        start = form.repeated(corrections, 4 * r, form.sums)
        starts = [builder.add(start, own) for own in own_sums]
        sums.append([cgutils.alloca_once_value(builder, value) for value in starts])
    first = builder.gep(weights, [I64(SUMS_BYTES)])
    with cgutils.for_range(builder, blocks) as block:
        place = builder.mul(builder.mul(block.index, stride), I64(2 * BLOCK))
        own_q = builder.gep(q, [place])
        own_w = builder.gep(first, [builder.mul(block.index, I64(2 * BLOCK * WIDTH))])
        # A loop whose length LLVM does not know: unrolled, it would need too many registers.
        with cgutils.for_range(builder, opaque(builder, BLOCK // STEP)) as loop:
            rows = builder.gep(own_q, [builder.mul(loop.index, I64(2 * STEP))])
            own = builder.gep(own_w, [builder.mul(loop.index, I64(2 * STEP_BYTES))])
            _emit_crossed_step(form, sums, own, rows)
    for r in range(num_rows):
        scale = form.repeated(scales, 4 * r, form.floats)
        for p in range(form.parts):
            offset = 4 * (r * WIDTH + p * form.width)
            before = form.load(totals, offset, form.floats)
            form.store(totals, offset, form.scaled(builder.load(sums[r][p]), scale, before))


crossed_tile = tile_function(CROSSED_ROWS, _emit_crossed_tile, only_most=True)
"""Product of a group of ``CROSSED_ROWS`` rows with what ``widen`` has written. The corrections are
those of rows that go this way: less the sum of the products of their pairs."""
