"""Matrix tiles of x86 (AMX): products of bf16 blocks, summed in float32.

A tile is a register of 16 rows of 64 bytes. ``C += A B`` takes A as 16 rows of 32 bf16, B as 16 rows of 16 *pairs*
(rows 2 i and 2 i + 1 of B side by side, the order of all vector instructions for bf16), and C as 16 rows of 16 float32:
Intel 64 and IA-32 Architectures Software Developer's Manual, "Intel AMX programming".

The tiles' shapes are a state of the thread. Who multiplies here sets it for the time of a task loop and puts back what
was there before, since oneDNN keeps its own.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

import llvmlite.binding
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu_numeric import intrinsic

TILE = 16
"""Rows of a tile, and columns of C."""
DEPTH = 32
"""Columns of A: how far one instruction sums."""
BLOCK = 2 * TILE
"""Rows and columns of C that are computed at once, in four tiles."""
CONFIG_BYTES = 64

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_PTR = _I8.as_pointer()
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_C, _A, _B = (0, 1, 2, 3), (4, 5), (6, 7)


@functools.cache
def available() -> bool:
    """Whether this process may use the tiles; Linux gives them only to those that ask."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    features = llvmlite.binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return bool(syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def full_tiles() -> bytes:
    """The configuration in which all eight tiles have 16 rows of 64 bytes."""
    widths = TILE * 2
    return (
        bytes([1, 0]) + bytes(14) + (64).to_bytes(2, "little") * 8 + bytes(widths - 16)
        + bytes([TILE]) * 8 + bytes(8)
    )  # fmt: skip


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


@intrinsic
def swap_configuration(typingctx: Any, new: Any, old: Any) -> Any:
    """Take the tiles' shapes from the 64 bytes at ``new``, after writing the present ones to ``old``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _call(builder, "sttilecfg", builder.bitcast(args[1], _PTR))
        _call(builder, "ldtilecfg", builder.bitcast(args[0], _PTR))
        return context.get_dummy_value()

    return types.void(new, old), codegen


@intrinsic
def restore_configuration(typingctx: Any, old: Any) -> Any:
    """Take the tiles' shapes from ``old``, or give the tiles back if it says that none were in use."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.bitcast(args[0], _PTR)
        used = builder.icmp_unsigned("!=", builder.load(place), _I8(0))
        with builder.if_else(used) as (some, none):
            with some:
                _call(builder, "ldtilecfg", place)
            with none:
                _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(old), codegen


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
    """``c[:32, :32] (+)= a[:32, :depth] b[:depth, :32]``, or 16 columns unless ``wide``.

    a, b: pointers to bf16; c: pointer to float32; strides in elements, that of b between two rows of pairs. depth is a
    multiple of 32; b has depth / 2 rows of pairs. add: whether c is added to, or overwritten.
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
    """Two tiles of rows by ``num_columns`` tiles of columns."""
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
