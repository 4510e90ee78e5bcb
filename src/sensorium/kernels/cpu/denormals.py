"""Denormal numbers of a thread: SSE's control register, set for the length of a kernel.

With flushing on, results smaller than 2^-126 become zero and such operands count as zero, as they
always do in matrix tiles. So vectors and tiles give the same bits.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.numeric import intrinsic

_I32 = ir.IntType(32)
_PTR = ir.IntType(8).as_pointer()
FLUSH = 1 << 15 | 1 << 6
"""The bits of MXCSR that flush results and operands."""


def _access(builder: ir.IRBuilder, name: str, place: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_PTR])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
    builder.call(function, [builder.bitcast(place, _PTR)])


def _barrier(builder: ir.IRBuilder) -> None:
    """Keep loads and stores, and with them arithmetic between them, on their side of this point."""
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def emit_flush(builder: ir.IRBuilder) -> ir.Value:
    """Emit code that switches flushing on, and return the register's value before."""
    place = cgutils.alloca_once(builder, _I32)
    _barrier(builder)
    _access(builder, "stmxcsr", place)
    before = builder.load(place)
    builder.store(builder.or_(before, _I32(FLUSH)), place)
    _access(builder, "ldmxcsr", place)
    _barrier(builder)
    return before


def emit_restore(builder: ir.IRBuilder, before: ir.Value) -> None:
    """Emit code that sets the register to what ``emit_flush`` returned."""
    place = cgutils.alloca_once(builder, _I32)
    _barrier(builder)
    builder.store(before, place)
    _access(builder, "ldmxcsr", place)
    _barrier(builder)


@intrinsic
def flush_denormals(typingctx: Any) -> Any:
    """Switch flushing on for this thread; return what ``restore_denormals`` takes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return emit_flush(builder)

    return types.int32(), codegen


@intrinsic
def restore_denormals(typingctx: Any, before: Any) -> Any:
    """Handle denormal numbers as before ``flush_denormals``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit_restore(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int32), codegen
