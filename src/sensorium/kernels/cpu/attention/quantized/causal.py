"""Paged attention over a KV cache in int8, for decoding and prefill.

Pieces, tasks and parts are those of ``attention.causal``. In a chunk, integer products of queries
in 16 bits with keys in 8 give exact sums. They become scores by three factors: of query, key, and
the softmax. The weights that the softmax makes of them, times the scales of their tokens'
values, are rounded to 16 bits again, relative to the largest of the row in the chunk, and
multiplied with the values.

All of that depends on the row and the chunk alone, and rows attend to what the cache holds, even to
keys and values of their own step. So a row has the same bits in every step, and however its prompt
was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from sensorium.kernels.cpu import rotary
from sensorium.kernels.cpu.attention.quantized.codes import (
    padded,
    record_sizes,
    write_pair,
    write_query,
    write_weights,
)
from sensorium.kernels.cpu.attention.quantized.pairs import (
    fetch_line,
    load_integers,
    product,
)
from sensorium.kernels.cpu.attention.softmax import (
    cap_row,
    clear_rows,
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
from sensorium.kernels.cpu.attention.tile import TILE_COLUMNS, TILE_ROWS
from sensorium.kernels.cpu.numeric import (
    INLINE,
    OUTLINE,
    WIDTH,
    as_float,
    exp1,
    f32,
    fetch_add,
    fma,
    load16,
    load_part,
    njit,
    outlined,
    pointer,
    recast,
    shifted,
    splat,
    store16,
    store_part,
)

MARK = "_int8"
CHUNK = PART_TOKENS
"""Tokens whose scores are held at once. Sums of weights and values over them fit int32."""


def scratch_floats(num_rows: int, head_dim: int) -> int:
    """Return the scratch size of one thread, in float32, whose tasks have ``num_rows`` rows.

    It holds: three rows of a head; the scales of a chunk; of all rows the factors, queries, scores,
    weights, integer sums, and twice sums, peaks and totals.
    """
    width = -(-head_dim // WIDTH) * WIDTH
    rows = 2 + width // 2 + CHUNK + CHUNK // 2 + width + 2 * (head_dim + 2)
    return 3 * width + 2 * CHUNK + num_rows * rows


@njit(**OUTLINE)
def read_scales(
    k_cache: Any,
    v_cache: Any,
    table: Any,
    places: Any,
    dim: Any,
    start: Any,
    first: Any,
    count: Any,
    end: Any,
    block_size: Any,
    k_scales: Any,
    v_scales: Any,
) -> None:
    """Read the scales of the tokens from ``start`` on into the columns [first, count).

    Those of the next chunk are prefetched. ``places``: as for ``score_chunk``.
    """
    key_codes, _, value_codes, _ = record_sizes(dim, block_size)
    for column in range(first, count, WIDTH):
        token = start + column
        block, offset = types.int64(table[token // block_size]), token % block_size
        keys = shifted(k_cache, block * places[0] + places[1] + key_codes)
        values = shifted(v_cache, block * places[2] + places[3] + value_codes)
        store16(k_scales, column, load16(recast(keys, types.uint16), offset))
        store16(v_scales, column, load16(recast(values, types.uint16), offset))
        later = types.int64(table[min(token + CHUNK, end - 1) // block_size])
        fetch_line(k_cache, later * places[0] + places[1] + key_codes + 2 * offset)
        fetch_line(v_cache, later * places[2] + places[3] + value_codes + 2 * offset)


@njit(**OUTLINE)
def score_chunk(
    q: Any,
    rows: Any,
    dim: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    places: Any,
    start: Any,
    first: Any,
    count: Any,
    block_size: Any,
    scores: Any,
) -> None:
    """Compute scores (rows, CHUNK) int32 = q (rows, D) int16 times the keys from ``start`` on.

    Columns [first, count) are computed, in whole steps: ``first`` is a multiple of TILE_COLUMNS,
    and columns from ``count`` on hold arbitrary values. places: in bytes, stride of a block and
    offset of the head within it, of keys and of values.
    """
    width, depth = padded(dim, WIDTH), padded(dim, 2) // 2
    step = TILE_COLUMNS if block_size % TILE_COLUMNS == 0 else WIDTH
    for column in range(first, count, step):
        token = start + column
        block, offset = types.int64(table[token // block_size]), token % block_size
        keys = shifted(k_cache, block * places[0] + places[1] + 2 * offset)
        values = shifted(v_cache, block * places[2] + places[3] + offset * width)
        for r in range(0, rows, TILE_ROWS):
            product(
                min(TILE_ROWS, rows - r),
                shifted(q, r * width),
                width,
                keys,
                2 * block_size,
                depth,
                shifted(scores, r * CHUNK + column),
                CHUNK,
                step,
                False,
                values,
            )


@njit(**OUTLINE)
def weigh_values(
    weights: Any,
    rows: Any,
    dim: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    places: Any,
    start: Any,
    first: Any,
    count: Any,
    end: Any,
    block_size: Any,
    sums: Any,
) -> None:
    """Compute sums (rows, D padded) int32 = weights (rows, CHUNK) int16 times values.

    The columns [first, count) belong to the tokens from ``start + first`` on; a weight behind an
    odd number of them is zero.
    """
    width, token, add = padded(dim, WIDTH), start + first, False
    while token < start + count:
        offset = token % block_size
        depth = min(block_size - offset, start + count - token)
        block = types.int64(table[token // block_size])
        later = types.int64(table[min(token + CHUNK, end - 1) // block_size])
        keys = shifted(k_cache, later * places[0] + places[1])
        values = shifted(v_cache, block * places[2] + places[3] + offset * width)
        for r in range(0, rows, TILE_ROWS):
            own = shifted(weights, r * CHUNK + token - start)
            d = 0
            while d < width:
                columns = TILE_COLUMNS if width - d >= TILE_COLUMNS else WIDTH
                product(
                    min(TILE_ROWS, rows - r),
                    own,
                    CHUNK,
                    shifted(values, 2 * d),
                    2 * width,
                    (depth + 1) // 2,
                    shifted(sums, r * width + d),
                    width,
                    columns,
                    add,
                    shifted(keys, d * depth),
                )
                d += columns
        add = True
        token += depth


@njit(**INLINE)
def scale_scores(scores: Any, k_scales: Any, first: Any, count: Any, factor: Any) -> None:
    """Turn the columns [first, count) of a row of int32 into float32 scores in the same memory."""
    out = recast(scores, types.float32)
    for j in range(first, count, WIDTH):
        scaled = load_integers(scores, j) * load16(k_scales, j)
        store16(out, j, scaled * splat(factor))


@njit(**INLINE)
def add_sums(whole: Any, dim: Any, factor: Any, sums: Any) -> None:
    """Add a row of int32 (D), times ``factor``, to ``sums`` (D) float32."""
    wide, full = splat(factor), dim - dim % WIDTH
    for d in range(0, full, WIDTH):
        store16(sums, d, fma(load_integers(whole, d), wide, load16(sums, d)))
    if full < dim:
        rest = dim - full
        held = load_part(sums, full, rest)
        store_part(sums, full, fma(load_integers(whole, full), wide, held), rest)


def build_rope_write(element: Any) -> Callable[[Any], None]:
    """Build ``rotary.build_rope_write`` for this cache."""
    return rotary.build_rope_write(element, MARK, write_pair)


def build_attend(element: Any) -> Callable[[Any], None]:
    """Build the attention kernel over all pieces.

    args: those of ``attention.causal.build_attend``; the cache has the records of ``int8_cache``.
    """
    steps = build_steps(element, MARK, write_pair)
    write_new, query_row, finish = steps.write_new, steps.query_row, steps.finish

    @outlined(element, MARK)
    def fill_queries(
        args: Any, piece: Any, head: Any, group: Any, q: Any, factors: Any, scratch: Any
    ) -> None:
        """Fill Q (rows * group, D padded) int16 and the factors of its rows.

        They are rotated, and scaled by the softmax's scale and that of two transforms.
        """
        dim = args[18]
        width, scale = padded(dim, WIDTH), as_float(args[21]) / f32(dim & -dim)
        row = shifted(scratch, 2 * width)
        for i in range(piece[NUM_ROWS]):
            for g in range(group):
                query_row(args, piece, head, group, i, g, scale, row, scratch)
                r = i * group + g
                factors[r] = write_query(row, dim, shifted(q, r * width))

    @outlined(element, MARK)
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

        work: scales of a chunk's keys and values, factors of queries and of weights, queries,
        scores, weights, integer sums. Results: sums (rows, D), tops and totals (rows).
        """
        k_scales, v_scales, q_factors, w_factors, q, scores, weights, whole = work
        kv_heads, dim, block_size = args[17], args[18], args[20]
        rows, width = piece[NUM_ROWS] * group, padded(dim, WIDTH)
        clear_rows(rows, dim, sums, tops, totals)
        k_cache, v_cache = pointer(args[6], types.int8), pointer(args[7], types.int8)
        table = shifted(pointer(args[8], types.int32), piece[SEQUENCE] * args[9])
        _, key_bytes, _, value_bytes = record_sizes(dim, block_size)
        keys_at, values_at = head * key_bytes, head * value_bytes
        places = (kv_heads * key_bytes, keys_at, kv_heads * value_bytes, values_at)
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
            read_scales(
                *(k_cache, v_cache, table, places, dim, start, first, count, end, block_size),
                *(k_scales, v_scales),
            )
            score_chunk(
                *(q, rows, dim, k_cache, v_cache, table, places),
                *(start, first, count, block_size, scores),
            )
            for r in range(rows):
                low, visible = 0, min(count, piece[FIRST_POS] + r // group + 1 - start)
                if args[26] != 0:
                    low = max(0, seen[r // group * 2] - start)
                    visible = min(count, seen[r // group * 2 + 1] - start)
                own_weights = shifted(weights, r * CHUNK)
                if visible <= low:
                    for j in range(first, padded(count, WIDTH)):
                        own_weights[j] = types.int16(0)
                    w_factors[r] = f32(0.0)
                    continue
                scale_scores(shifted(scores, r * CHUNK), k_scales, first, count, q_factors[r])
                row = recast(shifted(scores, r * CHUNK), types.float32)
                if cap != f32(0.0):
                    cap_row(row, low // WIDTH * WIDTH, visible, cap)
                top, part, w_factors[r] = write_weights(
                    row, v_scales, first, low, visible, count, tops[r], own_weights
                )
                fade = exp1(tops[r] - top)
                totals[r] = totals[r] * fade + part
                if fade != f32(1.0):
                    scale_sums(shifted(sums, r * dim), dim, fade)
                tops[r] = top
            weigh_values(
                *(weights, rows, dim, k_cache, v_cache, table, places),
                *(start, first, count, end, block_size, whole),
            )
            for r in range(rows):
                if w_factors[r] != f32(0.0):
                    own_sums = shifted(sums, r * dim)
                    add_sums(shifted(whole, r * width), dim, w_factors[r], own_sums)

    run_parts = build_run_parts(element, MARK, run_part)

    def attend_int8(args: Any) -> None:
        heads, kv_heads, dim = args[16], args[17], args[18]
        group, width = heads // kv_heads, padded(dim, WIDTH)
        slot = fetch_add(args, 1, 1)
        small = shifted(pointer(args[14], types.float32), slot * args[15])
        k_scales = shifted(small, 3 * width)
        v_scales = shifted(k_scales, CHUNK)
        q_factors = shifted(v_scales, CHUNK)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            piece = shifted(pointer(args[10], types.int64), task // kv_heads * PIECE_COLUMNS)
            head = task % kv_heads
            rows = piece[NUM_ROWS] * group
            w_factors = shifted(q_factors, rows)
            q = recast(shifted(w_factors, rows), types.int16)
            scores = recast(shifted(q, rows * width), types.int32)
            weights = recast(shifted(scores, rows * CHUNK), types.int16)
            whole = recast(shifted(weights, rows * CHUNK), types.int32)
            sums = recast(shifted(whole, rows * width), types.float32)
            tops = shifted(sums, rows * dim)
            totals = shifted(tops, rows)
            if piece[FRESH] != 0 and piece[BEGIN] <= piece[FIRST_POS] < piece[END]:
                write_new(args, piece, head, small)
            fill_queries(args, piece, head, group, q, q_factors, small)
            work = (k_scales, v_scales, q_factors, w_factors, q, scores, weights, whole)
            run_parts(args, piece, head, group, work, sums, tops, totals)
            finish(args, piece, head, group, sums, tops, totals, small)

    return attend_int8
