"""Inner loop of products with float weights: a few rows times panels of sixteen outputs.

``c[r, j] += sum_k a[k, r] * w[j, k]``. Each sum is one chain of fused multiply-adds over k in
float32. So its bits are the same for any number of rows and panels that go together, and wherever
the range of k is cut, as accumulators are stored and loaded again exactly.

Weights are widened in registers, which on most CPUs runs beside the multiplications. As many rows
and panels go together as the registers hold, so that a weight is read and widened once for them.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import WIDTH, _splat, intrinsic, read_lanes

MOST_ROWS = 12 if levels.has_wide_registers() else 6
"""Rows that go together."""
STEP = 2
"""Inputs that a turn of the loop takes: bf16 lies in pairs of them."""
LINE_BYTES = 64
FETCH_AHEAD = 1024
"""Bytes by which weights are prefetched ahead, in each panel."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VEC, _BITS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(_I32, WIDTH)


def most_panels(num_rows: int) -> int:
    """Return how many panels go together for so many rows."""
    limits = ((4, 4), (8, 3), (12, 2)) if levels.has_wide_registers() else ((1, 4), (2, 2), (6, 1))
    return next(panels for rows, panels in limits if num_rows <= rows)


class _Operands:
    """Operands of one multiplication, as LLVM values."""

    def __init__(self, kinds: Any, args: Any) -> None:
        self.element = kinds.args[3].dtype
        _, _, self.a, self.w, self.panel_stride, self.depth, self.c, self.c_stride, self.add = args


def _wide_pair(
    builder: ir.IRBuilder, own: _Operands, kind: Any, place: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Load the weights of sixteen outputs for two inputs as float32."""
    if own.element != types.uint16:
        after = builder.gep(place, [_I64(WIDTH)])
        return read_lanes(builder, kind, place), read_lanes(builder, kind, after)
    pairs = builder.load(builder.bitcast(place, _BITS.as_pointer()), align=2)
    first = builder.shl(pairs, ir.Constant(_BITS, [16] * WIDTH))
    second = builder.and_(pairs, ir.Constant(_BITS, [0xFFFF0000] * WIDTH))
    return builder.bitcast(first, _VEC), builder.bitcast(second, _VEC)


def _fetch(builder: ir.IRBuilder, place: ir.Value, element: Any) -> None:
    """Prefetch the lines that the same panel needs ``FETCH_AHEAD`` bytes later."""
    size = 4 if element == types.float32 else 2
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(STEP * WIDTH * size // LINE_BYTES):
        later = builder.gep(place, [_I64((FETCH_AHEAD + line * LINE_BYTES) // size)])
        builder.call(fetch, [later, _I32(0), _I32(3), _I32(1)])


def _emit(builder: ir.IRBuilder, own: _Operands, kind: Any, num_rows: int, panels: int) -> None:
    """Emit the loop for a fixed number of rows and panels."""
    zero = ir.Constant(_VEC, [0.0] * WIDTH)
    slots = [[cgutils.alloca_once(builder, _VEC) for _ in range(panels)] for _ in range(num_rows)]
    places = [
        [
            builder.bitcast(
                builder.gep(
                    own.c, [builder.add(builder.mul(own.c_stride, _I64(r)), _I64(p * WIDTH))]
                ),
                _VEC.as_pointer(),
            )
            for p in range(panels)
        ]
        for r in range(num_rows)
    ]
    with builder.if_else(own.add) as (some, none):
        with some:
            for r in range(num_rows):
                for p in range(panels):
                    builder.store(builder.load(places[r][p], align=4), slots[r][p])
        with none:
            for r in range(num_rows):
                for p in range(panels):
                    builder.store(zero, slots[r][p])
    fma_kind = ir.FunctionType(_VEC, [_VEC] * 3)
    fma = cgutils.get_or_insert_function(builder.module, fma_kind, "llvm.fmuladd.v16f32")
    with cgutils.for_range(builder, builder.udiv(own.depth, _I64(STEP))) as loop:
        along = builder.mul(loop.index, _I64(STEP * WIDTH))
        a = builder.gep(own.a, [builder.mul(loop.index, _I64(STEP * num_rows))])
        columns = []
        for p in range(panels):
            start = builder.mul(own.panel_stride, _I64(p))
            place = builder.gep(own.w, [builder.add(start, along)])
            columns.append(_wide_pair(builder, own, kind, place))
            _fetch(builder, place, own.element)
        for half in range(STEP):
            for r in range(num_rows):
                scalar = builder.load(builder.gep(a, [_I64(half * num_rows + r)]))
                wide = _splat(builder, scalar)
                for p in range(panels):
                    summed = builder.call(fma, [wide, columns[p][half], builder.load(slots[r][p])])
                    builder.store(summed, slots[r][p])
    for r in range(num_rows):
        for p in range(panels):
            builder.store(builder.load(slots[r][p]), places[r][p], align=4)


@intrinsic
def multiply_panels(
    typingctx: Any,
    rows: Any,
    panels: Any,
    a: Any,
    w: Any,
    panel_stride: Any,
    depth: Any,
    c: Any,
    c_stride: Any,
    add: Any,
) -> Any:
    """Compute ``c[:rows, :panels * 16] (+)= a^T w`` over ``depth`` inputs, an even number.

    a: float32, the values of all rows for an input side by side. w: pointer of any element type to
    the first panel; ``panel_stride`` elements lie between two. c: float32, ``c_stride`` elements
    between rows. rows is 1 to MOST_ROWS, panels 1 or ``most_panels(rows)``. add: add to c if true,
    else overwrite it.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        own = _Operands(signature, args)
        done = builder.append_basic_block("panels.done")
        impossible = builder.append_basic_block("panels.impossible")
        switch = builder.switch(args[0], impossible)
        for num_rows in range(1, MOST_ROWS + 1):
            block = builder.append_basic_block(f"panels.{num_rows}")
            switch.add_case(_I64(num_rows), block)
            builder.position_at_end(block)
            most = most_panels(num_rows)
            if most == 1:
                _emit(builder, own, w, num_rows, 1)
            else:
                one = builder.icmp_signed("==", args[1], _I64(1))
                with builder.if_else(one) as (single, several):
                    with single:
                        _emit(builder, own, w, num_rows, 1)
                    with several:
                        _emit(builder, own, w, num_rows, most)
            builder.branch(done)
        builder.position_at_end(impossible)
        builder.unreachable()
        builder.position_at_end(done)
        return context.get_dummy_value()

    number = types.int64
    kinds = (number, number, a, w, number, number, c, number, types.boolean)
    return types.void(*kinds), codegen
