"""Inner loop of products with float weights: a few rows times panels of sixteen outputs.

``c[r, j] += sum_k a[k, r] * w[j, k]``. Each sum is one chain of fused multiply-adds over k in
float32. So its bits are the same for any number of rows and panels that go together, and wherever
the range of k is cut, as accumulators are stored and loaded again exactly.

Weights are widened in registers, which on most CPUs runs beside the multiplications. As many rows
and vectors of outputs go together as the registers hold, so that a weight is read and widened once
for them: a *tile*. Too few sums would wait for each other, as an addition takes four cycles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as binding
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import LINE_BYTES, WIDTH, intrinsic, prefetch

WIDE = levels.has_wide_registers()
MOST_ROWS = 12 if WIDE else 6
"""Rows that go together."""
LANES = WIDTH if WIDE else WIDTH // 2
"""Outputs of a vector: a whole panel, or half of one."""
TILE_VECTORS = (4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2) if WIDE else (8, 6, 2, 2, 2, 2)
"""Vectors of outputs in a tile, for each number of rows."""
STEP = 2
"""Inputs that a turn of the loop takes: bf16 lies in pairs of them."""
FETCH_AHEAD = 1536
"""Bytes by which weights are prefetched ahead, in all panels of a tile together."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VEC, _BITS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)


def most_panels(num_rows: int) -> int:
    """Return how many panels go together for so many rows: the fewest that are whole tiles."""
    vectors, per_panel = TILE_VECTORS[num_rows - 1], WIDTH // LANES
    return vectors // per_panel if vectors % per_panel == 0 else vectors


def is_one_tile(num_rows: int) -> bool:
    """Return whether the panels that go together are one tile."""
    return most_panels(num_rows) * WIDTH == TILE_VECTORS[num_rows - 1] * LANES


def panel_counts(num_rows: int) -> list[int]:
    """Return the numbers of panels that code is made for, for so many rows.

    Groups of rows may differ by one, and go through the panels of the larger ones.
    """
    counts = {1, most_panels(num_rows)}
    if MOST_ROWS // 2 <= num_rows < MOST_ROWS:
        counts.add(most_panels(num_rows + 1))
    return sorted(counts)


class _Operands:
    """Operands of one multiplication, as LLVM values."""

    def __init__(self, kinds: Any, args: Any) -> None:
        self.element = kinds.args[3].dtype
        self.paired = kinds.args[2].dtype == types.uint32
        _, _, self.a, self.w, self.panel_stride, self.depth, self.c, self.c_stride, self.add = args


@dataclass(frozen=True)
class _Column:
    """A vector of outputs: ``lane`` outputs behind the first of a panel."""

    panel: int
    lane: int


def _weights(
    builder: ir.IRBuilder, own: _Operands, place: ir.Value, lane: int, second: bool
) -> ir.Value:
    """Load the weights of a vector of outputs for one of two inputs as float32."""
    if own.element == types.uint16:
        start = builder.gep(place, [_I64(STEP * lane)])
        pairs = builder.load(builder.bitcast(start, _BITS.as_pointer()), align=2)
        if not second:
            return builder.bitcast(builder.shl(pairs, ir.Constant(_BITS, [16] * LANES)), _VEC)
        high = builder.and_(pairs, ir.Constant(_BITS, [0xFFFF0000] * LANES))
        return builder.bitcast(high, _VEC)
    start = builder.gep(place, [_I64(lane + (WIDTH if second else 0))])
    if own.element == types.float32:
        return builder.load(builder.bitcast(start, _VEC.as_pointer()), align=4)
    raw = builder.load(builder.bitcast(start, _HALVES.as_pointer()), align=2)
    return builder.fpext(raw, _VEC)


def _fetch(builder: ir.IRBuilder, places: dict[int, ir.Value], element: Any) -> None:
    """Prefetch the lines that a step needs later, from its places in each panel."""
    size, ahead = 4 if element == types.float32 else 2, FETCH_AHEAD // len(places)
    for place in places.values():
        for line in range(STEP * WIDTH * size // LINE_BYTES):
            prefetch(builder, builder.gep(place, [_I64((ahead + line * LINE_BYTES) // size)]))


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """Return a vector with a number in each lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_BITS, [0] * LANES))


def _emit(builder: ir.IRBuilder, own: _Operands, num_rows: int, panels: int) -> None:
    """Emit the tiles of a fixed number of rows and panels, one after the other."""
    columns = [_Column(panel, lane) for panel in range(panels) for lane in range(0, WIDTH, LANES)]
    size = TILE_VECTORS[num_rows - 1]
    for first in range(0, len(columns), size):
        _emit_tile(builder, own, num_rows, columns[first : first + size])


def _emit_tile(
    builder: ir.IRBuilder, own: _Operands, num_rows: int, columns: list[_Column]
) -> None:
    """Emit the loop over the inputs for a fixed number of rows and vectors of outputs."""
    zero = ir.Constant(_VEC, [0.0] * LANES)
    slots = [[cgutils.alloca_once(builder, _VEC) for _ in columns] for _ in range(num_rows)]
    places = []
    for r in range(num_rows):
        row = builder.gep(own.c, [builder.mul(own.c_stride, _I64(r))])
        ends = [builder.gep(row, [_I64(each.panel * WIDTH + each.lane)]) for each in columns]
        places.append([builder.bitcast(end, _VEC.as_pointer()) for end in ends])
    pairs = [
        (place, slot)
        for own_places, own_slots in zip(places, slots, strict=True)
        for place, slot in zip(own_places, own_slots, strict=True)
    ]
    with builder.if_else(own.add) as (some, none):
        with some:
            for place, slot in pairs:
                builder.store(builder.load(place, align=4), slot)
        with none:
            for _, slot in pairs:
                builder.store(zero, slot)
    with cgutils.for_range(builder, builder.udiv(own.depth, _I64(STEP))) as loop:
        _emit_step(builder, own, loop.index, columns, slots)
    for place, slot in pairs:
        builder.store(builder.load(slot), place, align=4)


def _row_value(builder: ir.IRBuilder, a: ir.Value, index: int) -> ir.Value:
    """Return the value of a row in each lane."""
    return _splat(builder, builder.load(builder.gep(a, [_I64(index)])))


def _after(builder: ir.IRBuilder, number: ir.Value, slot: ir.Value) -> ir.Value:
    """Return a number as one that LLVM knows nothing about before the sum in a slot is there."""
    kinds = [number.type, _VEC]
    kind = ir.FunctionType(ir.LiteralStructType(kinds), kinds)
    both = builder.asm(kind, "", "=r,=x,0,1", [number, builder.load(slot)], side_effect=False)
    builder.store(builder.extract_value(both, 1), slot)
    return builder.extract_value(both, 0)


def _panel_places(
    builder: ir.IRBuilder, own: _Operands, along: ir.Value, columns: list[_Column]
) -> dict[int, ir.Value]:
    """Return the addresses of a step's weights in each panel."""
    places = {}
    for panel in sorted({each.panel for each in columns}):
        start = builder.mul(own.panel_stride, _I64(panel))
        places[panel] = builder.gep(own.w, [builder.add(start, along)])
    return places


def _emit_step(
    builder: ir.IRBuilder,
    own: _Operands,
    index: ir.Value,
    columns: list[_Column],
    slots: list[list[ir.Value]],
) -> None:
    """Emit one turn: two inputs of all rows and vectors."""
    num_rows = len(slots)
    if own.paired:
        _emit_pairs(builder, own, index, columns, slots)
        return
    fma_kind = ir.FunctionType(_VEC, [_VEC] * 3)
    fma = cgutils.get_or_insert_function(builder.module, fma_kind, f"llvm.fmuladd.v{LANES}f32")

    def add(wide: ir.Value, weight: ir.Value, slot: ir.Value) -> None:
        builder.store(builder.call(fma, [wide, weight, builder.load(slot)]), slot)

    along = builder.mul(index, _I64(STEP * WIDTH))
    a = builder.gep(own.a, [builder.mul(index, _I64(STEP * num_rows))])
    places = _panel_places(builder, own, along, columns)
    _fetch(builder, places, own.element)
    for half in range(STEP):
        if half == 1 and not WIDE:
            # At a place that LLVM does not know, pairs are loaded again: kept from the first input,
            # they would take the registers of the sums.
            again = _after(builder, along, slots[-1][-1])
            places = _panel_places(builder, own, again, columns)
        row_values = [
            functools.partial(_row_value, builder, a, half * num_rows + r) for r in range(num_rows)
        ]
        column_values = [
            functools.partial(_weights, builder, own, places[c.panel], c.lane, half == 1)
            for c in columns
        ]
        # The fewer of both are held in registers, the others pass through one.
        if num_rows < len(columns):
            held = [value() for value in row_values]
            for c, column_value in enumerate(column_values):
                weight = column_value()
                for wide, row_slots in zip(held, slots, strict=True):
                    add(wide, weight, row_slots[c])
        else:
            held = [value() for value in column_values]
            for row_value, row_slots in zip(row_values, slots, strict=True):
                wide = row_value()
                for weight, slot in zip(held, row_slots, strict=True):
                    add(wide, weight, slot)


def _emit_pairs(
    builder: ir.IRBuilder,
    own: _Operands,
    index: ir.Value,
    columns: list[_Column],
    slots: list[list[ir.Value]],
) -> None:
    """Emit one turn with the CPU's instruction for pairs of bf16."""
    places = _panel_places(builder, own, builder.mul(index, _I64(STEP * WIDTH)), columns)
    _fetch(builder, places, own.element)
    weights = []
    for each in columns:
        place = builder.bitcast(places[each.panel], _BITS.as_pointer())
        weights.append(builder.load(place, align=2))
    # LLVM's own function for it takes vectors of bf16, a type that llvmlite does not have.
    binding.initialize_native_asmparser()
    kind = ir.FunctionType(_VEC, [_VEC, _BITS, _BITS])
    for r, row_slots in enumerate(slots):
        at = builder.add(builder.mul(index, _I64(len(slots))), _I64(r))
        wide = _splat(builder, builder.load(builder.gep(own.a, [at])))
        for weight, slot in zip(weights, row_slots, strict=True):
            operands = [builder.load(slot), weight, wide]
            total = builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", operands, False)
            builder.store(total, slot)


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

    a: float32, the values of all rows for an input side by side; or uint32, their bf16 values for
    two inputs, where weights are bf16 and the CPU has an instruction for such pairs. w: pointer of
    any element type to the first panel; ``panel_stride`` elements lie between two. c: float32,
    ``c_stride`` elements between rows. rows is 1 to MOST_ROWS, panels one of
    ``panel_counts(rows)``. add: add to c if true, else overwrite it.
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
            inner = builder.switch(args[1], impossible)
            for count in panel_counts(num_rows):
                own_block = builder.append_basic_block(f"panels.{num_rows}.{count}")
                inner.add_case(_I64(count), own_block)
                builder.position_at_end(own_block)
                _emit(builder, own, num_rows, count)
                builder.branch(done)
        builder.position_at_end(impossible)
        builder.unreachable()
        builder.position_at_end(done)
        return context.get_dummy_value()

    number = types.int64
    kinds = (number, number, a, w, number, number, c, number, types.boolean)
    return types.void(*kinds), codegen


def _scatter(builder: ir.IRBuilder, place: ir.Value, stride: ir.Value, lanes: ir.Value) -> None:
    """Store the lanes of a vector from an address on, ``stride`` elements apart."""
    for lane in range(WIDTH):
        builder.store(builder.extract_element(lanes, _I32(lane)), place)
        place = builder.gep(place, [stride])


@intrinsic
def scatter16(typingctx: Any, ptr: Any, index: Any, stride: Any, value: Any) -> Any:
    """Store the lanes of a vector into float32 elements from ``index`` on, ``stride`` apart."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _scatter(builder, builder.gep(args[0], [args[1]]), args[2], args[3])
        return context.get_dummy_value()

    return types.void(ptr, types.int64, types.int64, value), codegen


@intrinsic
def scatter_pairs(
    typingctx: Any, ptr: Any, index: Any, stride: Any, source: Any, start: Any
) -> Any:
    """Store sixteen pairs of 16-bit elements as uint32, as ``scatter16`` does its lanes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pairs = ir.VectorType(_I32, WIDTH)
        place = builder.bitcast(builder.gep(args[3], [args[4]]), pairs.as_pointer())
        lanes = builder.load(place, align=2)
        _scatter(builder, builder.gep(args[0], [args[1]]), args[2], lanes)
        return context.get_dummy_value()

    return types.void(ptr, types.int64, types.int64, source, types.int64), codegen
