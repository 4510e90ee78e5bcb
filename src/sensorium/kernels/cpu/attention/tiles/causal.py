"""Paged attention of query rows in bf16 with matrix tiles, for decoding and prefill.

Pieces, tasks and parts are those of ``causal``. Each part of 256 tokens is one block: its keys and
values are packed for the tiles once for all rows of the task, and each 32 rows take their scores,
one softmax to the base 2, and their weighted values from it. Parts are merged in order.

A row has the same bits however its step is made up. Queries and weights are rounded to bf16, and
products have the order of sums that tiles have (``amx``). Tasks of few rows take the same sums in
vectors (``pairs``), straight from the cache. Where a CPU's tiles differ from the manual in the last
bit, all rows go through the tiles (``tile_check``). Denormal numbers are flushed, as tiles do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.amx import BLOCK, DEPTH, TILE
from sensorium.kernels.cpu.attention.softmax import cap_row, clear_rows, merge_part, scale_sums
from sensorium.kernels.cpu.attention.steps import (
    BEGIN,
    END,
    FIRST_POS,
    FIRST_ROW,
    FRESH,
    NUM_ROWS,
    PART_TOKENS,
    PIECE_COLUMNS,
    SEQUENCE,
    build_steps,
)
from sensorium.kernels.cpu.attention.tiles.packing import pack_keys, pack_values
from sensorium.kernels.cpu.attention.tiles.pairs import (
    SCORE_STRIDE,
    WEIGHT_STRIDE,
    score_pairs,
    weigh_pairs,
)
from sensorium.kernels.cpu.attention.tiles.softmax import part_weights, up
from sensorium.kernels.cpu.denormals import flush_denormals, restore_denormals
from sensorium.kernels.cpu.numeric import (
    OUTLINE,
    WIDTH,
    as_float,
    f32,
    fetch_add,
    load16,
    njit,
    outlined,
    pointer,
    recast,
    shifted,
    splat,
    store16,
)

MATRIX_ROWS = 256
"""Most query rows times group size of a task: packing costs as much as some of them."""
FEW_ROWS = 16
"""Rows of a task from which on it takes the tiles."""
MAX_HEAD_DIM = 256
PER_LN_2 = f32(1 / math.log(2))


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel is written for such heads."""
    return dtype == torch.bfloat16 and head_dim % TILE == 0 and head_dim <= MAX_HEAD_DIM


def scratch_floats(num_rows: int, head_dim: int) -> int:
    """Return the scratch size of one thread, in float32, whose tasks have ``num_rows`` rows.

    It holds: two rows of a head; scores, weights, sums, peaks and totals of 32 rows and a part; the
    part's keys and values; queries, sums, peaks and totals of all rows.
    """
    depth = -(-head_dim // DEPTH) * DEPTH
    padded = -(-num_rows // BLOCK) * BLOCK
    fixed = BLOCK * (SCORE_STRIDE + WEIGHT_STRIDE // 2 + head_dim + 2)
    packed = PART_TOKENS * (depth + head_dim) // 2
    return 2 * head_dim + fixed + packed + padded * (depth // 2 + head_dim + 2)


@njit(**OUTLINE)
def merge_rows(
    count: Any,
    dim: Any,
    part_sums: Any,
    part_tops: Any,
    part_totals: Any,
    sums: Any,
    tops: Any,
    totals: Any,
) -> None:
    """Merge the next part of ``count`` rows; rows that saw none of its tokens have a total of 0."""
    zero = splat(f32(0.0))
    for r in range(count):
        if part_totals[r] == f32(0.0):
            continue
        own = shifted(part_sums, r * dim)
        for d in range(0, dim, WIDTH):
            # A sum that was flushed has a sign: as zero without one it is the same in any task.
            store16(own, d, load16(own, d) + zero)
        tops[r], totals[r] = merge_part(
            own, part_tops[r], part_totals[r], shifted(sums, r * dim), tops[r], totals[r], dim
        )


def _build_queries(element: Any, mark: str, query_row: Any) -> Any:
    """Build ``fill_queries``; query_row: that of ``build_steps``."""

    @outlined(element, mark)
    def fill_queries(args: Any, piece: Any, head: Any, group: Any, q: Any, scratch: Any) -> None:
        """Fill Q (rows * group, depth) with the piece's rotated queries for one KV head."""
        dim = args[18]
        depth = up(dim, DEPTH)
        for i in range(piece[NUM_ROWS]):
            for g in range(group):
                out = shifted(q, (i * group + g) * depth)
                query_row(args, piece, head, group, i, g, f32(1.0), out, scratch)
                for d in range(dim, depth):
                    out[d] = types.uint16(0)

    return fill_queries


def _build_view(element: Any, mark: str) -> Any:
    """Build ``seen_by``."""

    @outlined(element, mark)
    def seen_by(args: Any, piece: Any, first: Any, last: Any) -> Any:
        """Return begin and end of the tokens that any of the piece's query rows [first, last] sees.

        Rows see an interval each.
        """
        if args[26] == 0:
            return 0, piece[FIRST_POS] + last + 1
        seen = shifted(pointer(args[26], types.int64), piece[FIRST_ROW] * 2)
        low, high = seen[2 * first], seen[2 * first + 1]
        for i in range(first + 1, last + 1):
            low, high = min(low, seen[2 * i]), max(high, seen[2 * i + 1])
        return low, high

    return seen_by


def _build_packing(element: Any, mark: str) -> Any:
    """Build ``pack_part``."""

    @outlined(element, mark)
    def pack_part(
        args: Any,
        piece: Any,
        head: Any,
        first: Any,
        last: Any,
        begin: Any,
        end: Any,
        keys: Any,
        values: Any,
    ) -> None:
        """Pack keys and values of the columns [first, last) from token ``begin`` on."""
        kv_heads, dim, block_size = args[17], args[18], args[20]
        table = shifted(pointer(args[8], types.int32), piece[SEQUENCE] * args[9])
        head_at = (kv_heads * dim * block_size, head * dim * block_size)
        k_cache, v_cache = pointer(args[6], element), pointer(args[7], element)
        half_depth = up(dim, DEPTH) // 2
        for column in range(first, last, BLOCK):
            place = (table, head_at, dim, block_size, begin + column, end)
            pack_keys(*(k_cache,), *place, *(shifted(keys, column * half_depth),))
            pack_values(*(v_cache,), *place, *(shifted(values, column // 2 * dim),))

    return pack_part


def _build_products(element: Any, mark: str, unit: amx.Unit) -> tuple[Any, Any]:
    """Build ``score_tiles`` and ``weigh_tiles``."""
    multiply_block = amx.block_product(unit)

    @outlined(element, mark)
    def score_tiles(
        state: Any, q: Any, depth: Any, first: Any, last: Any, keys: Any, scores: Any
    ) -> None:
        """Compute the scores of 32 rows for the columns [first, last)."""
        for column in range(first, last, BLOCK):
            multiply_block(
                *(state, q, depth, shifted(keys, column * depth), 2 * BLOCK, depth),
                *(shifted(scores, column), SCORE_STRIDE, True, False),
            )

    @outlined(element, mark)
    def weigh_tiles(
        state: Any, weights: Any, dim: Any, first: Any, last: Any, values: Any, sums: Any
    ) -> None:
        """Compute the weighted values of 32 rows for the columns [first, last)."""
        pairs = shifted(values, first * dim)
        for d in range(0, dim, BLOCK):
            multiply_block(
                *(state, shifted(weights, first), WEIGHT_STRIDE, shifted(pairs, 2 * d), 2 * dim),
                *(last - first, shifted(sums, d), dim, dim - d >= BLOCK, False),
            )

    return score_tiles, weigh_tiles


def _build_weights(element: Any, mark: str, seen_by: Any) -> Any:
    """Build ``weigh_rows``; seen_by: that of ``_build_view``."""

    @outlined(element, mark)
    def weigh_rows(
        args: Any,
        piece: Any,
        group: Any,
        row: Any,
        count: Any,
        begin: Any,
        end: Any,
        first: Any,
        last: Any,
        scores: Any,
        weights: Any,
        tops: Any,
        totals: Any,
    ) -> None:
        """Turn scores of ``count`` rows from ``row`` on into weights; set their tops and totals."""
        scale, cap = as_float(args[21]), as_float(args[27])
        for r in range(count):
            i = (row + r) // group
            low, high = seen_by(args, piece, i, i)
            low, visible = max(0, low - begin), min(end, high) - begin
            if visible <= low:
                totals[r] = f32(0.0)
                continue
            own, natural = shifted(scores, r * SCORE_STRIDE), scale
            if cap != f32(0.0):
                start = low // WIDTH * WIDTH
                scale_sums(shifted(own, start), up(visible, WIDTH) - start, scale)
                cap_row(own, start, visible, cap)
                natural = f32(1.0)
            top, total = part_weights(
                own,
                first,
                low,
                visible,
                last,
                natural * PER_LN_2,
                shifted(weights, r * WEIGHT_STRIDE),
            )
            tops[r], totals[r] = top * natural, total

    return weigh_rows


def _build_part(element: Any, mark: str, unit: amx.Unit) -> Any:
    """Build ``run_part``."""
    seen_by, pack_part = _build_view(element, mark), _build_packing(element, mark)
    score_tiles, weigh_tiles = _build_products(element, mark, unit)
    weigh_rows = _build_weights(element, mark, seen_by)

    @outlined(element, mark)
    def run_part(
        args: Any,
        piece: Any,
        head: Any,
        group: Any,
        begin: Any,
        state: Any,
        scores: Any,
        q: Any,
        sums: Any,
        tops: Any,
        totals: Any,
    ) -> None:
        """Compute a part of all rows and merge it into sums (rows, D), tops and totals."""
        kv_heads, dim, block_size = args[17], args[18], args[20]
        depth, rows, end = (
            up(dim, DEPTH),
            piece[NUM_ROWS] * group,
            min(begin + PART_TOKENS, piece[END]),
        )
        weights = recast(shifted(scores, BLOCK * SCORE_STRIDE), element)
        part_sums = shifted(scores, BLOCK * (SCORE_STRIDE + WEIGHT_STRIDE // 2))
        part_tops = shifted(part_sums, BLOCK * dim)
        part_totals = shifted(part_tops, BLOCK)
        keys = recast(shifted(part_totals, BLOCK), element)
        values = shifted(keys, PART_TOKENS * depth)
        table = shifted(pointer(args[8], types.int32), piece[SEQUENCE] * args[9])
        head_at = (kv_heads * dim * block_size, head * dim * block_size)
        k_cache, v_cache = pointer(args[6], element), pointer(args[7], element)
        few = rows < args[29]
        if not few:
            low, high = seen_by(args, piece, 0, piece[NUM_ROWS] - 1)
            first = max(0, low - begin) // BLOCK * BLOCK
            last = up(max(0, min(end, high) - begin), BLOCK)
            pack_part(
                *(args, piece, head, first, last, begin, end),
                *(recast(keys, types.uint32), recast(values, types.uint32)),
            )
        for row in range(0, rows, BLOCK):
            count = min(BLOCK, rows - row)
            low, high = seen_by(args, piece, row // group, (row + count - 1) // group)
            first = max(0, low - begin) // BLOCK * BLOCK
            last = up(max(0, min(end, high) - begin), BLOCK)
            if last <= first:
                continue
            own_q = shifted(q, row * depth)
            caches = (k_cache, v_cache, table, head_at, begin, first, last, end, block_size)
            if few:
                score_pairs(*(own_q, count, dim), *caches, *(scores,))
            else:
                score_tiles(state, own_q, depth, first, last, keys, scores)
            weigh_rows(
                *(args, piece, group, row, count, begin, end, first, last),
                *(scores, weights, part_tops, part_totals),
            )
            if few:
                weigh_pairs(*(weights, count, dim), *caches, *(part_sums,))
            else:
                weigh_tiles(state, weights, dim, first, last, values, part_sums)
            merge_rows(
                *(count, dim, part_sums, part_tops, part_totals),
                *(shifted(sums, row * dim), shifted(tops, row), shifted(totals, row)),
            )

    return run_part


def build_attend(element: Any, unit: amx.Unit) -> Callable[[Any], None]:
    """Build the attention kernel over all pieces, for bf16.

    args: those of ``causal.build_attend``, then the number of rows of a task from which on it takes
    the tiles.
    """
    mark = f"_{unit.name}"
    write_new, query_row, finish = build_steps(element, mark)
    fill_queries = _build_queries(element, mark, query_row)
    run_part = _build_part(element, mark, unit)
    tiles = amx.operations(unit, amx.full_tiles())
    own_state, configure, release = tiles.state, tiles.configure, tiles.release

    def attend_with_tiles(args: Any) -> None:
        heads, kv_heads, dim = args[16], args[17], args[18]
        group, depth = heads // kv_heads, up(dim, DEPTH)
        slot = fetch_add(args, 1, 1)
        small = shifted(pointer(args[14], types.float32), slot * args[15])
        scores = shifted(small, 2 * dim)
        fixed = BLOCK * (SCORE_STRIDE + WEIGHT_STRIDE // 2 + dim + 2)
        behind = shifted(scores, fixed + PART_TOKENS * (depth + dim) // 2)
        q = recast(behind, element)
        state = own_state()
        before = flush_denormals()
        configure(state)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            piece = shifted(pointer(args[10], types.int64), task // kv_heads * PIECE_COLUMNS)
            head = task % kv_heads
            rows = piece[NUM_ROWS] * group
            sums = shifted(behind, up(rows, BLOCK) * depth // 2)
            tops = shifted(sums, up(rows, BLOCK) * dim)
            totals = shifted(tops, up(rows, BLOCK))
            if piece[FRESH] != 0 and piece[BEGIN] <= piece[FIRST_POS] < piece[END]:
                write_new(args, piece, head, small)
            fill_queries(args, piece, head, group, q, small)
            clear_rows(rows, dim, sums, tops, totals)
            for begin in range(piece[BEGIN], piece[END], PART_TOKENS):
                run_part(args, piece, head, group, begin, state, scores, q, sums, tops, totals)
            finish(args, piece, head, group, sums, tops, totals, small)
        release(state)
        restore_denormals(before)

    attend_with_tiles.__qualname__ += mark
    return attend_with_tiles
