"""Number types of the CPU kernels: pointers to bf16, fp16 and fp32, and vectors of sixteen floats.

Numba knows neither bf16 nor vectors, so both are defined here, as LLVM code that any CPU with
vectors of some width runs well. A pointer's element type tells how numbers are stored: uint16 is
bf16 by its bits, int16 is fp16 by its bits, float32 is itself. Everything is computed in float32;
storing rounds to nearest even.

Nothing here checks bounds: the callers in ``attention`` and ``elementwise`` do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba import extending, types
from numba.core import cgutils

from sensorium.kernels.cpu.compiler import functions

# The kernels are written in a language of Numba's, whose pointers and vectors Python's type
# checkers do not know.
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic

WIDTH = 16
"""Floats in a vector."""

OUTLINE = {"error_model": "numpy", "boundscheck": False, **functions.OPTIONS}
"""Options of functions that stay functions, as they are large."""

LINE_BYTES = 64
"""Bytes of a line of the CPU's caches."""

ELEMENT = {torch.bfloat16: types.uint16, torch.float16: types.int16, torch.float32: types.float32}
"""Pointer types of tensor elements."""

f32 = np.float32
INLINE = {"forceinline": True, **OUTLINE}

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_HALF, _VEC = ir.HalfType(), ir.VectorType(ir.FloatType(), WIDTH)
_CONTRACT = ("contract",)


def outlined(element: types.Type, mark: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Compile a function inside a kernel's builder for one element type, without inlining it.

    The type becomes part of its name: machine code is linked by name, and that of two element
    types, compiled by two processes and loaded by a third, could otherwise have the same one.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{element}{mark}"
        return njit(**OUTLINE)(function)

    return compiled


class VectorType(types.Type):
    """Numba type of <16 x float>."""

    def __init__(self) -> None:
        super().__init__(name="vec16f32")


vec16 = VectorType()


@extending.register_model(VectorType)
class _VectorModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VEC)


def _lanes(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, WIDTH)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    vector = ir.VectorType(scalar.type, WIDTH)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


# -- reading and writing elements ---------------------------------------------------------------


def widened(builder: ir.IRBuilder, element: types.Type, raw: ir.Value, wide: ir.Type) -> ir.Value:
    """Convert stored numbers (scalar or vector) of an element type to float32."""
    if element == types.float32:
        return raw
    vector = isinstance(wide, ir.VectorType)
    if element == types.int16:
        return builder.fpext(builder.bitcast(raw, _lanes(_HALF) if vector else _HALF), wide)
    bits = _lanes(_I32) if vector else _I32
    shift = ir.Constant(bits, [16] * WIDTH if vector else 16)
    return builder.bitcast(builder.shl(builder.zext(raw, bits), shift), wide)


def narrowed(builder: ir.IRBuilder, element: types.Type, value: ir.Value) -> ir.Value:
    """Convert float32 (scalar or vector) to the stored numbers of an element type."""
    if element == types.float32:
        return value
    vector = isinstance(value.type, ir.VectorType)
    bits, short = (_lanes(_I32), _lanes(_I16)) if vector else (_I32, _I16)
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(value, _lanes(_HALF) if vector else _HALF), short)

    def constant(number: int) -> ir.Constant:
        return ir.Constant(bits, [number] * WIDTH if vector else number)

    raw = builder.bitcast(value, bits)
    high = builder.lshr(raw, constant(16))
    nearest = builder.add(constant(0x7FFF), builder.and_(high, constant(1)))
    rounded = builder.lshr(builder.add(raw, nearest), constant(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(high, constant(0x40))
    return builder.trunc(builder.select(is_nan, quiet, rounded), short)


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Cast an address to a pointer to elements of the type ``like``."""
    element = like.instance_type if isinstance(like, types.TypeRef) else like.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(types.int64, like), codegen


@intrinsic
def recast(typingctx: Any, ptr: Any, like: Any) -> Any:
    """Cast a pointer to one to elements of the type ``like``."""
    element = like.instance_type if isinstance(like, types.TypeRef) else like.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(ptr, like), codegen


@intrinsic
def shifted(typingctx: Any, ptr: Any, offset: Any) -> Any:
    """Advance a pointer by ``offset`` elements."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.gep(args[0], [args[1]])

    return ptr(ptr, types.int64), codegen


@intrinsic
def load(typingctx: Any, ptr: Any, index: Any) -> Any:
    """Load element ``index`` as float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        raw = builder.load(builder.gep(args[0], [args[1]]))
        return widened(builder, ptr.dtype, raw, _F32)

    return types.float32(ptr, types.int64), codegen


@intrinsic
def store(typingctx: Any, ptr: Any, index: Any, value: Any) -> Any:
    """Store a float32, rounded, into element ``index``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store(narrowed(builder, ptr.dtype, args[2]), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(ptr, types.int64, types.float32), codegen


def _stored_lanes(element: types.Type) -> tuple[ir.VectorType, int]:
    return (_lanes(_F32), 4) if element == types.float32 else (_lanes(_I16), 2)


def _mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    order = ir.Constant(_lanes(_I32), list(range(WIDTH)))
    return builder.icmp_signed("<", order, _splat(builder, builder.trunc(count, _I32)))


def read_lanes(
    builder: ir.IRBuilder, ptr: types.CPointer, place: ir.Value, count: ir.Value | None = None
) -> ir.Value:
    """Read sixteen elements at an address as float32.

    With ``count``, lanes from ``count`` on are zeros and their memory is not read.
    """
    raw_type, align = _stored_lanes(ptr.dtype)
    place = builder.bitcast(place, raw_type.as_pointer())
    if count is None:
        raw = builder.load(place, align=align)
    else:
        zero = ir.Constant(raw_type, None)
        suffix = "v16f32" if align == 4 else "v16i16"
        args = [place, _I32(align), _mask(builder, count), zero]
        raw = _call(builder, f"llvm.masked.load.{suffix}.p0", raw_type, args)
    return widened(builder, ptr.dtype, raw, _VEC)


def write_lanes(
    builder: ir.IRBuilder,
    ptr: types.CPointer,
    place: ir.Value,
    value: ir.Value,
    count: ir.Value | None = None,
) -> None:
    """Write sixteen floats, rounded, to an address, or only the first ``count`` of them."""
    raw_type, align = _stored_lanes(ptr.dtype)
    place = builder.bitcast(place, raw_type.as_pointer())
    raw = narrowed(builder, ptr.dtype, value)
    if count is None:
        builder.store(raw, place, align=align)
        return
    suffix = "v16f32" if align == 4 else "v16i16"
    args = [raw, place, _I32(align), _mask(builder, count)]
    _call(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), args)


@intrinsic
def load16(typingctx: Any, ptr: Any, index: Any) -> Any:
    """Load the elements ``index`` to ``index + 15`` as a vector."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return read_lanes(builder, ptr, builder.gep(args[0], [args[1]]))

    return vec16(ptr, types.int64), codegen


@intrinsic
def load_part(typingctx: Any, ptr: Any, index: Any, count: Any) -> Any:
    """Load the ``count`` <= 16 elements from ``index`` on as a vector, zeros behind them."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return read_lanes(builder, ptr, builder.gep(args[0], [args[1]]), args[2])

    return vec16(ptr, types.int64, types.int64), codegen


@intrinsic
def store16(typingctx: Any, ptr: Any, index: Any, value: Any) -> Any:
    """Store a vector, rounded, into the elements ``index`` to ``index + 15``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        write_lanes(builder, ptr, builder.gep(args[0], [args[1]]), args[2])
        return context.get_dummy_value()

    return types.void(ptr, types.int64, vec16), codegen


@intrinsic
def store_part(typingctx: Any, ptr: Any, index: Any, value: Any, count: Any) -> Any:
    """Store the first ``count`` <= 16 lanes of a vector, rounded, from element ``index`` on."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        write_lanes(builder, ptr, builder.gep(args[0], [args[1]]), args[2], args[3])
        return context.get_dummy_value()

    return types.void(ptr, types.int64, vec16, types.int64), codegen


@intrinsic
def transpose16(typingctx: Any, source: Any, source_stride: Any, out: Any, out_stride: Any) -> Any:
    """Transpose sixteen rows of sixteen elements, with the given row strides in elements.

    Four rounds of exchanges between the rows i and i + n, for n of 1, 2, 4 and 8.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        def row(base: ir.Value, stride: ir.Value, index: int) -> ir.Value:
            return builder.gep(base, [builder.mul(stride, _I64(index))])

        def mixed(a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
            return builder.shuffle_vector(a, b, ir.Constant(_lanes(_I32), lanes))

        rows = [read_lanes(builder, source, row(args[0], args[1], i)) for i in range(WIDTH)]
        for step in (1, 2, 4, 8):
            upper = [j if j & step == 0 else WIDTH + j - step for j in range(WIDTH)]
            lower = [j + step if j & step == 0 else WIDTH + j for j in range(WIDTH)]
            for i in range(WIDTH):
                if i & step == 0:
                    a, b = rows[i], rows[i + step]
                    rows[i], rows[i + step] = mixed(a, b, upper), mixed(a, b, lower)
        for i in range(WIDTH):
            write_lanes(builder, out, row(args[2], args[3], i), rows[i])
        return context.get_dummy_value()

    return types.void(source, types.int64, out, types.int64), codegen


# -- arithmetic on vectors ----------------------------------------------------------------------


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """Return a vector with ``value`` in every lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _splat(builder, args[0])

    return vec16(types.float32), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute a * b + c, lane by lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _call(builder, "llvm.fmuladd.v16f32", _VEC, list(args))

    return vec16(vec16, vec16, vec16), codegen


@intrinsic
def largest(typingctx: Any, a: Any, b: Any) -> Any:
    """Return the larger of a and b, lane by lane; b where one of them is NaN."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return vec16(vec16, vec16), codegen


@intrinsic
def with_sign(typingctx: Any, a: Any, b: Any) -> Any:
    """Return the magnitude of a with the sign of b, lane by lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _call(builder, "llvm.copysign.v16f32", _VEC, list(args))

    return vec16(vec16, vec16), codegen


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """Return the sum of the lanes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(_F32, [_F32, _VEC])
        reduce = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.vector.reduce.fadd.v16f32"
        )
        return builder.call(reduce, [ir.Constant(_F32, -0.0), args[0]], fastmath=("reassoc",))

    return types.float32(vec16), codegen


@intrinsic
def peak(typingctx: Any, a: Any) -> Any:
    """Return the largest lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(_F32, [_VEC])
        reduce = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.vector.reduce.fmax.v16f32"
        )
        return builder.call(reduce, [args[0]], fastmath=("nnan",))

    return types.float32(vec16), codegen


@intrinsic
def nearest(typingctx: Any, a: Any) -> Any:
    """Round each lane to the nearest integer."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _call(builder, "llvm.nearbyint.v16f32", _VEC, list(args))

    return vec16(vec16), codegen


@intrinsic
def power_of_two(typingctx: Any, a: Any) -> Any:
    """Compute 2^a for lanes that hold integers in [-126, 127]."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = _lanes(_I32)
        exponent = builder.add(builder.fptosi(args[0], bits), ir.Constant(bits, [127] * WIDTH))
        return builder.bitcast(builder.shl(exponent, ir.Constant(bits, [23] * WIDTH)), _VEC)

    return vec16(vec16), codegen


def _define(operation: Any, emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> None:
    """Define an operator between two vectors for Numba."""

    @extending.type_callable(operation)
    def kind(context: Any) -> Any:
        return lambda a, b: vec16 if a == vec16 and b == vec16 else None

    @extending.lower_builtin(operation, vec16, vec16)
    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return emit(builder, args[0], args[1])


_define(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=_CONTRACT))
_define(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=_CONTRACT))
_define(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=_CONTRACT))
_define(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


@njit(**INLINE)
def exp16(x: Any) -> Any:
    """Compute e^x by lanes, within 2 units in the last place for x in [-87, 88].

    Clamped outside, NaN of NaN. x = k ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is
    exact; then 2^k times the Taylor polynomial of degree 7 (its remainder, r^8 / 8!, is below
    6e-9).
    """
    # ``largest`` takes its second operand when one is NaN: NaN stays NaN.
    clamped = largest(splat(f32(-87.0)), x)
    clamped = splat(f32(0.0)) - largest(splat(f32(-88.0)), splat(f32(0.0)) - clamped)
    k = nearest(clamped * splat(f32(1.4426950408889634)))
    r = fma(k, splat(f32(-0.693359375)), clamped)
    r = fma(k, splat(f32(2.12194440e-4)), r)
    p = fma(splat(f32(1.0 / 5040.0)), r, splat(f32(1.0 / 720.0)))
    p = fma(p, r, splat(f32(1.0 / 120.0)))
    p = fma(p, r, splat(f32(1.0 / 24.0)))
    p = fma(p, r, splat(f32(1.0 / 6.0)))
    p = fma(p, r, splat(f32(0.5)))
    p = fma(p, r, splat(f32(1.0)))
    p = fma(p, r, splat(f32(1.0)))
    return p * power_of_two(k)


@intrinsic
def first_lane(typingctx: Any, a: Any) -> Any:
    """Return lane 0."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.extract_element(args[0], _I32(0))

    return types.float32(vec16), codegen


@njit(**INLINE)
def exp1(x: Any) -> Any:
    """Compute e^x of one float; see ``exp16``."""
    return first_lane(exp16(splat(x)))


@intrinsic
def as_float(typingctx: Any, bits: Any) -> Any:
    """Return the float32 whose bits are the low half of an int64 (see ``launch.float_bits``)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.trunc(args[0], _I32), _F32)

    return types.float32(types.int64), codegen


# -- code of inner loops ------------------------------------------------------------------------


def prefetch(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Emit the prefetch of the line at a place, for reading."""
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [place, _I32(0), _I32(3), _I32(1)])


def for_each_count(
    builder: ir.IRBuilder, count: ir.Value, most: int, emit: Callable[[int], None]
) -> None:
    """Emit code for each number of rows from 1 to ``most``, chosen by ``count``."""
    done, impossible = (builder.append_basic_block(name) for name in ("rows.done", "rows.none"))
    switch = builder.switch(count, impossible)
    for number in range(1, most + 1):
        block = builder.append_basic_block(f"rows.{number}")
        switch.add_case(_I64(number), block)
        builder.position_at_end(block)
        emit(number)
        builder.branch(done)
    builder.position_at_end(impossible)
    builder.unreachable()
    builder.position_at_end(done)


# -- tasks shared between threads ---------------------------------------------------------------


@intrinsic
def fetch_add(typingctx: Any, ptr: Any, index: Any, amount: Any) -> Any:
    """Add to element ``index`` atomically and return its old value.

    Orders memory between the threads that do so.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("add", place, args[2], "acq_rel")

    return ptr.dtype(ptr, types.int64, ptr.dtype), codegen
