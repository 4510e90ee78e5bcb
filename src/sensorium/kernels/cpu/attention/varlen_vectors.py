"""Varlen attention of encoders with vector instructions: a row attends to all rows of its segment.

Keys and values are first widened to float32 and packed, head by head, in the order in which the
tiles read them: keys in panels of TILE_COLUMNS keys, transposed, values in panels of TILE_COLUMNS
dimensions. A task then takes some rows of queries through their segment in chunks of keys: scores,
online softmax to the base 2, weighted values. A row's sums run over the keys in their order and its
chunks are counted from the segment's start, so that its bits depend on its segment alone.
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

from sensorium.kernels.cpu.attention.softmax import HIDDEN_SCORE, exp2_nonpositive, scale_sums
from sensorium.kernels.cpu.attention.tile import TILE_COLUMNS, TILE_ROWS, multiply_tile
from sensorium.kernels.cpu.elementwise import kernel
from sensorium.kernels.cpu.launch import float_bits, pack
from sensorium.kernels.cpu.numeric import (
    ELEMENT,
    OUTLINE,
    WIDTH,
    as_float,
    f32,
    fetch_add,
    first_lane,
    largest,
    load,
    load16,
    load_part,
    njit,
    outlined,
    peak,
    pointer,
    shifted,
    splat,
    store16,
    total,
    transpose16,
)
from sensorium.kernels.cpu.rotary import convert_row

QUERY_ROWS = 96
"""Query rows of a task: a multiple of the rows of a tile."""
KEYS = 256
"""Keys whose scores are held at once."""
SCORE_STRIDE = KEYS + WIDTH
"""Length of a row of scores. Rows of a power of two would map to one set of the CPU's caches."""
PACK_ROWS = 256
"""Keys that one task packs: a multiple of TILE_COLUMNS."""
PACKED_BYTES = 2 * 1024 * 1024
"""Most memory a thread for packed keys and values at a time, unless one head of a segment takes
more: about what a core's second cache holds."""

# Columns of the table of tasks (int64): segment's first row, its length, place of its packed keys
# in rows, head, and the task's first row within the segment.
START, LENGTH, PACKED, HEAD, FIRST = range(5)
TASK_COLUMNS = 5


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether these kernels run for q, k, v (T, heads, D)."""
    if not (q.is_cpu and q.dtype in ELEMENT):
        return False
    same = all(t.shape == q.shape and t.dtype == q.dtype and t.device == q.device for t in (k, v))
    return same and k.stride() == v.stride() and q.stride(2) == k.stride(2) == 1


def padded(number: int, step: int = WIDTH) -> int:
    """Round ``number`` up to a multiple of ``step``."""
    return -(-number // step) * step


exp2_exact = exp2_nonpositive([math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)])
"""2^x for x <= 0 with a relative error of at most 2e-7: the Taylor polynomial of degree 6 in
r ln 2, whose remainder is below that."""


@njit(**OUTLINE)
def online_softmax_row(scores: Any, count: Any, top: Any) -> Any:
    """Turn a row of scores into 2^(score - new top), one step of the online softmax.

    Up to the end of the vector, columns from ``count`` on are overwritten. Returns (new top, sum).
    """
    end = (count + WIDTH - 1) // WIDTH * WIDTH
    for j in range(count, end):
        scores[j] = HIDDEN_SCORE
    best = splat(top)
    for j in range(0, end, WIDTH):
        best = largest(load16(scores, j), best)
    new_top = peak(best)
    base, summed = splat(new_top), splat(f32(0.0))
    for j in range(0, end, WIDTH):
        weight = exp2_exact(load16(scores, j) - base)
        store16(scores, j, weight)
        summed = weight + summed
    return new_top, total(summed)


def build_pack(element: Any) -> Callable[[Any], None]:
    """Build the kernel that packs keys and values, PACK_ROWS rows of a head a task.

    args: k, v, their row stride and head stride, packed keys, packed values (float32), tasks, D, D
    rounded up to WIDTH.
    """

    @outlined(element)
    def pack_keys(keys: Any, stride: Any, count: Any, dim: Any, out: Any) -> None:
        """Pack keys (count, dim) into panels (D, TILE_COLUMNS), zeros behind the last key."""
        full = dim - dim % WIDTH
        for first in range(0, count, WIDTH):
            start = first // TILE_COLUMNS * TILE_COLUMNS
            panel = shifted(out, start * dim + first - start)
            source, held = shifted(keys, first * stride), min(WIDTH, count - first)
            if held == WIDTH:
                for d in range(0, full, WIDTH):
                    at = shifted(panel, d * TILE_COLUMNS)
                    transpose16(shifted(source, d), stride, at, TILE_COLUMNS)
            for row in range(held):
                for d in range(full if held == WIDTH else 0, dim):
                    panel[d * TILE_COLUMNS + row] = load(source, row * stride + d)
        for row in range(count, (count + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS):
            panel = shifted(out, row // TILE_COLUMNS * TILE_COLUMNS * dim)
            for d in range(dim):
                panel[d * TILE_COLUMNS + row % TILE_COLUMNS] = f32(0.0)

    @outlined(element)
    def pack_values(
        values: Any, stride: Any, first: Any, count: Any, rows: Any, dim: Any, out: Any
    ) -> None:
        """Pack values (count, dim) into the rows from ``first`` on of panels (rows, width)."""
        wide = (dim + WIDTH - 1) // WIDTH * WIDTH
        for d in range(0, wide, WIDTH):
            start = d // TILE_COLUMNS * TILE_COLUMNS
            width = min(TILE_COLUMNS, wide - start)
            panel = shifted(out, start * rows + first * width + d - start)
            held = min(WIDTH, dim - d)
            for row in range(count):
                value = load_part(values, row * stride + d, held)
                store16(panel, row * width, value)

    def pack_segments(args: Any) -> None:
        while True:
            index = fetch_add(args, 0, 1)
            if index >= args[2]:
                break
            task = shifted(pointer(args[9], types.int64), index * TASK_COLUMNS)
            row, dim, wide = task[START] + task[FIRST], args[10], args[11]
            count = min(PACK_ROWS, task[LENGTH] - task[FIRST])
            source = row * args[5] + task[HEAD] * args[6]
            keys = shifted(pointer(args[3], element), source)
            values = shifted(pointer(args[4], element), source)
            rows = (task[LENGTH] + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
            at = (task[PACKED] + task[FIRST]) * dim
            pack_keys(keys, args[5], count, dim, shifted(pointer(args[7], types.float32), at))
            out = shifted(pointer(args[8], types.float32), task[PACKED] * wide)
            pack_values(values, args[5], task[FIRST], count, rows, dim, out)

    return pack_segments


def scratch_floats(dim: int) -> int:
    """Return the float32 scratch size of a thread: queries, scores, sums, tops and totals."""
    return QUERY_ROWS * (dim + SCORE_STRIDE + padded(dim) + 2)


@njit(**OUTLINE)
def score_keys(q: Any, rows: Any, dim: Any, keys: Any, count: Any, scores: Any) -> None:
    """Compute scores (rows, SCORE_STRIDE) = q (rows, dim) times ``count`` keys in panels."""
    for column in range(0, count, TILE_COLUMNS):
        for r in range(0, rows, TILE_ROWS):
            multiply_tile(
                min(TILE_ROWS, rows - r),
                shifted(q, r * dim),
                dim,
                shifted(keys, column * dim),
                TILE_COLUMNS,
                dim,
                shifted(scores, r * SCORE_STRIDE + column),
                SCORE_STRIDE,
                TILE_COLUMNS,
                False,
                None,
            )


@njit(**OUTLINE)
def add_values(
    scores: Any,
    rows: Any,
    count: Any,
    values: Any,
    first: Any,
    length: Any,
    wide: Any,
    sums: Any,
) -> None:
    """Add scores (rows, SCORE_STRIDE) times the ``count`` values from ``first`` on to ``sums``.

    sums: (rows, wide). values: panels (length, width).
    """
    for d in range(0, wide, TILE_COLUMNS):
        width = min(TILE_COLUMNS, wide - d)
        panel = shifted(values, d * length + first * width)
        for r in range(0, rows, TILE_ROWS):
            multiply_tile(
                min(TILE_ROWS, rows - r),
                shifted(scores, r * SCORE_STRIDE),
                SCORE_STRIDE,
                panel,
                width,
                count,
                shifted(sums, r * wide + d),
                wide,
                width,
                first > 0,
                None,
            )


def build_attend(element: Any) -> Callable[[Any], None]:
    """Build the attention kernel over all tasks.

    args: q, its row stride and head stride, packed keys, packed values, tasks, D, D rounded up to
    WIDTH, heads, out (T, heads, D), the scale over ln 2, scratch (float32), its size a thread.
    """

    @outlined(element)
    def run_chunks(
        args: Any, task: Any, q: Any, rows: Any, scores: Any, sums: Any, tops: Any, totals: Any
    ) -> None:
        """Run the online softmax over the segment's keys: sums (rows, wide), tops, totals."""
        dim, wide, length = args[9], args[10], task[LENGTH]
        panels = (length + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
        keys = shifted(pointer(args[6], types.float32), task[PACKED] * dim)
        values = shifted(pointer(args[7], types.float32), task[PACKED] * wide)
        for r in range(rows):
            tops[r] = HIDDEN_SCORE
            totals[r] = f32(0.0)
        for start in range(0, length, KEYS):
            count = min(KEYS, length - start)
            score_keys(q, rows, dim, shifted(keys, start * dim), count, scores)
            for r in range(rows):
                row = shifted(scores, r * SCORE_STRIDE)
                top, part = online_softmax_row(row, count, tops[r])
                fade = first_lane(exp2_exact(splat(tops[r] - top)))
                totals[r] = totals[r] * fade + part
                if start > 0 and fade != f32(1.0):
                    scale_sums(shifted(sums, r * wide), wide, fade)
                tops[r] = top
            add_values(scores, rows, count, values, start, panels, wide, sums)

    def attend_segments(args: Any) -> None:
        dim, wide, heads, scale = args[9], args[10], args[11], as_float(args[13])
        q = shifted(pointer(args[14], types.float32), fetch_add(args, 1, 1) * args[15])
        scores = shifted(q, QUERY_ROWS * dim)
        sums = shifted(scores, QUERY_ROWS * SCORE_STRIDE)
        tops = shifted(sums, QUERY_ROWS * wide)
        totals = shifted(tops, QUERY_ROWS)
        while True:
            index = fetch_add(args, 0, 1)
            if index >= args[2]:
                break
            task = shifted(pointer(args[8], types.int64), index * TASK_COLUMNS)
            rows = min(QUERY_ROWS, task[LENGTH] - task[FIRST])
            first = task[START] + task[FIRST]
            for r in range(rows):
                at = (first + r) * args[4] + task[HEAD] * args[5]
                convert_row(shifted(pointer(args[3], element), at), dim, scale, shifted(q, r * dim))
            run_chunks(args, task, q, rows, scores, sums, tops, totals)
            for r in range(rows):
                at = ((first + r) * heads + task[HEAD]) * dim
                out = shifted(pointer(args[12], element), at)
                convert_row(shifted(sums, r * wide), dim, f32(1.0) / totals[r], out)

    return attend_segments


@functools.lru_cache(maxsize=64)
def _runs(
    starts: tuple[int, ...], num_heads: int, row_bytes: int, most_bytes: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the tasks of packing and those of attention, run by run."""
    return [
        (_table(run, PACK_ROWS), _table(run, QUERY_ROWS))
        for run in head_runs(starts, num_heads, row_bytes, most_bytes)
    ]


def padded_length(length: int) -> int:
    """Return the rows that the packed keys of a segment take."""
    return padded(length, TILE_COLUMNS)


def head_runs(
    starts: Sequence[int], num_heads: int, row_bytes: int, most_bytes: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield lists of heads of segments, (first row, length, head), that fit into ``most_bytes``.

    One that does not is a list of its own.
    """
    run: list[tuple[int, int, int]] = []
    size = 0
    for start, end in pairwise(starts):
        own = padded_length(end - start) * row_bytes
        for head in range(num_heads if end > start else 0):
            if run and size + own > most_bytes:
                yield run
                run, size = [], 0
            run.append((start, end - start, head))
            size += own
    if run:
        yield run


def _table(run: list[tuple[int, int, int]], step: int) -> np.ndarray:
    """Return the table of tasks of ``step`` rows each."""
    rows, packed = [], 0
    for start, length, head in run:
        rows += [(start, length, packed, head, first) for first in range(0, length, step)]
        packed += padded_length(length)
    return np.array(rows, np.int64)


def _packed_rows(table: np.ndarray) -> int:
    """Return the rows that the packed keys of a run take."""
    return int(table[-1, PACKED]) + padded_length(int(table[-1, LENGTH]))


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Sequence[int], scale: float
) -> torch.Tensor:
    """Compute ``reference.varlen_attention`` for tensors that ``fits`` accepts."""
    _, num_heads, dim = q.shape
    wide, out, num_threads = padded(dim), q.new_empty(q.shape), torch.get_num_threads()
    pack_segments, attend = kernel(build_pack, q.dtype), kernel(build_attend, q.dtype)
    size = padded(scratch_floats(dim))
    scratch = torch.empty(size * num_threads)
    most = PACKED_BYTES * num_threads
    runs = _runs(tuple(cu_seqlens), num_heads, (dim + wide) * 4, most)
    rows = max((_packed_rows(attending) for _, attending in runs), default=0)
    keys, values = torch.empty(rows * dim), torch.empty(rows * wide)
    for packing, attending in runs:
        weight = 2 * dim * int(attending[:, LENGTH].sum()) * QUERY_ROWS
        args = pack(
            len(packing),
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            k.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            packing.ctypes.data,
            dim,
            wide,
        )
        pack_segments.for_weight(weight)(args)
        args = pack(
            len(attending),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            attending.ctypes.data,
            dim,
            wide,
            num_heads,
            out.data_ptr(),
            float_bits(scale / math.log(2)),
            scratch.data_ptr(),
            size,
        )
        attend.for_weight(weight, num_threads)(args)
    return out
