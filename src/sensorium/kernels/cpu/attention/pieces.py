"""Pieces of a step's query rows, by which paged attention is shared between threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sensorium.kernels.batch import AttentionBatch
from sensorium.kernels.cpu.attention.steps import PART_TOKENS

MATRIX_ROWS = 64
"""Query rows times group size of one task: bounds its scratch and makes tasks of spans."""
TASKS_PER_THREAD = 4


@dataclass(slots=True)
class Span:
    """A long run of query rows of one sequence.

    ``num_rows`` rows from ``first_row``, behind ``context`` cached tokens.
    """

    sequence: int
    first_row: int
    num_rows: int
    context: int


def matrix_rows(
    query_lens: Sequence[int],
    num_kv_heads: int,
    group: int,
    num_threads: int,
    most: int,
    least: int = MATRIX_ROWS,
) -> int:
    """Return ``most`` or fewer matrix rows for a task, so that every thread has some tasks."""
    rows = most
    while rows > least:
        own = max(1, rows // group)
        tasks = num_kv_heads * sum(-(-length // own) for length in query_lens)
        if tasks >= num_threads * TASKS_PER_THREAD:
            break
        rows //= 2
    return max(rows, least)


def plan_pieces(
    batch: AttentionBatch,
    num_kv_heads: int,
    group: int,
    num_threads: int,
    limits: Sequence[int | None],
    seen: torch.Tensor | None = None,
    most_rows: int = MATRIX_ROWS,
) -> tuple[list[list[int]], list[Span], int, int]:
    """Split a step into pieces, largest first, and spans of more rows than a sequence's limit.

    ``seen``: what ``paged.seen_tokens`` returns; ``most_rows``: matrix rows of a task. Returns the
    table of pieces, the spans (which are in no
    piece), and the sizes of the partial results and of ``done``. Parts of a sequence are tasks of
    their own where it is one piece and there would be too few tasks otherwise.
    """
    query_lens, num_decodes = batch.query_lens, batch.num_decodes
    rows_of_task = max(1, most_rows // group)
    shares = [
        -(-n // rows_of_task) if limit is None or n <= limit else 0
        for n, limit in zip(query_lens, limits, strict=True)
    ]
    starts = [0, *accumulate(query_lens)]
    reach = _Reach(seen)
    extents = [
        reach(row, n, kv_len - n)
        for row, n, kv_len in zip(starts, query_lens, batch.kv_lens, strict=False)
    ]
    work = num_kv_heads * sum(
        (end - begin) * m for (begin, end), m in zip(extents, shares, strict=True)
    )
    longest = max(PART_TOKENS, work // (num_threads * TASKS_PER_THREAD))
    pieces: list[list[int]] = []
    spans: list[Span] = []
    num_partial = num_done = 0
    for sequence, (kv_len, query_len) in enumerate(zip(batch.kv_lens, query_lens, strict=True)):
        fresh, row = int(sequence < num_decodes), starts[sequence]
        begin, end = extents[sequence]
        if not shares[sequence]:
            spans.append(Span(sequence, row, query_len, kv_len - query_len))
        elif shares[sequence] == 1 and end - begin > longest:
            place = (sequence, row, query_len, kv_len - query_len)
            parts = range(begin, end, PART_TOKENS)
            for part, start in enumerate(parts):
                tail = (part, len(parts), num_partial, num_done, fresh)
                pieces.append([*place, start, min(start + PART_TOKENS, end), *tail])
            num_partial += len(parts) * query_len
            num_done += 1
        else:
            for offset in range(0, query_len, rows_of_task):
                num_rows = min(rows_of_task, query_len - offset)
                position = kv_len - query_len + offset
                place = (sequence, row + offset, num_rows, position)
                pieces.append([*place, *reach(row + offset, num_rows, position), 0, 1, 0, 0, fresh])
    pieces.sort(key=lambda piece: piece[4] - piece[5])
    return pieces, spans, num_partial, num_done


class _Reach:
    """The tokens that rows attend to: from the start of a part to the last one's end."""

    __slots__ = ("_ends", "_firsts")

    def __init__(self, seen: torch.Tensor | None) -> None:
        self._firsts, self._ends = ([], []) if seen is None else seen.T.tolist()

    def __call__(self, row: int, count: int, position: int) -> tuple[int, int]:
        """Return begin and end for ``count`` rows from ``row`` on, the first at ``position``."""
        if not self._ends:
            return 0, position + count
        begin = min(self._firsts[row : row + count])
        return begin - begin % PART_TOKENS, max(self._ends[row : row + count])
