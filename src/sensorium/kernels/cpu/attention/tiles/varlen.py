"""Varlen attention of encoders in bf16 with AMX: every row attends to all rows of its sequence.

Keys and values are first packed, head by head, in the order that the tiles read: keys in blocks of
32, pairs of dimensions side by side; values in pairs of rows. A task then takes 32 rows of queries
through its segment in chunks of keys: scores, online softmax (Milakov and Gimelshein, 2018) to the
base 2, weighted values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import types

from sensorium.kernels.cpu import amx, tile_check
from sensorium.kernels.cpu.amx import BLOCK, DEPTH, TILE, bound
from sensorium.kernels.cpu.attention.softmax import HIDDEN_SCORE, scale_sums
from sensorium.kernels.cpu.attention.tiles.softmax import (
    _round_up,
    exp2_rough,
    store_weights,
    up,
)
from sensorium.kernels.cpu.elementwise import kernel
from sensorium.kernels.cpu.launch import float_bits, pack
from sensorium.kernels.cpu.numeric import (
    OUTLINE,
    WIDTH,
    as_float,
    exp1,
    f32,
    fetch_add,
    largest,
    load16,
    njit,
    outlined,
    peak,
    pointer,
    shifted,
    splat,
    total,
)
from sensorium.kernels.cpu.rotary import convert_row, write_value

KEYS = 512
"""Keys whose scores are held at once."""
SCORE_STRIDE, WEIGHT_STRIDE = KEYS + WIDTH, KEYS + 2 * WIDTH
"""Lengths of rows in scratch memory. Multiples of a page would all map to one set of the CPU's
caches."""
MAX_HEAD_DIM = 256
LOG_2 = f32(math.log(2))
PACKED_BYTES = 32 * 1024 * 1024
"""Most memory for packed keys and values at a time, unless one segment takes more."""

# Columns of the table of tasks (int64): segment's first row, its length, place of its packed keys
# in rows, head, and the first row of queries within the segment.
START, LENGTH, PACKED, HEAD, FIRST = range(5)
TASK_COLUMNS = 5


def trusted_unit() -> amx.Unit | None:
    """Return the tiles to use, None where there are none or their numbers are not right."""
    unit = amx.unit()
    if unit is None:
        return None
    from sensorium.kernels.cpu.attention.tiles import checks  # which runs these kernels

    found = tile_check.outcome("attention of encoders", checks.encoders, unit)
    return None if found == tile_check.WRONG else unit


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether these kernels run for q, k, v (T, heads, D) on this machine."""
    if not (q.is_cpu and q.dtype == torch.bfloat16 and trusted_unit() is not None):
        return False
    same = all(t.shape == q.shape and t.dtype == q.dtype and t.device == q.device for t in (k, v))
    if not same or k.stride() != v.stride():
        return False
    head_dim, (row, head, element) = q.shape[2], k.stride()
    paired = head_dim % 2 == 0 and row % 2 == 0 and head % 2 == 0 and k.data_ptr() % 4 == 0
    return paired and q.stride(2) == element == 1 and head_dim <= MAX_HEAD_DIM


@njit(**OUTLINE)
def pack_keys(keys: Any, stride: Any, length: Any, dim: Any, out: Any) -> None:
    """Pack keys (length, dim) into blocks of 32 keys: (blocks, depth / 2, 32).

    Keys are read as pairs (uint32) with a row stride.
    """
    half, depth = dim // 2, up(dim, DEPTH) // 2
    for first in range(0, up(length, BLOCK), BLOCK):
        block = shifted(out, first * depth)
        count = min(BLOCK, length - first)
        for row in range(count):
            key = shifted(keys, (first + row) * stride)
            for d in range(half):
                block[d * BLOCK + row] = key[d]
        for row in range(count, BLOCK):
            for d in range(half):
                block[d * BLOCK + row] = types.uint32(0)
        for place in range(half * BLOCK, depth * BLOCK):
            block[place] = types.uint32(0)


@njit(**OUTLINE)
def pack_values(values: Any, stride: Any, length: Any, dim: Any, out: Any) -> None:
    """Pack values (length, dim) into blocks of 32 keys: pairs (blocks, 16, columns).

    Values are read with a row stride. A pair (uint32) holds the keys i and i + 16 of its block, as
    ``store_weights`` pairs their weights. The rest is zeros.
    """
    columns = up(dim, TILE)
    for first in range(0, up(length, BLOCK), BLOCK):
        block = shifted(out, first * columns // 2)
        for row in range(TILE):
            pairs = shifted(block, row * columns)
            upper = shifted(values, (first + row) * stride)
            lower = shifted(upper, TILE * stride)
            left = length - first - row
            if left > TILE:
                for d in range(dim):
                    pairs[d] = types.uint32(upper[d]) | (types.uint32(lower[d]) << types.uint32(16))
            elif left > 0:
                for d in range(dim):
                    pairs[d] = types.uint32(upper[d])
            for d in range(dim if left > 0 else 0, columns):
                pairs[d] = types.uint32(0)


@njit(**OUTLINE)
def online_softmax_row(scores: Any, count: Any, scale: Any, top: Any, weights: Any) -> Any:
    """Turn a row of scores into weights (bf16) 2^(scale * (score - new top)); scale is positive.

    This is one step of the online softmax. Weights behind ``count``, up to the block's end, are too
    small to matter. Returns the new top and the sum.
    """
    padded = up(count, BLOCK)
    for j in range(count, padded):
        scores[j] = HIDDEN_SCORE
    best, other = splat(top), splat(HIDDEN_SCORE)
    for j in range(0, padded, BLOCK):
        best = largest(load16(scores, j), best)
        other = largest(load16(scores, j + WIDTH), other)
    new_top = peak(largest(best, other))
    # The difference is exact at the top and never positive, however large the scores are.
    factor, base, summed = splat(scale), splat(new_top), splat(f32(0.0))
    for j in range(0, padded, BLOCK):
        first = exp2_rough((load16(scores, j) - base) * factor)
        second = exp2_rough((load16(scores, j + WIDTH) - base) * factor)
        store_weights(weights, j, first, second)
        summed = summed + (first + second)
    return new_top, total(summed)


def build_pack(element: Any) -> Callable[[Any], None]:
    """Build the kernel that packs keys and values.

    args: k, v (rows of row stride, heads of D), their row stride and head stride, tasks, D, heads,
    keys_out, values_out. The first query row of a task is not used.
    """

    def pack_sequences(args: Any) -> None:
        row_stride, head_stride, dim, heads = args[5], args[6], args[8], args[9]
        depth, columns = up(dim, DEPTH), up(dim, TILE)
        while True:
            index = fetch_add(args, 0, 1)
            if index >= args[2]:
                break
            task = shifted(pointer(args[7], types.int64), index * TASK_COLUMNS)
            length = task[LENGTH]
            at = task[START] * row_stride + task[HEAD] * head_stride
            place = task[PACKED] * heads + task[HEAD] * up(length, BLOCK)
            keys = pointer(args[3] + at * 2, types.uint32)
            out = pointer(args[10] + place * depth * 2, types.uint32)
            pack_keys(keys, row_stride // 2, length, dim, out)
            values = shifted(pointer(args[4], element), at)
            pairs = pointer(args[11] + place * columns * 2, types.uint32)
            pack_values(values, row_stride, length, dim, pairs)

    return pack_sequences


def scratch_bytes(head_dim: int) -> int:
    """Return the scratch size of a thread.

    It holds queries, weights, scores, sums, tops and totals of 32 rows.
    """
    depth: int = _round_up(head_dim, DEPTH)
    columns: int = _round_up(head_dim, TILE)
    halves = depth + WEIGHT_STRIDE
    return BLOCK * (2 * halves + 4 * (SCORE_STRIDE + columns + 2))


def build_attend(element: Any, unit: amx.Unit) -> Callable[[Any], None]:
    """Build the attention kernel over all tasks.

    args: q, its row stride and head stride, packed keys, packed values, tasks, D, heads, out (T,
    heads, D), the scale over ln 2, scratch, its bytes a thread.
    """
    mark = f"_{unit.name}"
    tiles = amx.operations(unit, amx.full_tiles())
    own_state, configure, release = tiles.state, tiles.configure, tiles.release
    multiply_block = amx.block_product(unit)

    @outlined(element, mark)
    def fill_queries(args: Any, task: Any, count: Any, q: Any) -> None:
        """Fill Q (32, depth) with the task's ``count`` query rows, and leave the others."""
        dim, depth = args[9], up(args[9], DEPTH)
        for r in range(count):
            row = task[START] + task[FIRST] + r
            source = shifted(pointer(args[3], element), row * args[4] + task[HEAD] * args[5])
            write_value(source, q, r * depth, dim)
            for d in range(dim, depth):
                q[r * depth + d] = types.uint16(0)

    @outlined(element, mark)
    def run_chunks(
        args: Any,
        task: Any,
        state: Any,
        count: Any,
        q: Any,
        weights: Any,
        scores: Any,
        sums: Any,
        tops: Any,
        totals: Any,
    ) -> None:
        """Run the online softmax over the segment's keys.

        Results: sums (32, columns), tops and totals (32).
        """
        dim, heads, scale = args[9], args[10], as_float(args[12])
        depth, columns = up(dim, DEPTH), up(dim, TILE)
        length = task[LENGTH]
        place = task[PACKED] * heads + task[HEAD] * up(length, BLOCK)
        keys = shifted(pointer(args[6], element), place * depth)
        values = shifted(pointer(args[7], element), place * columns)
        for r in range(BLOCK):
            tops[r] = HIDDEN_SCORE
            totals[r] = f32(0.0)
        for start in range(0, length, KEYS):
            seen = min(KEYS, length - start)
            padded = up(seen, BLOCK)
            for column in range(0, padded, BLOCK):
                block = shifted(keys, (start + column) * depth)
                multiply_block(
                    state,
                    q,
                    depth,
                    block,
                    BLOCK * 2,
                    depth,
                    shifted(scores, column),
                    SCORE_STRIDE,
                    True,
                    False,
                )
            for r in range(count):
                row = shifted(scores, r * SCORE_STRIDE)
                top, part = online_softmax_row(
                    row, seen, scale, tops[r], shifted(weights, r * WEIGHT_STRIDE)
                )
                fade = exp1((tops[r] - top) * scale * LOG_2)
                totals[r] = totals[r] * fade + part
                if start > 0 and fade != f32(1.0):
                    scale_sums(shifted(sums, r * columns), columns, fade)
                tops[r] = top
            pairs = shifted(values, start * columns)
            for d in range(0, columns, BLOCK):
                multiply_block(
                    state,
                    weights,
                    WEIGHT_STRIDE,
                    shifted(pairs, d * 2),
                    columns * 2,
                    padded,
                    shifted(sums, d),
                    columns,
                    columns - d >= BLOCK,
                    start > 0,
                )

    def attend_sequences(args: Any) -> None:
        dim, heads = args[9], args[10]
        depth, columns = up(dim, DEPTH), up(dim, TILE)
        q_at = args[13] + fetch_add(args, 1, 1) * args[14]
        weights_at = q_at + BLOCK * depth * 2
        scores_at = weights_at + BLOCK * WEIGHT_STRIDE * 2
        q, weights = pointer(q_at, element), pointer(weights_at, element)
        scores = pointer(scores_at, types.float32)
        sums = shifted(scores, BLOCK * SCORE_STRIDE)
        tops = shifted(sums, BLOCK * columns)
        totals = shifted(tops, BLOCK)
        state = own_state()
        configure(state)
        while True:
            index = fetch_add(args, 0, 1)
            if index >= args[2]:
                break
            task = shifted(pointer(args[8], types.int64), index * TASK_COLUMNS)
            count = min(BLOCK, task[LENGTH] - task[FIRST])
            fill_queries(args, task, count, q)
            run_chunks(args, task, state, count, q, weights, scores, sums, tops, totals)
            for r in range(count):
                row = task[START] + task[FIRST] + r
                out = shifted(pointer(args[11], element), (row * heads + task[HEAD]) * dim)
                convert_row(shifted(sums, r * columns), dim, f32(1.0) / totals[r], out)
        release(state)

    attend_sequences.__qualname__ += mark
    return attend_sequences


@functools.lru_cache(maxsize=64)
def _tasks(starts: tuple[int, ...], num_heads: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the tasks of packing and of attention, and the number of packed rows."""
    packing, attending, packed = [], [], 0
    for start, end in pairwise(starts):
        length = end - start
        for head in range(num_heads):
            packing.append((start, length, packed, head, 0))
            attending += [(start, length, packed, head, row) for row in range(0, length, BLOCK)]
        packed += _round_up(length, BLOCK)
    return np.array(packing, np.int64), np.array(attending, np.int64), packed


def segment_runs(starts: Sequence[int], row_bytes: int) -> Iterator[tuple[int, ...]]:
    """Yield start and end of runs of segments whose packed rows fit into ``PACKED_BYTES``.

    A longer segment is a run of its own.
    """
    run, size = [starts[0]], 0
    for start, end in pairwise(starts):
        own = _round_up(end - start, BLOCK) * row_bytes
        if len(run) > 1 and size + own > PACKED_BYTES:
            yield tuple(run)
            run, size = [start], 0
        run.append(end)
        size += own
    yield tuple(run)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Sequence[int], scale: float
) -> torch.Tensor:
    """Compute ``reference.varlen_attention`` with AMX.

    For tensors that ``fits`` accepts and a positive scale.
    """
    unit = trusted_unit()
    assert unit is not None
    return attention_by(unit, q, k, v, cu_seqlens, scale)


def attention_by(
    unit: amx.Unit,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Compute ``varlen_attention`` with the tiles of a unit."""
    _, num_heads, dim = q.shape
    out = q.new_empty(q.shape)
    row_bytes = num_heads * (_round_up(dim, DEPTH) + _round_up(dim, TILE)) * 2
    for starts in segment_runs(cu_seqlens, row_bytes):
        _attend_run(unit, q, k, v, starts, scale, out)
    return out


def _attend_run(
    unit: amx.Unit,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: tuple[int, ...],
    scale: float,
    out: torch.Tensor,
) -> None:
    """Compute the attention of some segments into their rows of ``out``."""
    _, num_heads, dim = q.shape
    packing, attending, packed = _tasks(starts, num_heads)
    weight = 2 * num_heads * dim * sum((end - start) ** 2 for start, end in pairwise(starts))
    keys = q.new_empty(packed * num_heads * _round_up(dim, DEPTH))
    values = q.new_empty(packed * num_heads * _round_up(dim, TILE))
    args = pack(
        len(packing),
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0),
        k.stride(1),
        packing.ctypes.data,
        dim,
        num_heads,
        keys.data_ptr(),
        values.data_ptr(),
    )
    kernel(build_pack, q.dtype).for_weight(weight)(args)
    size = _round_up(scratch_bytes(dim), 64)
    num_threads = torch.get_num_threads()
    scratch = torch.empty(size * num_threads, dtype=torch.uint8)
    args = pack(
        len(attending),
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        keys.data_ptr(),
        values.data_ptr(),
        attending.ctypes.data,
        dim,
        num_heads,
        out.data_ptr(),
        float_bits(scale / math.log(2)),
        scratch.data_ptr(),
        size,
    )
    kernel(bound(build_attend, unit), q.dtype).for_weight(weight, num_threads)(args)
