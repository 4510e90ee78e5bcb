"""Integer vector instructions of products with int8 and int4 weights.

The products of int8 and int4 weights sum small integers exactly, in int32, over groups of inputs.
Only the groups' sums become float32, and they are added in the order of the groups. So the bits of
a result depend neither on the instructions nor on the number of rows.

Weights are stored without sign, biased by half of their range, as x86 multiplies bytes without sign
by bytes with sign; the bias times the sum of the group's activations is taken off again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import (
    LINE_BYTES,
    WIDTH,
    _call,
    for_each_count,
    intrinsic,
    prefetch,
)

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
STEP = 4
"""Inputs that one step multiplies: four bytes, which are summed in a lane of 32 bits."""
STEP_BYTES = STEP * WIDTH
"""Bytes of the int8 weights of a step."""
FETCH_AHEAD = 4096
"""Bytes by which weights are prefetched ahead: over the ends of panels, which lie side by side.

Not where a row or two read them as fast as memory gives them. A prefetch takes one of the places of
a core's first cache for lines on their way, of which there are about twenty, for as long as memory
takes; what the prefetchers of the second cache do takes none of them. On a Zen 4 one row with int8
weights read 21 GB/s with prefetches, and 27 without.
"""
BLOCK = 32
"""Inputs of a row that lie side by side; rows are padded with zeros to a multiple of it."""

FORMS = ("avx2", "vnni256", "vnni512")
"""Instructions that products are written for.

``avx2``: multiplications of 16-bit pairs (``vpmaddwd``) and of bytes (``vpmaddubsw``); ``vnni``:
``vpdpbusd``, four bytes by four bytes into 32 bits, with vectors of 256 or 512 bits.
"""
SIGNS = "signs"
"""Form beside ``avx2`` for one or two rows with int8 weights, by multiplications of bytes alone."""


@functools.cache
def forms() -> tuple[str, ...]:
    """Return those of ``FORMS`` that the CPU runs that kernels are compiled for, fastest last."""
    if not levels.has_integer_products():
        return ()
    wide = all(map(levels.has, ("avx512vnni", "avx512bw", "avx512vl")))
    narrow = wide or levels.has("avxvnni")
    return ("avx2", *(["vnni256"] if narrow else []), *(["vnni512"] if wide else []))


def lanes(element: ir.Type, count: int) -> ir.VectorType:
    """Return the type of a vector."""
    return ir.VectorType(element, count)


def spread(builder: ir.IRBuilder, scalar: ir.Value, count: int) -> ir.Value:
    """Return a vector with a scalar in each of ``count`` lanes."""
    vector = lanes(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(lanes(I32, count), [0] * count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def at(builder: ir.IRBuilder, pointer: ir.Value, offset: int | ir.Value, kind: ir.Type) -> ir.Value:
    """Return the address ``offset`` bytes behind a byte pointer, as a pointer to ``kind``."""
    where = I64(offset) if isinstance(offset, int) else offset
    return builder.bitcast(builder.gep(pointer, [where]), kind.as_pointer())


def opaque(builder: ir.IRBuilder, number: int | ir.Value) -> ir.Value:
    """Return an int64 as one that LLVM knows nothing about."""
    kind, value = ir.FunctionType(I64, [I64]), I64(number) if isinstance(number, int) else number
    return builder.asm(kind, "", "=r,0", [value], side_effect=False)


def fetch_lines(builder: ir.IRBuilder, pointer: ir.Value, first: int, num_bytes: int) -> None:
    """Prefetch ``num_bytes`` bytes, line by line, from ``first`` bytes behind a byte pointer on."""
    for line in range(0, num_bytes, LINE_BYTES):
        prefetch(builder, builder.gep(pointer, [I64(first + line)]))


@intrinsic
def fetch_first(typingctx: Any, weights: Any) -> Any:
    """Prefetch the first ``FETCH_AHEAD`` bytes of weights."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        fetch_lines(builder, builder.bitcast(args[0], I8.as_pointer()), 0, FETCH_AHEAD)
        return context.get_dummy_value()

    return types.void(weights), codegen


Values = list[list[ir.Value]]
"""Vectors by row and part of a panel, or places on the stack that hold them."""


class Form:
    """Sixteen sums of int32 in one of ``FORMS``: ``parts`` vectors of ``width`` lanes."""

    def __init__(self, builder: ir.IRBuilder, name: str) -> None:
        self.builder, self.name, self.vnni = builder, name, name.startswith("vnni")
        self.width = 16 if name == "vnni512" else 8
        self.parts = WIDTH // self.width
        self.sums = lanes(I32, self.width)
        self.floats = lanes(F32, self.width)
        self.bytes = lanes(I8, 4 * self.width)
        self.shorts = lanes(I16, 2 * self.width)

    def constant(self, kind: ir.VectorType, number: float) -> ir.Constant:
        """Return a vector of equal constants."""
        return ir.Constant(kind, [number] * kind.count)

    def repeated(self, pointer: ir.Value, offset: int | ir.Value, kind: ir.VectorType) -> ir.Value:
        """Load 32 bits and repeat them over a vector of type ``kind``."""
        word = self.builder.load(at(self.builder, pointer, offset, I32), align=1)
        return self.builder.bitcast(spread(self.builder, word, self.width), kind)

    def load(self, pointer: ir.Value, offset: int | ir.Value, kind: ir.VectorType) -> ir.Value:
        """Load a vector from any address."""
        return self.builder.load(at(self.builder, pointer, offset, kind), align=1)

    def store(self, pointer: ir.Value, offset: int | ir.Value, value: ir.Value) -> None:
        """Store a vector at any address."""
        self.builder.store(value, at(self.builder, pointer, offset, value.type), align=1)

    def slots(self, kind: ir.VectorType, starts: Values) -> Values:
        """Return places on the stack that hold vectors of a type."""
        slots = [[cgutils.alloca_once(self.builder, kind) for _ in own] for own in starts]
        for own_slots, own in zip(slots, starts, strict=True):
            for slot, start in zip(own_slots, own, strict=True):
                self.builder.store(start, slot)
        return slots

    def loaded(self, slots: Values) -> Values:
        """Return what places hold."""
        return [[self.builder.load(slot) for slot in own] for own in slots]

    def load_totals(self, totals: ir.Value, num_rows: int) -> Values:
        """Return places that hold totals (rows, 16) of floats."""
        before = [
            [self.load(totals, self._total_at(r, p), self.floats) for p in range(self.parts)]
            for r in range(num_rows)
        ]
        return self.slots(self.floats, before)

    def store_totals(self, totals: ir.Value, slots: Values) -> None:
        """Store what places hold in totals (rows, 16)."""
        for r, own in enumerate(self.loaded(slots)):
            for p, total in enumerate(own):
                self.store(totals, self._total_at(r, p), total)

    def _total_at(self, row: int, part: int) -> int:
        return 4 * (row * WIDTH + part * self.width)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Add integers lane by lane."""
        return self.builder.add(a, b)

    def halves(self, loaded: list[ir.Value]) -> list[list[ir.Value]]:
        """Return the even and the odd bytes of vectors as 16-bit numbers."""
        wide = [self.builder.bitcast(value, self.shorts) for value in loaded]
        low, eight = self.constant(self.shorts, 0xFF), self.constant(self.shorts, 8)
        even = [self.builder.and_(value, low) for value in wide]
        return [even, [self.builder.lshr(value, eight) for value in wide]]

    def multiply_bytes(self, sums: ir.Value, weights: ir.Value, row: ir.Value) -> ir.Value:
        """Add the products of four unsigned weights and signed activations to each sum (VNNI)."""
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.width}"
        return _call(self.builder, name, self.sums, [sums, weights, row])

    def multiply_shorts(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the sums of two products of 16-bit numbers."""
        name = "avx512.pmaddw.d.512" if self.width == WIDTH else "avx2.pmadd.wd"
        return _call(self.builder, f"llvm.x86.{name}", self.sums, [a, b])

    def magnitudes(self, signed: ir.Value) -> ir.Value:
        """Return the magnitudes of signed bytes, without sign: that of -128 is 128 (AVX2)."""
        zero = self.constant(self.bytes, 0)
        return self.builder.select(
            self.builder.icmp_signed("<", signed, zero), self.builder.sub(zero, signed), signed
        )

    def with_signs(self, row: ir.Value, signed: ir.Value) -> ir.Value:
        """Return bytes times the signs of others; none may be -128 (AVX2)."""
        return _call(self.builder, "llvm.x86.avx2.psign.b", self.bytes, [row, signed])

    def multiply_pairs(self, weights: ir.Value, row: ir.Value) -> ir.Value:
        """Return the sums of two products of bytes, in 16 bits (AVX2); they must fit."""
        return _call(self.builder, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, [weights, row])

    def scaled(self, sums: ir.Value, scale: ir.Value, total: ir.Value) -> ir.Value:
        """Return ``total + sums * scale`` in float32, rounded once."""
        wide = self.builder.sitofp(sums, self.floats)
        name = f"llvm.fma.v{self.width}f32"
        return _call(self.builder, name, self.floats, [wide, scale, total])


def tile_function(
    most: int, emit: Callable[[ir.IRBuilder, int, Any], None], only_most: bool = False
) -> Any:
    """Return the intrinsic that multiplies 1 to ``most`` rows with a panel.

    emit: emits the code for a number of rows, from (q, scales, corrections, stride, weights,
    groups, totals) with byte pointers. only_most: there is code for ``most`` rows alone.
    """

    @intrinsic
    def multiply_tile(
        typingctx: Any,
        rows: Any,
        q: Any,
        scales: Any,
        corrections: Any,
        stride: Any,
        weights: Any,
        groups: Any,
        totals: Any,
    ) -> Any:
        """Add the products of ``groups`` groups, or blocks, of inputs to totals (rows, 16).

        stride: rows between two of them in q, scales and corrections.
        """

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            q, scales, corrections, weights, totals = (
                builder.bitcast(args[i], I8.as_pointer()) for i in (1, 2, 3, 5, 7)
            )
            operands = (q, scales, corrections, args[4], weights, args[6], totals)
            if only_most:
                emit(builder, most, operands)
            else:
                for_each_count(builder, args[0], most, lambda count: emit(builder, count, operands))
            return context.get_dummy_value()

        number = types.int64
        kinds = (number, q, scales, corrections, number, weights, number, totals)
        return types.void(*kinds), codegen

    return multiply_tile


def local_array(element: types.Type, count: int) -> Any:
    """Return the intrinsic that gives a buffer of numbers, private to the call of the kernel."""

    @intrinsic
    def buffer(typingctx: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            kind = context.get_value_type(element)
            memory = cgutils.alloca_once(builder, ir.ArrayType(kind, count))
            memory.align = 64
            return builder.bitcast(memory, kind.as_pointer())

        return types.CPointer(element)(), codegen

    return buffer
