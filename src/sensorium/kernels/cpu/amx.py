"""Matrix tiles of x86 (AMX): products of bf16 blocks, summed in float32.

A tile is a register of 16 rows of 64 bytes. ``C += A B`` takes A as 16 rows of 32 bf16, B as 16
rows of 16 *pairs* (rows 2 i and 2 i + 1 of B side by side, the order of all vector instructions for
bf16), and C as 16 rows of 16 float32: Intel 64 and IA-32 Architectures Software Developer's Manual,
"Intel AMX programming".

The tile configuration is state of the thread. A kernel sets it before its task loop and releases
the tiles after it, as oneDNN does.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import intrinsic

TILE = 16
"""Rows of a tile, and columns of C."""
DEPTH = 32
"""Columns of A: how far one instruction sums."""
BLOCK = 2 * TILE
"""Rows and columns of C that are computed at once, in four tiles."""

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_PTR = _I8.as_pointer()
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_C, _A, _B = (0, 1, 2, 3), (4, 5), (6, 7)


@functools.cache
def available() -> bool:
    """Return whether kernels may use the tiles in this process.

    The first call requests permission from Linux. Kernels with tiles are compiled and run only
    after this has returned true.
    """
    if not sys.platform.startswith("linux") or not levels.is_x86():
        return False
    if sys.maxsize < 2**32:
        return False
    if not (levels.has("amx-tile") and levels.has("amx-bf16")):
        return False
    syscall = ctypes.CDLL(None).syscall
    arguments = (ctypes.c_long(n) for n in (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))
    return bool(syscall(*arguments) == 0)


def full_tiles() -> bytes:
    """Return the configuration in which all eight tiles have 16 rows of 64 bytes."""
    palette, start_row, reserved = b"\x01", b"\x00", bytes(14)
    row_bytes = (64).to_bytes(2, "little") * 8 + bytes(16)
    rows = bytes([TILE]) * 8 + bytes(8)
    return palette + start_row + reserved + row_bytes + rows


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


@intrinsic
def configure(typingctx: Any, configuration: Any) -> Any:
    """Configure the tiles from the 64 bytes at ``configuration``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _call(builder, "ldtilecfg", builder.bitcast(args[0], _PTR))
        return context.get_dummy_value()

    return types.void(configuration), codegen


@intrinsic
def release(typingctx: Any) -> Any:
    """Release the tiles."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def multiply_block(
    typingctx: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    depth: Any,
    c: Any,
    c_stride: Any,
    wide: Any,
    add: Any,
) -> Any:
    """Compute ``c[:32, :32] (+)= a[:32, :depth] b[:depth, :32]``, or 16 columns unless ``wide``.

    a, b: pointers to bf16; c: pointer to float32; strides in elements, that of b between two rows
    of pairs. depth is a multiple of 32; b has depth / 2 rows of pairs. add: add to c if true, else
    overwrite it.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        with builder.if_else(args[7]) as (both, one):
            with both:
                _emit_block(builder, args, 2)
            with one:
                _emit_block(builder, args, 1)
        return context.get_dummy_value()

    number = types.int64
    kinds = (a, number, b, number, number, c, number, types.boolean, types.boolean)
    return types.void(*kinds), codegen


def _emit_block(builder: ir.IRBuilder, args: Any, num_columns: int) -> None:
    """Emit code for two tiles of rows by ``num_columns`` tiles of columns."""
    a, a_stride, b, b_stride, depth, c, c_stride, _, add = args

    def at(ptr: ir.Value, *offsets: ir.Value) -> ir.Value:
        for offset in offsets:
            ptr = builder.gep(ptr, [offset])
        return builder.bitcast(ptr, _PTR)

    def constant(number: int) -> ir.Constant:
        return ir.Constant(_I64, number)

    a_bytes, b_bytes = builder.mul(a_stride, constant(2)), builder.mul(b_stride, constant(2))
    c_bytes = builder.mul(c_stride, constant(4))
    lower_a, lower_c = (builder.mul(x, constant(TILE)) for x in (a_stride, c_stride))
    places = {
        _C[2 * row + column]: at(c, *([lower_c] if row else []), constant(column * TILE))
        for row in range(2)
        for column in range(num_columns)
    }
    with builder.if_else(add) as (some, none):
        with some:
            for tile, place in places.items():
                _call(builder, "tileloadd64", _I8(tile), place, c_bytes)
        with none:
            for tile in places:
                _call(builder, "tilezero", _I8(tile))
    steps = builder.udiv(depth, constant(DEPTH))
    with cgutils.for_range(builder, steps) as loop:
        along_a = builder.mul(loop.index, constant(DEPTH))
        along_b = builder.mul(loop.index, builder.mul(b_stride, constant(DEPTH // 2)))
        for column in range(num_columns):
            place = at(b, along_b, constant(column * TILE * 2))
            _call(builder, "tileloadd64", _I8(_B[column]), place, b_bytes)
        for row in range(2):
            place = at(a, along_a, *([lower_a] if row else []))
            _call(builder, "tileloadd64", _I8(_A[row]), place, a_bytes)
            for column in range(num_columns):
                _call(
                    builder, "tdpbf16ps", _I8(_C[2 * row + column]), _I8(_A[row]), _I8(_B[column])
                )
    for tile, place in places.items():
        _call(builder, "tilestored64", _I8(tile), place, c_bytes)
