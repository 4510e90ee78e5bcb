"""The attention of a decode step moved on to the next one, in place.

From one step of the same sequences to the next, each has one token more. As long as that makes no
further part, and no window leaves tokens behind, the plan of attention differs in two numbers of
each piece, and all addresses stay: a captured step needs no new arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from numba import types

from sensorium.kernels.batch import AttentionBatch
from sensorium.kernels.cpu.attention.paged import AttentionPlan
from sensorium.kernels.cpu.attention.steps import END, FIRST_POS, PART_TOKENS, PIECE_COLUMNS
from sensorium.kernels.cpu.launch import Launcher, compile_kernel, pack
from sensorium.kernels.cpu.numeric import pointer, shifted


def build_advance() -> Callable[[Any], None]:
    """Build the kernel that moves a table of pieces on.

    args: pieces (int64), their number, numbers (int32) that grow by 1, how many.
    """

    def advance(args: Any) -> None:
        pieces, numbers = pointer(args[3], types.int64), pointer(args[5], types.int32)
        for index in range(args[4]):
            piece = shifted(pieces, index * PIECE_COLUMNS)
            if piece[END] > piece[FIRST_POS]:  # the part with the newest token
                piece[END] += 1
            piece[FIRST_POS] += 1
        for index in range(args[6]):
            numbers[index] += 1

    return advance


@functools.cache
def advance_kernel() -> Launcher:
    """Return the kernel that moves a table of pieces on, compiled or loaded at first use."""
    return compile_kernel(build_advance(), "any")


def steps_left(lengths: Iterable[int]) -> int:
    """Return the number of steps, this one with it, before a sequence begins a new part.

    lengths: tokens of each sequence with this step. A window may end the series earlier.
    """
    return min(-length % PART_TOKENS for length in lengths) + 1


def advance(batch: AttentionBatch) -> bool:
    """Make a batch that has run that of the next step; return False if it needs other plans.

    All its sequences have a single row. The caller writes the rotary factors and the new blocks. It
    changes nothing when it returns False.
    """
    if batch.num_decodes != len(batch.kv_lens) or not batch.scratch:
        return False
    if any(length % PART_TOKENS == 0 for length in batch.kv_lens):
        return False
    plans = list(batch.scratch.values())
    for plan in plans:
        if not isinstance(plan, AttentionPlan) or batch.max_kv_len >= plan.most_tokens:
            return False
    lengths, count = batch.kv_len.data_ptr(), len(batch.kv_lens)
    for plan in plans:
        advance_kernel().serial(pack(1, plan.pieces.data_ptr(), plan.num_pieces, lengths, count))
        count = 0
    batch.max_kv_len += 1
    batch.kv_lens[:] = [length + 1 for length in batch.kv_lens]
    return True
