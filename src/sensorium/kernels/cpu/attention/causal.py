"""Paged attention of query rows to the cached tokens of their sequence, for decoding and prefill.

A *piece* is a run of a sequence's query rows; a task is a piece and one KV head. Within a task the
query heads of the KV head (and the query rows) are the rows of a small matrix, and the tokens are
processed in chunks: scores, online softmax, weighted values, each through ``multiply_tile``.

A row attends to an interval of tokens: all up to its own, or, with a sliding window or within a
bidirectional span, those that a table gives. Tokens that no row of a task attends to are not read.

A row's result has the same bits however its step is made up. Its tokens are cut into *parts* of
``PART_TOKENS``, counted from the first token of the sequence; each part has an online softmax of
its own, and parts are merged in order. A task computes all parts of its rows, or, where there are
few rows and many tokens, a single one: then the parts store their results, and the thread that
finishes the last one merges them, in the same order. Chunks, too, are counted from the first token.
What a row does not attend to has a weight of zero, and a part without any of its tokens leaves the
merged result as it is, so both may be skipped or computed.

For decoding a task also rotates its queries, and the task whose part holds the new token first
writes its key and value. Spans are rotated and written beforehand (``rotary``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from sensorium.kernels.cpu.attention.softmax import (
    cap_row,
    clear_rows,
    online_softmax_row,
    scale_sums,
)
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
    build_run_parts,
    build_steps,
)
from sensorium.kernels.cpu.attention.tile import TILE_COLUMNS, TILE_ROWS, multiply_tile
from sensorium.kernels.cpu.numeric import (
    OUTLINE,
    WIDTH,
    as_float,
    exp1,
    f32,
    fetch_add,
    njit,
    outlined,
    pointer,
    shifted,
)

CHUNK = PART_TOKENS // 2
"""Tokens whose scores are held at once."""


def scratch_floats(num_rows: int, head_dim: int) -> int:
    """Return the float32 scratch size of one thread whose tasks have ``num_rows`` rows.

    It holds Q, scores, and twice sums, peaks and totals.
    """
    return num_rows * (3 * head_dim + CHUNK + 4) + 2 * head_dim


@njit(**OUTLINE)
def score_chunk(
    q: Any,
    rows: Any,
    dim: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    head_at: Any,
    start: Any,
    first: Any,
    count: Any,
    block_size: Any,
    scores: Any,
) -> None:
    """Compute scores (rows, CHUNK) = q (rows, dim) times the keys of tokens from ``start`` on.

    Columns [first, count) are computed, in whole steps: ``first`` is a multiple of TILE_COLUMNS,
    and columns from ``count`` on hold arbitrary values. head_at: (stride of a block, offset of the
    head within it) in elements.
    """
    step = TILE_COLUMNS if block_size % TILE_COLUMNS == 0 else WIDTH
    for column in range(first, count, step):
        token = start + column
        block = types.int64(table[token // block_size])
        offset = token % block_size
        place = block * head_at[0] + head_at[1]
        values = shifted(v_cache, place + offset * dim)
        keys = shifted(k_cache, place + offset)
        for r in range(0, rows, TILE_ROWS):
            multiply_tile(
                min(TILE_ROWS, rows - r),
                shifted(q, r * dim),
                dim,
                keys,
                block_size,
                dim,
                shifted(scores, r * CHUNK + column),
                CHUNK,
                step,
                False,
                values,
            )


@njit(**OUTLINE)
def add_weighted_values(
    scores: Any,
    rows: Any,
    dim: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    head_at: Any,
    start: Any,
    first: Any,
    count: Any,
    end: Any,
    block_size: Any,
    sums: Any,
) -> None:
    """Add scores (rows, CHUNK) times values to ``sums`` (rows, dim).

    The columns [first, count) belong to the tokens from ``start + first`` on.
    """
    token = start + first
    while token < start + count:
        offset = token % block_size
        depth = min(block_size - offset, start + count - token)
        block = types.int64(table[token // block_size])
        later = types.int64(table[min(token + CHUNK, end - 1) // block_size])
        keys = shifted(k_cache, later * head_at[0] + head_at[1])
        values = shifted(v_cache, block * head_at[0] + head_at[1] + offset * dim)
        for r in range(0, rows, TILE_ROWS):
            weights = shifted(scores, r * CHUNK + token - start)
            d = 0
            while d < dim:
                width = TILE_COLUMNS if dim - d >= TILE_COLUMNS else min(WIDTH, dim - d)
                multiply_tile(
                    min(TILE_ROWS, rows - r),
                    weights,
                    CHUNK,
                    shifted(values, d),
                    dim,
                    depth,
                    shifted(sums, r * dim + d),
                    dim,
                    width,
                    True,
                    shifted(keys, d * depth),
                )
                d += width
        token += depth


def build_attend(element: Any) -> Callable[[Any], None]:
    """Build the attention kernel over all pieces.

    args: qkv (T, C), cos, sin, k_cache, v_cache, block_table (int32), its row stride, pieces
    (int64), out, partials (float32), done (int64, zeros; left at zero), scratch (float32), its
    stride, heads, KV heads, D, half of the rotary dimensions, block size, scale, q_norm (0: none),
    k_norm, eps, q_rotated (T, heads, D) float32 of spans, seen (T, 2) int64 (0: causal), cap of the
    scores (0: none), sinks (heads,) float32 (0: none). seen: first index and end of the tokens that
    a row attends to. The number of tasks is pieces times KV heads.
    """
    steps = build_steps(element)
    write_new, query_row, finish = steps.write_new, steps.query_row, steps.finish

    @outlined(element)
    def fill_queries(args: Any, piece: Any, head: Any, group: Any, q: Any, scratch: Any) -> None:
        """Fill Q (rows * group, D) float32 with the piece's queries for one KV head.

        They are rotated and scaled.
        """
        dim, scale = args[18], as_float(args[21])
        for i in range(piece[NUM_ROWS]):
            for g in range(group):
                out = shifted(q, (i * group + g) * dim)
                query_row(args, piece, head, group, i, g, scale, out, scratch)

    @outlined(element)
    def run_part(
        args: Any,
        piece: Any,
        head: Any,
        group: Any,
        work: Any,
        begin: Any,
        end: Any,
        sums: Any,
        tops: Any,
        totals: Any,
    ) -> None:
        """Run the online softmax over the tokens [begin, end) of a part.

        work: queries and scores. Results: sums (rows, D), tops and totals (rows).
        """
        q, scores = work
        kv_heads, dim, block_size = args[17], args[18], args[20]
        rows = piece[NUM_ROWS] * group
        clear_rows(rows, dim, sums, tops, totals)
        k_cache, v_cache = pointer(args[6], element), pointer(args[7], element)
        table = shifted(pointer(args[8], types.int32), piece[SEQUENCE] * args[9])
        head_at = (kv_heads * dim * block_size, head * dim * block_size)
        seen = shifted(pointer(args[26], types.int64), piece[FIRST_ROW] * 2)
        cap = as_float(args[27])
        lowest = 0
        if args[26] != 0:
            lowest = seen[0]
            for i in range(1, piece[NUM_ROWS]):
                lowest = min(lowest, seen[2 * i])
            lowest = lowest // TILE_COLUMNS * TILE_COLUMNS
        for start in range(begin, end, CHUNK):
            count = min(CHUNK, end - start)
            first = max(0, lowest - start)
            if first >= count:
                continue
            score_chunk(
                *(q, rows, dim, k_cache, v_cache, table, head_at),
                *(start, first, count, block_size, scores),
            )
            for r in range(rows):
                low, visible = 0, min(count, piece[FIRST_POS] + r // group + 1 - start)
                if args[26] != 0:
                    low = max(0, seen[r // group * 2] - start)
                    visible = min(count, seen[r // group * 2 + 1] - start)
                row = shifted(scores, r * CHUNK)
                if visible <= low:
                    for j in range(first, count):
                        row[j] = f32(0.0)
                    continue
                if cap != f32(0.0):
                    cap_row(row, low // WIDTH * WIDTH, visible, cap)
                top, part = online_softmax_row(row, first, low, visible, count, tops[r])
                fade = exp1(tops[r] - top)
                totals[r] = totals[r] * fade + part
                if fade != f32(1.0):
                    scale_sums(shifted(sums, r * dim), dim, fade)
                tops[r] = top
            add_weighted_values(
                *(scores, rows, dim, k_cache, v_cache, table, head_at),
                *(start, first, count, end, block_size, sums),
            )

    run_parts = build_run_parts(element, "", run_part)

    def attend(args: Any) -> None:
        heads, kv_heads, dim = args[16], args[17], args[18]
        group = heads // kv_heads
        slot = fetch_add(args, 1, 1)
        small = shifted(pointer(args[14], types.float32), slot * args[15])
        q = shifted(small, 2 * dim)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            piece = shifted(pointer(args[10], types.int64), task // kv_heads * PIECE_COLUMNS)
            head = task % kv_heads
            rows = piece[NUM_ROWS] * group
            scores = shifted(q, rows * dim)
            sums = shifted(scores, rows * CHUNK)
            tops = shifted(sums, rows * dim)
            totals = shifted(tops, rows)
            if piece[FRESH] != 0 and piece[BEGIN] <= piece[FIRST_POS] < piece[END]:
                write_new(args, piece, head, small)
            fill_queries(args, piece, head, group, q, small)
            run_parts(args, piece, head, group, (q, scores), sums, tops, totals)
            finish(args, piece, head, group, sums, tops, totals, small)

    return attend
