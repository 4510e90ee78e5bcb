"""Small operations between linear layers, each in one pass: norms, SiLU, the order of columns.

Tasks are rows, or parts of rows. Work below ``SERIAL_ELEMENTS`` runs on the calling thread: opening
a parallel region costs as much as some ten thousand elements.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu.launch import (
    MOST_THREADS,
    Args,
    Launcher,
    compile_kernel,
    float_bits,
    pack,
)
from sensorium.kernels.cpu.numeric import (
    ELEMENT,
    INLINE,
    WIDTH,
    as_float,
    exp16,
    f32,
    fetch_add,
    fma,
    largest,
    load16,
    load_part,
    njit,
    pointer,
    shifted,
    splat,
    store16,
    store_part,
    total,
)

SERIAL_ELEMENTS = 8192
COLUMNS_PART = 4096
"""Elements of a row that a task puts in order."""
SILU_PART = 2048

Build = Callable[[Any], Callable[[Any], None]]


_COMPILING = threading.Lock()


@functools.cache
def kernel(build: Build, dtype: torch.dtype) -> Launcher:
    """Return the kernel of ``build`` for tensors of ``dtype``, compiled or loaded at first use."""
    with _COMPILING:  # while weights are loaded, another thread asks for all of them
        return _kernel(build, dtype)


@functools.cache
def _kernel(build: Build, dtype: torch.dtype) -> Launcher:
    return compile_kernel(build(ELEMENT[dtype]), str(dtype).removeprefix("torch."))


def launch(kernel: Launcher, args: Any, num_elements: int, most: int = MOST_THREADS) -> None:
    """Run a kernel on one thread or on all, at most ``most``, by the size of the work."""
    if num_elements <= SERIAL_ELEMENTS:
        kernel.serial(args)
    else:
        kernel.parallel(args, most)


# -- norms --------------------------------------------------------------------------------------


@njit(**INLINE)
def square_sum(row: Any, size: Any) -> Any:
    """Return the sum of the squares of ``size`` elements."""
    squares = splat(f32(0.0))
    full = size - size % WIDTH
    for i in range(0, full, WIDTH):
        value = load16(row, i)
        squares = fma(value, value, squares)
    if full < size:
        value = load_part(row, full, size - full)
        squares = fma(value, value, squares)
    return total(squares)


@njit(**INLINE)
def add_row(residual: Any, x: Any, size: Any) -> None:
    """Add ``x`` to ``residual``, rounded to the stored type."""
    full = size - size % WIDTH
    for i in range(0, full, WIDTH):
        store16(residual, i, load16(residual, i) + load16(x, i))
    if full < size:
        rest = size - full
        store_part(residual, full, load_part(residual, full, rest) + load_part(x, full, rest), rest)


@njit(**INLINE)
def scale_row(source: Any, weight: Any, out: Any, size: Any, factor: Any) -> None:
    """Compute out = source * factor * weight."""
    full = size - size % WIDTH
    wide = splat(factor)
    for i in range(0, full, WIDTH):
        store16(out, i, load16(source, i) * wide * load16(weight, i))
    if full < size:
        rest = size - full
        value = load_part(source, full, rest) * wide * load_part(weight, full, rest)
        store_part(out, full, value, rest)


def build_norm(element: Any) -> Callable[[Any], None]:
    """Build the RMS norm kernel.

    args: residual, x (0: nothing to add), weight, out, size, eps.
    """

    def norm(args: Any) -> None:
        weight = pointer(args[5], element)
        size, eps = args[7], as_float(args[8])
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            residual = shifted(pointer(args[3], element), task * size)
            out = shifted(pointer(args[6], element), task * size)
            if args[4] != 0:
                add_row(residual, shifted(pointer(args[4], element), task * size), size)
            mean = square_sum(residual, size) / f32(size)
            scale_row(residual, weight, out, size, f32(1.0) / math.sqrt(mean + eps))

    return norm


NormFunctions = tuple[
    Callable[[torch.Tensor], torch.Tensor],
    Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
]


def bind_norm(weight: torch.Tensor, eps: float) -> NormFunctions:
    """Bind ``reference.rms_norm`` and ``add_rms_norm`` to a weight, one Python frame per call.

    x, residual: contiguous, of the weight's dtype.
    """
    norm = kernel(build_norm, weight.dtype)
    serial, parallel = norm.serial, norm.parallel
    size, address, bits = weight.shape[0], weight.data_ptr(), float_bits(eps)

    def rms_norm(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        count = x.numel()
        args = Args(0, 0, count // size, x.data_ptr(), 0, address, out.data_ptr(), size, bits)
        (serial if count <= SERIAL_ELEMENTS else parallel)(args)
        return out

    def add_rms_norm(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        count = x.numel()
        added = x.data_ptr()
        args = Args(
            0, 0, count // size, residual.data_ptr(), added, address, out.data_ptr(), size, bits
        )
        (serial if count <= SERIAL_ELEMENTS else parallel)(args)
        return out

    return rms_norm, add_rms_norm


# -- SiLU ---------------------------------------------------------------------------------------


@njit(**INLINE)
def gated(gate: Any, up: Any) -> Any:
    """Compute silu(gate) * up = gate / (1 + e^-gate) * up; silu is taken as zero below -88."""
    gate = largest(splat(f32(-88.0)), gate)
    return gate / (splat(f32(1.0)) + exp16(splat(f32(0.0)) - gate)) * up


def build_silu_mul(element: Any) -> Callable[[Any], None]:
    """Build the kernel of silu(gate) * up.

    args: gate_up, out, inner size, elements of a task, tasks of a row.
    """

    def silu_mul(args: Any) -> None:
        inner, part, per_row = args[5], args[6], args[7]
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            row, first = task // per_row, task % per_row * part
            size = min(part, inner - first)
            gate = shifted(pointer(args[3], element), row * 2 * inner + first)
            up = shifted(gate, inner)
            out = shifted(pointer(args[4], element), row * inner + first)
            full = size - size % WIDTH
            for i in range(0, full, WIDTH):
                store16(out, i, gated(load16(gate, i), load16(up, i)))
            if full < size:
                rest = size - full
                value = gated(load_part(gate, full, rest), load_part(up, full, rest))
                store_part(out, full, value, rest)

    return silu_mul


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute ``reference.silu_mul`` for contiguous tensors."""
    num_rows, double = gate_up.shape
    inner = double // 2
    out = gate_up.new_empty((num_rows, inner))
    per_row = -(-inner // SILU_PART)
    tasks = num_rows * per_row
    args = Args(0, 0, tasks, gate_up.data_ptr(), out.data_ptr(), inner, SILU_PART, per_row)
    silu = kernel(build_silu_mul, gate_up.dtype)
    (silu.serial if num_rows * double <= SERIAL_ELEMENTS else silu.parallel)(args)
    return out


def build_quick_gelu(element: Any) -> Callable[[Any], None]:
    """Build the kernel of x * sigmoid(1.702 x).

    args: x, overwritten; number of elements; elements of a task.
    """

    def quick_gelu(args: Any) -> None:
        num_elements, part = args[4], args[5]
        slope = splat(f32(-1.702))
        one = splat(f32(1.0))
        floor = splat(f32(-51.0))  # below, the product is taken as zero
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            size = min(part, num_elements - task * part)
            x = shifted(pointer(args[3], element), task * part)
            full = size - size % WIDTH
            for i in range(0, full, WIDTH):
                value = largest(floor, load16(x, i))
                store16(x, i, value / (one + exp16(value * slope)))
            if full < size:
                value = largest(floor, load_part(x, full, size - full))
                store_part(x, full, value / (one + exp16(value * slope)), size - full)

    return quick_gelu


def quick_gelu_(x: torch.Tensor) -> torch.Tensor:
    """Compute x * sigmoid(1.702 x) in place; x is contiguous."""
    num_elements = x.numel()
    args = pack(-(-num_elements // SILU_PART), x.data_ptr(), num_elements, SILU_PART)
    launch(kernel(build_quick_gelu, x.dtype), args, num_elements)
    return x


# -- order of columns ---------------------------------------------------------------------------


def build_columns(element: Any) -> Callable[[Any], None]:
    """Build the kernel that puts the columns of rows into another order.

    args: x, out, columns, elements of a task, tasks of a row, order (int32).
    """

    def columns(args: Any) -> None:
        size, part, per_row = args[5], args[6], args[7]
        order = pointer(args[8], types.int32)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            row, first = task // per_row, task % per_row * part
            source = shifted(pointer(args[3], element), row * size)
            out = shifted(pointer(args[4], element), row * size)
            for i in range(first, min(first + part, size)):
                out[i] = source[order[i]]

    return columns


def bind_columns(order: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives the columns of rows (..., K) of ``dtype`` in an order.

    order: (K,) int32, contiguous, within 0 to K - 1; it must live as long as the function. The
    function raises ValueError for rows of another width or type.
    """
    own, size, width = kernel(build_columns, dtype), order.numel(), order.shape
    per_row = -(-size // COLUMNS_PART)

    def columns(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != dtype or x.shape[-1:] != width:
            raise ValueError(
                f"rows {tuple(x.shape)} {x.dtype} for an order of {size} columns of {dtype}"
            )
        x = x.contiguous()
        out = torch.empty_like(x)
        num_tasks = x.numel() // size * per_row
        values = (x.data_ptr(), out.data_ptr(), size, COLUMNS_PART, per_row, order.data_ptr())
        launch(own, pack(num_tasks, *values), x.numel())
        return out

    return columns
