"""Emulation of matrix tiles in vectors, bit by bit as the manual defines them.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, the operations LDTILECFG,
TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS and TDPBSSD, ... . Tests run tile kernels by
it on CPUs without tiles. What the CPU answers with an invalid-opcode fault (tiles that are not
configured, shapes that do not fit each other) ends the process with the same signal.

Elements outside of a tile's shape are zeros. The thread's state is its configuration (64 bytes) and
the eight tiles (1024 bytes each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

from sensorium.kernels.cpu.amx import NUM_TILES, ROW_BYTES, TILE, Unit
from sensorium.kernels.cpu.denormals import emit_flush, emit_restore

CONFIGURATION_BYTES = 64
TILE_BYTES = TILE * ROW_BYTES
_WIDTHS_AT, _ROWS_AT = 16, 48

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_PTR = _I8.as_pointer()
_INTS, _FLOATS = ir.VectorType(_I32, TILE), ir.VectorType(ir.FloatType(), TILE)


def _call_own(
    builder: ir.IRBuilder, name: str, args: Sequence[ir.Value], emit: Callable[..., None]
) -> None:
    """Call a function of this module of code, which ``emit(builder, *args)`` writes if missing."""
    name = f"sensorium.tiles.{name}"
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        function = ir.Function(builder.module, kind, name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block("entry"))
        emit(inner, *function.args)
        inner.ret_void()
    builder.call(function, args)


def _intrinsic(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _fault_if(builder: ir.IRBuilder, wrong: ir.Value) -> None:
    with builder.if_then(wrong, likely=False):
        _intrinsic(builder, "llvm.trap", ir.VoidType(), [])
        builder.unreachable()


def _number(builder: ir.IRBuilder, state: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    """Return an unsigned number of the state as an int64."""
    place = builder.bitcast(builder.gep(state, [offset]), kind.as_pointer())
    return builder.zext(builder.load(place, align=1), _I64)


def _raw_shape(builder: ir.IRBuilder, state: ir.Value, tile: ir.Value) -> tuple[ir.Value, ir.Value]:
    rows = _number(builder, state, builder.add(tile, _I64(_ROWS_AT)), _I8)
    at = builder.add(builder.shl(tile, _I64(1)), _I64(_WIDTHS_AT))
    return rows, _number(builder, state, at, _I16)


def _shape(builder: ir.IRBuilder, state: ir.Value, tile: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return rows and bytes of a row of a tile, which must be configured."""
    rows, size = _raw_shape(builder, state, tile)
    palette = _number(builder, state, _I64(0), _I8)
    unusable = builder.icmp_unsigned("!=", palette, _I64(1))
    unusable = builder.or_(unusable, builder.icmp_unsigned("==", rows, _I64(0)))
    odd = builder.icmp_unsigned("!=", builder.and_(size, _I64(3)), _I64(0))
    _fault_if(builder, builder.or_(unusable, odd))
    return rows, size


def _place(builder: ir.IRBuilder, state: ir.Value, tile: ir.Value, row: ir.Value) -> ir.Value:
    """Return the address of a row of a tile."""
    offset = builder.add(builder.mul(tile, _I64(TILE_BYTES)), _I64(CONFIGURATION_BYTES))
    return builder.gep(state, [builder.add(offset, builder.mul(row, _I64(ROW_BYTES)))])


def _lanes(builder: ir.IRBuilder, place: ir.Value, kind: ir.VectorType) -> ir.Value:
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _spread(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(_INTS, [0] * TILE)
    return builder.shuffle_vector(first, ir.Constant(_INTS, ir.Undefined), zeros)


def _all(number: int) -> ir.Constant:
    return ir.Constant(_INTS, [number] * TILE)


def _emit_configure(builder: ir.IRBuilder, state: ir.Value, place: ir.Value) -> None:
    cgutils.memset(builder, state, _I64(CONFIGURATION_BYTES + NUM_TILES * TILE_BYTES), 0)
    cgutils.raw_memcpy(builder, state, place, _I64(CONFIGURATION_BYTES), 1)
    palette = _number(builder, state, _I64(0), _I8)
    _fault_if(builder, builder.icmp_unsigned("!=", palette, _I64(1)))
    for start, count in ((2, 6), (8, 8), (32, 8), (40, 8), (56, 8)):  # reserved, or of no tile
        for offset in range(start, start + count):
            reserved = _number(builder, state, _I64(offset), _I8)
            _fault_if(builder, builder.icmp_unsigned("!=", reserved, _I64(0)))
    with cgutils.for_range(builder, _I64(NUM_TILES)) as loop:
        rows, size = _raw_shape(builder, state, loop.index)
        large = builder.icmp_unsigned(">", rows, _I64(TILE))
        large = builder.or_(large, builder.icmp_unsigned(">", size, _I64(ROW_BYTES)))
        half_empty = builder.xor(
            builder.icmp_unsigned("==", rows, _I64(0)), builder.icmp_unsigned("==", size, _I64(0))
        )
        _fault_if(builder, builder.or_(large, half_empty))


def _emit_release(builder: ir.IRBuilder, state: ir.Value) -> None:
    cgutils.memset(builder, state, _I64(CONFIGURATION_BYTES + NUM_TILES * TILE_BYTES), 0)


def _emit_zero(builder: ir.IRBuilder, state: ir.Value, tile: ir.Value) -> None:
    _shape(builder, state, tile)
    cgutils.memset(builder, _place(builder, state, tile, _I64(0)), _I64(TILE_BYTES), 0)


def _emit_load(
    builder: ir.IRBuilder, state: ir.Value, tile: ir.Value, place: ir.Value, stride: ir.Value
) -> None:
    rows, size = _shape(builder, state, tile)
    cgutils.memset(builder, _place(builder, state, tile, _I64(0)), _I64(TILE_BYTES), 0)
    with cgutils.for_range(builder, rows) as loop:
        source = builder.gep(place, [builder.mul(loop.index, stride)])
        own = _place(builder, state, tile, loop.index)
        cgutils.raw_memcpy(builder, own, source, size, 1)


def _emit_store(
    builder: ir.IRBuilder, state: ir.Value, tile: ir.Value, place: ir.Value, stride: ir.Value
) -> None:
    rows, size = _shape(builder, state, tile)
    with cgutils.for_range(builder, rows) as loop:
        target = builder.gep(place, [builder.mul(loop.index, stride)])
        own = _place(builder, state, tile, loop.index)
        cgutils.raw_memcpy(builder, target, own, size, 1)


def _product_shape(
    builder: ir.IRBuilder, state: ir.Value, c: ir.Value, a: ir.Value, b: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return rows of C, rows of B, and which lanes of C's rows there are."""
    (c_rows, c_bytes), (a_rows, a_bytes), (b_rows, b_bytes) = (
        _shape(builder, state, tile) for tile in (c, a, b)
    )
    wrong = builder.icmp_unsigned("!=", c_rows, a_rows)
    wrong = builder.or_(wrong, builder.icmp_unsigned("!=", c_bytes, b_bytes))
    a_words = builder.lshr(a_bytes, _I64(2))
    wrong = builder.or_(wrong, builder.icmp_unsigned("!=", a_words, b_rows))
    _fault_if(builder, wrong)
    order = ir.Constant(_INTS, [4 * lane for lane in range(TILE)])
    width = _spread(builder, builder.trunc(c_bytes, _I32))
    return c_rows, b_rows, builder.icmp_signed("<", order, width)


def _emit_bf16(
    builder: ir.IRBuilder, state: ir.Value, c: ir.Value, a: ir.Value, b: ir.Value
) -> None:
    """Sum the first and the second of all pairs apart, from zero, and add both sums to C.

    All of it is rounded to nearest even, with denormal numbers flushed.
    """
    rows, words, present = _product_shape(builder, state, c, a, b)
    zero = ir.Constant(_FLOATS, [0.0] * TILE)
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(2)]
    before = emit_flush(builder)
    with cgutils.for_range(builder, rows) as row:
        for place in sums:
            builder.store(zero, place)
        with cgutils.for_range(builder, words) as word:
            at = builder.gep(
                _place(builder, state, a, row.index), [builder.shl(word.index, _I64(2))]
            )
            pair = builder.load(builder.bitcast(at, _I32.as_pointer()), align=1)
            left = _spread(builder, pair)
            right = _lanes(builder, _place(builder, state, b, word.index), _INTS)
            for index, place in enumerate(sums):
                x, y = (
                    builder.and_(pairs, _all(0xFFFF0000)) if index else builder.shl(pairs, _all(16))
                    for pairs in (left, right)
                )
                factors = [builder.bitcast(value, _FLOATS) for value in (x, y)]
                operands = [*factors, builder.load(place)]
                total = _intrinsic(builder, "llvm.fma.v16f32", _FLOATS, operands)
                builder.store(total, place)
        both = builder.fadd(*(builder.load(place) for place in sums))
        own = _place(builder, state, c, row.index)
        total = builder.select(present, builder.fadd(_lanes(builder, own, _FLOATS), both), zero)
        builder.store(total, builder.bitcast(own, _FLOATS.as_pointer()), align=1)
    emit_restore(builder, before)


def _emit_bytes(
    signed_a: bool,
    signed_b: bool,
    builder: ir.IRBuilder,
    state: ir.Value,
    c: ir.Value,
    a: ir.Value,
    b: ir.Value,
) -> None:
    """Add the products of all bytes to C, in 32 bits that wrap around."""

    def byte(words: ir.Value, index: int, signed: bool) -> ir.Value:
        high = builder.shl(words, _all(24 - 8 * index))
        return (builder.ashr if signed else builder.lshr)(high, _all(24))

    rows, words, _ = _product_shape(builder, state, c, a, b)
    with cgutils.for_range(builder, rows) as row:
        own = builder.bitcast(_place(builder, state, c, row.index), _INTS.as_pointer())
        with cgutils.for_range(builder, words) as word:
            at = builder.gep(
                _place(builder, state, a, row.index), [builder.shl(word.index, _I64(2))]
            )
            four = builder.load(builder.bitcast(at, _I32.as_pointer()), align=1)
            left = _spread(builder, four)
            right = _lanes(builder, _place(builder, state, b, word.index), _INTS)
            total = builder.load(own, align=1)
            for index in range(4):
                product = builder.mul(byte(left, index, signed_a), byte(right, index, signed_b))
                total = builder.add(total, product)
            builder.store(total, own, align=1)


class Emulation(Unit):
    """Tiles in memory."""

    name = "emulated"
    state_bytes = CONFIGURATION_BYTES + NUM_TILES * TILE_BYTES

    def configure(self, builder: ir.IRBuilder, state: ir.Value, place: ir.Value) -> None:
        _call_own(builder, "configure", [state, place], _emit_configure)

    def release(self, builder: ir.IRBuilder, state: ir.Value) -> None:
        _call_own(builder, "release", [state], _emit_release)

    def zero(self, builder: ir.IRBuilder, state: ir.Value, tile: int) -> None:
        _call_own(builder, "zero", [state, _I64(tile)], _emit_zero)

    def load(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        _call_own(builder, "load", [state, _I64(tile), place, stride], _emit_load)

    def store(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        _call_own(builder, "store", [state, _I64(tile), place, stride], _emit_store)

    def dot(
        self, builder: ir.IRBuilder, state: ir.Value, kind: str, c: int, a: int, b: int
    ) -> None:
        if len({c, a, b}) < 3:
            raise ValueError("a product of tiles needs three different ones")
        emit: Callable[..., None] = _emit_bf16
        if kind != "tdpbf16ps":
            signed_a, signed_b = (letter == "s" for letter in kind[4:6])

            def emit(inner: ir.IRBuilder, *args: ir.Value) -> None:
                _emit_bytes(signed_a, signed_b, inner, *args)

        _call_own(builder, kind, [state, *map(_I64, (c, a, b))], emit)


EMULATION = Emulation()
