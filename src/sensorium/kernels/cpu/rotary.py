"""Rotary embedding and cache writes for spans of tokens, with the steps that decoding shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu.elementwise import kernel, launch, scale_row, square_sum
from sensorium.kernels.cpu.launch import pack
from sensorium.kernels.cpu.numeric import (
    INLINE,
    WIDTH,
    as_float,
    f32,
    fetch_add,
    load,
    load16,
    load_part,
    njit,
    pointer,
    shifted,
    splat,
    store,
    store16,
    store_part,
)

ROWS_PER_TASK = 4
SCRATCH_ROWS = 3
"""Rows of a head, padded to a multiple of 16, that writing a key takes as scratch."""


@njit(**INLINE)
def rotate_head(source: Any, cos: Any, sin: Any, half: Any, dim: Any, scale: Any, out: Any) -> None:
    """Compute out (float32) = scale * source, rotated by cos, sin (half,).

    The first 2 * half elements are rotated.
    """
    factor = splat(scale)
    for i in range(0, half, WIDTH):
        count = min(WIDTH, half - i)
        c, s = load_part(cos, i, count) * factor, load_part(sin, i, count) * factor
        first, second = load_part(source, i, count), load_part(source, half + i, count)
        store_part(out, i, first * c - second * s, count)
        store_part(out, half + i, second * c + first * s, count)
    for i in range(2 * half, dim, WIDTH):
        count = min(WIDTH, dim - i)
        store_part(out, i, load_part(source, i, count) * factor, count)


@njit(**INLINE)
def normed_head(source: Any, norm: Any, use: Any, eps: Any, dim: Any, out: Any) -> None:
    """Compute out (float32) = source, RMS-normed with the weight ``norm`` if ``use`` is true."""
    factor = f32(1.0)
    if use:
        factor /= math.sqrt(square_sum(source, dim) / f32(dim) + eps)
        scale_row(source, norm, out, dim, factor)
    else:
        for i in range(0, dim, WIDTH):
            count = min(WIDTH, dim - i)
            store_part(out, i, load_part(source, i, count), count)


@njit(**INLINE)
def write_key(key: Any, k_cache: Any, slot: Any, dim: Any, block_size: Any) -> None:
    """Store a key (float32) as one column of a transposed block."""
    for d in range(dim):
        store(k_cache, slot + d * block_size, load(key, d))


@njit(**INLINE)
def write_value(value: Any, v_cache: Any, slot: Any, dim: Any) -> None:
    """Copy a value (stored type) into one row of a block."""
    full = dim - dim % WIDTH
    for i in range(0, full, WIDTH):
        store16(v_cache, slot + i, load16(value, i))
    if full < dim:
        store_part(v_cache, slot + full, load_part(value, full, dim - full), dim - full)


@njit(**INLINE)
def convert_row(source: Any, size: Any, scale: Any, out: Any) -> None:
    """Compute out = source * scale, from one element type to another."""
    factor = splat(scale)
    full = size - size % WIDTH
    for i in range(0, full, WIDTH):
        store16(out, i, load16(source, i) * factor)
    if full < size:
        rest = size - full
        store_part(out, full, load_part(source, full, rest) * factor, rest)


@njit(**INLINE)
def write_pair(key: Any, value: Any, dim: Any, k_cache: Any, v_cache: Any, place: Any) -> None:
    """Store a key (float32) and a value (stored type) in caches of the value's type.

    key: the first of ``SCRATCH_ROWS - 1`` rows of scratch. k_cache, v_cache: addresses; place:
    index of block and head, token in the block, tokens of a block.
    """
    index, offset, block_size = place
    slot = index * dim * block_size
    write_key(key, pointer(k_cache, value), slot + offset, dim, block_size)
    write_value(value, pointer(v_cache, value), slot + offset * dim, dim)


def build_rope_write(
    element: Any, mark: str = "", write_pair: Any = write_pair
) -> Callable[[Any], None]:
    """Rotate the queries of some rows into ``q_out``, write keys and values into the cache.

    args: qkv, cos, sin, k_cache, v_cache, q_out (T, heads, D) float32, k_out (T, KV heads, D) (0:
    none), row_block, row_offset (int64), heads, KV heads, D, half of the rotary dimensions, block
    size, q_norm (0: none), k_norm, eps, first row, number of rows, rows of a task, scratch
    (float32, ``SCRATCH_ROWS`` D a thread, D a multiple of 16). Row pointers are those of row 0 of
    the step; row_block and row_offset start at the first row. ``write_pair`` stores a key and a
    value, ``mark`` tells kernels apart.
    """

    def rope_write(args: Any) -> None:
        heads, kv_heads, dim, half, block_size = args[12], args[13], args[14], args[15], args[16]
        eps, first_row, num_rows, per_task = as_float(args[19]), args[20], args[21], args[22]
        slot = fetch_add(args, 1, 1)
        padded = (dim + WIDTH - 1) // WIDTH * WIDTH
        normed = shifted(pointer(args[23], types.float32), slot * SCRATCH_ROWS * padded)
        rotated = shifted(normed, padded)
        width = (heads + 2 * kv_heads) * dim
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            for index in range(task * per_task, min((task + 1) * per_task, num_rows)):
                row = first_row + index
                block = pointer(args[10], types.int64)[index]
                offset = pointer(args[11], types.int64)[index]
                source = shifted(pointer(args[3], element), row * width)
                cos = shifted(pointer(args[4], types.float32), row * half)
                sin = shifted(pointer(args[5], types.float32), row * half)
                q_out = shifted(pointer(args[8], types.float32), row * heads * dim)
                k_out = shifted(pointer(args[9], element), row * kv_heads * dim)
                for h in range(heads):
                    q_norm = pointer(args[17], element)
                    normed_head(shifted(source, h * dim), q_norm, args[17] != 0, eps, dim, normed)
                    rotate_head(normed, cos, sin, half, dim, f32(1.0), shifted(q_out, h * dim))
                for h in range(kv_heads):
                    key = shifted(source, (heads + h) * dim)
                    k_norm = pointer(args[18], element)
                    normed_head(key, k_norm, args[18] != 0, eps, dim, normed)
                    rotate_head(normed, cos, sin, half, dim, f32(1.0), rotated)
                    if args[9] != 0:
                        convert_row(rotated, dim, f32(1.0), shifted(k_out, h * dim))
                    value = shifted(key, kv_heads * dim)
                    place = (block * kv_heads + h, offset, block_size)
                    write_pair(rotated, value, dim, args[6], args[7], place)

    rope_write.__qualname__ += mark
    return rope_write


def build_rotate(element: Any) -> Callable[[Any], None]:
    """Rotate the first heads of each row in place.

    args: rows (T, width), cos, sin, width, heads to rotate, D, half of the rotary dimensions, T,
    rows of a task, scratch (float32, D a thread).
    """

    def rotate(args: Any) -> None:
        width, heads, dim, half = args[6], args[7], args[8], args[9]
        num_rows, per_task = args[10], args[11]
        slot = fetch_add(args, 1, 1)
        rotated = shifted(pointer(args[12], types.float32), slot * dim)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            for row in range(task * per_task, min((task + 1) * per_task, num_rows)):
                source = shifted(pointer(args[3], element), row * width)
                cos = shifted(pointer(args[4], types.float32), row * half)
                sin = shifted(pointer(args[5], types.float32), row * half)
                for h in range(heads):
                    head = shifted(source, h * dim)
                    rotate_head(head, cos, sin, half, dim, f32(1.0), rotated)
                    convert_row(rotated, dim, f32(1.0), head)

    return rotate


def rotate_heads(
    rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, head_dim: int
) -> None:
    """Compute ``reference.rotate_heads`` for contiguous rows and float32 factors."""
    num_rows, width = rows.shape
    num_threads = torch.get_num_threads()
    scratch = torch.empty(num_threads * head_dim)
    args = pack(
        -(-num_rows // ROWS_PER_TASK),
        rows.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        width,
        num_heads,
        head_dim,
        cos.shape[1],
        num_rows,
        ROWS_PER_TASK,
        scratch.data_ptr(),
    )
    weight = num_rows * num_heads * head_dim
    launch(kernel(build_rotate, rows.dtype), args, weight, num_threads)
