"""Matrix tiles of x86 (AMX): products of blocks of bf16 or of bytes.

A tile is a register of at most 16 rows of 64 bytes. ``C += A B`` takes A as 16 rows of 32 bf16, B
as 16 rows of 16 *pairs* (rows 2 i and 2 i + 1 of B side by side, the order of all vector
instructions for bf16), and C as 16 rows of 16 float32. Bytes go by fours instead of pairs, and C is
int32. Intel 64 and IA-32 Architectures Software Developer's Manual, "Intel AMX programming".

The tile configuration is state of the thread. A kernel sets it before its task loop and releases
the tiles after it, as oneDNN does. Kernels are written for a ``Unit``: the instructions, or their
emulation in vectors (``amx_emulation``), by which tests run tile kernels on CPUs without tiles.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import intrinsic

TILE = 16
"""Rows of a tile, and columns of C."""
ROW_BYTES = 64
DEPTH = 32
"""Columns of A in bf16: how far one instruction sums."""
BLOCK = 2 * TILE
"""Rows and columns of C that are computed at once, in four tiles."""
NUM_TILES = 8
EMULATE = "SENSORIUM_EMULATE_TILES"
"""Variable that, when set, makes kernels run the emulation of tiles, which is slow: for tests."""

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


def configuration(shapes: Sequence[tuple[int, int]]) -> bytes:
    """Return the 64 bytes that give the tiles 0, 1, ... shapes of (rows, bytes of a row)."""
    palette, start_row, reserved = b"\x01", b"\x00", bytes(14)
    row_bytes = b"".join(size.to_bytes(2, "little") for _, size in shapes)
    rows = bytes(count for count, _ in shapes)
    return palette + start_row + reserved + row_bytes.ljust(32, b"\0") + rows.ljust(16, b"\0")


def full_tiles() -> bytes:
    """Return the configuration in which all eight tiles have 16 rows of 64 bytes."""
    return configuration([(TILE, ROW_BYTES)] * NUM_TILES)


class Unit(ABC):
    """The tiles of a thread, as operations that are emitted into its code.

    ``state``: address of ``state_bytes`` bytes of the thread, which the emulation needs. Tiles are
    numbers from 0 to 7; places are byte addresses, strides bytes between rows.
    """

    name: str
    state_bytes: int

    @abstractmethod
    def configure(self, builder: ir.IRBuilder, state: ir.Value, place: ir.Value) -> None:
        """Configure the tiles from 64 bytes, and set them to zero."""

    @abstractmethod
    def release(self, builder: ir.IRBuilder, state: ir.Value) -> None:
        """Release the tiles: none may be used until they are configured again."""

    @abstractmethod
    def zero(self, builder: ir.IRBuilder, state: ir.Value, tile: int) -> None:
        """Set a tile to zero."""

    @abstractmethod
    def load(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        """Load the rows of a tile."""

    @abstractmethod
    def store(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        """Store the rows of a tile."""

    @abstractmethod
    def dot(
        self, builder: ir.IRBuilder, state: ir.Value, kind: str, c: int, a: int, b: int
    ) -> None:
        """Add the product of two other tiles to a tile.

        kind: an instruction's name: ``tdpbf16ps``, or ``tdpbssd``, ``tdpbsud``, ``tdpbusd``,
        ``tdpbuud`` for bytes of a and b with (s) or without (u) sign.
        """


class Instructions(Unit):
    """The CPU's own tiles."""

    name = "amx"
    state_bytes = 64

    def configure(self, builder: ir.IRBuilder, state: ir.Value, place: ir.Value) -> None:
        _call(builder, "ldtilecfg", place)

    def release(self, builder: ir.IRBuilder, state: ir.Value) -> None:
        _call(builder, "tilerelease")

    def zero(self, builder: ir.IRBuilder, state: ir.Value, tile: int) -> None:
        _call(builder, "tilezero", _I8(tile))

    def load(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        _call(builder, "tileloadd64", _I8(tile), place, stride)

    def store(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        _call(builder, "tilestored64", _I8(tile), place, stride)

    def dot(
        self, builder: ir.IRBuilder, state: ir.Value, kind: str, c: int, a: int, b: int
    ) -> None:
        _call(builder, kind, _I8(c), _I8(a), _I8(b))


INSTRUCTIONS = Instructions()


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


@functools.cache
def unit() -> Unit | None:
    """Return the tiles that kernels of this process are to use, None without any."""
    if os.environ.get(EMULATE) and levels.is_x86() and levels.has("fma"):
        from sensorium.kernels.cpu.amx_emulation import EMULATION

        return EMULATION
    return INSTRUCTIONS if available() else None


def has_bytes(own: Unit) -> bool:
    """Return whether a unit multiplies bytes."""
    return own is not INSTRUCTIONS or levels.has("amx-int8")


@functools.cache
def bound(build: Callable[[Any, Unit], Any], own: Unit) -> Callable[[Any], Any]:
    """Return the builder of a kernel for one unit: the same object for the same arguments."""
    return lambda element: build(element, own)


# -- operations for kernels -----------------------------------------------------------------------


@dataclass(frozen=True)
class Operations:
    """Operations that a kernel calls once: ``state()``, ``configure(state)``, ``release(state)``.

    ``state()`` is the address that all other operations of the unit take.
    """

    state: Any
    configure: Any
    release: Any


STATE = types.CPointer(types.uint8)


@functools.cache
def operations(own: Unit, shapes: bytes) -> Operations:
    """Return the operations for tiles with the shapes of a ``configuration``."""

    @intrinsic
    def state(typingctx: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            memory = cgutils.alloca_once(builder, ir.ArrayType(_I8, own.state_bytes))
            memory.align = 64
            return builder.bitcast(memory, _PTR)

        return STATE(), codegen

    @intrinsic
    def configure(typingctx: Any, state: Any) -> Any:
        """Configure the tiles."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            value = ir.Constant(ir.ArrayType(_I8, len(shapes)), bytearray(shapes))
            place = cgutils.global_constant(builder, "tiles", value)
            own.configure(builder, args[0], builder.bitcast(place, _PTR))
            return context.get_dummy_value()

        return types.void(STATE), codegen

    @intrinsic
    def release(typingctx: Any, state: Any) -> Any:
        """Release the tiles."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            own.release(builder, args[0])
            return context.get_dummy_value()

        return types.void(STATE), codegen

    return Operations(state, configure, release)


@functools.cache
def block_product(own: Unit) -> Any:
    """Return the product of blocks of bf16, for ``full_tiles``."""

    @intrinsic
    def multiply_block(
        typingctx: Any,
        state: Any,
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
        """Compute ``c[:32, :32] (+)= a[:32, :depth] b[:depth, :32]``; 16 columns unless ``wide``.

        a, b: pointers to bf16; c: pointer to float32; strides in elements, that of b between two
        rows of pairs. depth is a multiple of 32; b has depth / 2 rows of pairs. add: add to c if
        true, else overwrite it.
        """

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            with builder.if_else(args[8]) as (both, one):
                with both:
                    _emit_block(builder, own, args, 2)
                with one:
                    _emit_block(builder, own, args, 1)
            return context.get_dummy_value()

        number = types.int64
        kinds = (STATE, a, number, b, number, number, c, number, types.boolean, types.boolean)
        return types.void(*kinds), codegen

    return multiply_block


def _emit_block(builder: ir.IRBuilder, own: Unit, args: Any, num_columns: int) -> None:
    """Emit code for two tiles of rows by ``num_columns`` tiles of columns."""
    state, a, a_stride, b, b_stride, depth, c, c_stride, _, add = args

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
                own.load(builder, state, tile, place, c_bytes)
        with none:
            for tile in places:
                own.zero(builder, state, tile)
    steps = builder.udiv(depth, constant(DEPTH))
    with cgutils.for_range(builder, steps) as loop:
        along_a = builder.mul(loop.index, constant(DEPTH))
        along_b = builder.mul(loop.index, builder.mul(b_stride, constant(DEPTH // 2)))
        for column in range(num_columns):
            place = at(b, along_b, constant(column * TILE * 2))
            own.load(builder, state, _B[column], place, b_bytes)
        for row in range(2):
            place = at(a, along_a, *([lower_a] if row else []))
            own.load(builder, state, _A[row], place, a_bytes)
            for column in range(num_columns):
                c_tile = _C[2 * row + column]
                own.dot(builder, state, "tdpbf16ps", c_tile, _A[row], _B[column])
    for tile, place in places.items():
        own.store(builder, state, tile, place, c_bytes)
