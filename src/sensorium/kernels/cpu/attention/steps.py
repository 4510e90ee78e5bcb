"""Steps that the kernels of paged attention share, and the table of pieces that they work by."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from sensorium.kernels.cpu.attention.softmax import HIDDEN_SCORE, clear_rows, merge_part
from sensorium.kernels.cpu.numeric import (
    as_float,
    exp1,
    f32,
    fetch_add,
    load,
    outlined,
    pointer,
    shifted,
    store,
)
from sensorium.kernels.cpu.rotary import (
    convert_row,
    normed_head,
    rotate_head,
    write_pair,
)

PART_TOKENS = 256
"""Tokens of a part. Merging shorter ones would cost more than they save in waiting."""

# Columns of the table of pieces (int64).
SEQUENCE, FIRST_ROW, NUM_ROWS, FIRST_POS, BEGIN, END, PART, NUM_PARTS, PARTIAL, DONE, FRESH = range(
    11
)
PIECE_COLUMNS = 11


class Steps(NamedTuple):
    """Functions for a kernel's code; args are those of ``causal.build_attend``."""

    write_new: Any
    """``write_new(args, piece, head, scratch)``"""
    query_row: Any
    """``query_row(args, piece, head, group, i, g, scale, out, scratch)``"""
    finish: Any
    """``finish(args, piece, head, group, sums, tops, totals, row_out)``"""


def build_steps(element: Any, mark: str = "", write_pair: Any = write_pair) -> Steps:
    """Build the steps for one element type.

    ``mark`` tells kernels apart, as in ``outlined``; ``write_pair`` stores a key and a value.
    """

    @outlined(element, mark)
    def write_new(args: Any, piece: Any, head: Any, scratch: Any) -> None:
        """Rotate and write the key and the value of a decoding sequence's new token."""
        heads, kv_heads, dim, half, block_size = args[16], args[17], args[18], args[19], args[20]
        row, position = piece[FIRST_ROW], piece[FIRST_POS]
        source = shifted(pointer(args[3], element), row * (heads + 2 * kv_heads) * dim)
        key = shifted(source, (heads + head) * dim)
        cos = shifted(pointer(args[4], types.float32), row * half)
        sin = shifted(pointer(args[5], types.float32), row * half)
        rotated = shifted(scratch, dim)
        normed_head(
            key, pointer(args[23], element), args[23] != 0, as_float(args[24]), dim, scratch
        )
        rotate_head(scratch, cos, sin, half, dim, f32(1.0), rotated)
        table = shifted(pointer(args[8], types.int32), piece[SEQUENCE] * args[9])
        index = types.int64(table[position // block_size]) * kv_heads + head
        value = shifted(key, kv_heads * dim)
        place = (index, position % block_size, block_size)
        write_pair(rotated, value, dim, args[6], args[7], place)

    @outlined(element, mark)
    def query_row(
        args: Any,
        piece: Any,
        head: Any,
        group: Any,
        i: Any,
        g: Any,
        scale: Any,
        out: Any,
        scratch: Any,
    ) -> None:
        """Fill ``out`` (D,) with head g of the group in row i of the piece, rotated and scaled.

        scratch: 2 D float32.
        """
        heads, kv_heads, dim, half = args[16], args[17], args[18], args[19]
        row = piece[FIRST_ROW] + i
        if piece[FRESH] == 0:
            at = (row * heads + head * group + g) * dim
            convert_row(shifted(pointer(args[25], types.float32), at), dim, scale, out)
            return
        at = row * (heads + 2 * kv_heads) * dim + (head * group + g) * dim
        cos = shifted(pointer(args[4], types.float32), row * half)
        sin = shifted(pointer(args[5], types.float32), row * half)
        source, norm = shifted(pointer(args[3], element), at), pointer(args[22], element)
        normed_head(source, norm, args[22] != 0, as_float(args[24]), dim, scratch)
        # Rotated and scaled one after the other, as the rows of a span are.
        rotated = shifted(scratch, dim)
        rotate_head(scratch, cos, sin, half, dim, f32(1.0), rotated)
        convert_row(rotated, dim, scale, out)

    @outlined(element, mark)
    def share_of(args: Any, head: Any, top: Any, total: Any) -> Any:
        """Return the factor of a row's sums: 1 / total, with the head's sink as a further score."""
        if args[28] == 0:
            return f32(1.0) / total
        sink = pointer(args[28], types.float32)[head]
        new_top = max(top, sink)
        kept = exp1(top - new_top)
        return kept / (total * kept + exp1(sink - new_top))

    @outlined(element, mark)
    def finish(
        args: Any,
        piece: Any,
        head: Any,
        group: Any,
        sums: Any,
        tops: Any,
        totals: Any,
        row_out: Any,
    ) -> None:
        """Write the outputs of the piece's rows, or store a part's result.

        The thread that stores the last part merges all of them.
        """
        heads, kv_heads, dim = args[16], args[17], args[18]
        out = pointer(args[11], element)
        rows, num_parts = piece[NUM_ROWS] * group, piece[NUM_PARTS]
        first = (piece[FIRST_ROW] * heads + head * group) * dim
        if num_parts == 1:
            for r in range(rows):
                at = first + (r // group * heads + r % group) * dim
                share = share_of(args, head * group + r % group, tops[r], totals[r])
                convert_row(shifted(sums, r * dim), dim, share, shifted(out, at))
            return
        size = rows * (dim + 2)
        stride = size * kv_heads
        partials = shifted(
            pointer(args[12], types.float32), piece[PARTIAL] * kv_heads * group * (dim + 2)
        )
        partials = shifted(partials, head * size)
        own = shifted(partials, piece[PART] * stride)
        convert_row(sums, rows * dim, f32(1.0), own)
        for r in range(rows):
            store(own, rows * dim + r, tops[r])
            store(own, rows * dim + rows + r, totals[r])
        done = pointer(args[13], types.int64)
        place = piece[DONE] * kv_heads + head
        if fetch_add(done, place, 1) != num_parts - 1:
            return
        done[place] = 0
        for r in range(rows):
            top, summed = HIDDEN_SCORE, f32(0.0)
            for d in range(dim):
                row_out[d] = f32(0.0)
            for index in range(num_parts):
                part = shifted(partials, index * stride)
                part_top = load(part, rows * dim + r)
                part_total = load(part, rows * dim + rows + r)
                top, summed = merge_part(
                    shifted(part, r * dim), part_top, part_total, row_out, top, summed, dim
                )
            at = first + (r // group * heads + r % group) * dim
            share = share_of(args, head * group + r % group, top, summed)
            convert_row(row_out, dim, share, shifted(out, at))

    return Steps(write_new, query_row, finish)


def build_run_parts(element: Any, mark: str, run_part: Any) -> Any:
    """Build ``run_parts(args, piece, head, group, work, sums, tops, totals)``.

    It calls ``run_part(args, piece, head, group, work, begin, end, sums, tops, totals)`` for each
    part of the piece and merges the parts in order. ``work``: what ``run_part`` wants. Behind the
    totals (rows) there is as much scratch again as for sums, tops and totals.
    """

    @outlined(element, mark)
    def run_parts(
        args: Any, piece: Any, head: Any, group: Any, work: Any, sums: Any, tops: Any, totals: Any
    ) -> None:
        """Run ``run_part`` for all parts of the piece and merge them in order."""
        begin, end, dim = piece[BEGIN], piece[END], args[18]
        if end - begin <= PART_TOKENS:
            run_part(args, piece, head, group, work, begin, end, sums, tops, totals)
            return
        rows = piece[NUM_ROWS] * group
        own_sums = shifted(totals, rows)
        own_tops = shifted(own_sums, rows * dim)
        own_totals = shifted(own_tops, rows)
        clear_rows(rows, dim, sums, tops, totals)
        for start in range(begin, end, PART_TOKENS):
            stop = min(start + PART_TOKENS, end)
            run_part(args, piece, head, group, work, start, stop, own_sums, own_tops, own_totals)
            for r in range(rows):
                own, kept = shifted(own_sums, r * dim), shifted(sums, r * dim)
                tops[r], totals[r] = merge_part(
                    own, own_tops[r], own_totals[r], kept, tops[r], totals[r], dim
                )

    return run_parts
