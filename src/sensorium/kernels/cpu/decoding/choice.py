"""The likeliest token of each row of logits, and what speaks against the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import types

from sensorium.kernels.cpu.elementwise import kernel, launch
from sensorium.kernels.cpu.launch import pack
from sensorium.kernels.cpu.numeric import (
    INLINE,
    WIDTH,
    f32,
    fetch_add,
    fma,
    largest,
    load,
    load16,
    load_part,
    njit,
    peak,
    pointer,
    shifted,
    splat,
    total,
)

ARGMAX_PART = 2048
DOUBTS_PART = 16384


@njit(**INLINE)
def block_peak(row: Any, size: Any) -> Any:
    """Return the largest of ``size`` elements."""
    best = splat(f32(-3.4e38))
    full = size - size % WIDTH
    for i in range(0, full, WIDTH):
        best = largest(load16(row, i), best)
    result = peak(best)
    for i in range(full, size):
        result = max(result, load(row, i))
    return result


def build_peaks(element: Any) -> Callable[[Any], None]:
    """Build the kernel that finds the largest logit of each task.

    args: logits, vocabulary size, elements of a task, tasks of a row, peaks (float32).
    """

    def peaks(args: Any) -> None:
        vocab, part, per_row = args[4], args[5], args[6]
        out = pointer(args[7], types.float32)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            row, first = task // per_row, task % per_row * part
            logits = shifted(pointer(args[3], element), row * vocab + first)
            out[task] = block_peak(logits, min(part, vocab - first))

    return peaks


def build_choice(element: Any) -> Callable[[Any], None]:
    """Build the kernel that finds the first logit that equals the first highest peak of a row.

    args: those of ``build_peaks``, then places (int64), doubts of each row (int64), their number. A
    row with a doubt that is not 0 gets -1 minus its place.
    """

    def choice(args: Any) -> None:
        vocab, part, per_row = args[4], args[5], args[6]
        out = pointer(args[8], types.int64)
        while True:
            row = fetch_add(args, 0, 1)
            if row >= args[2]:
                break
            peaks = shifted(pointer(args[7], types.float32), row * per_row)
            winner = 0
            for i in range(1, per_row):
                if peaks[i] > peaks[winner]:
                    winner = i
            logits = shifted(pointer(args[3], element), row * vocab)
            index, last = winner * part, min((winner + 1) * part, vocab) - 1
            while index < last and load(logits, index) != peaks[winner]:
                index += 1
            doubts = shifted(pointer(args[9], types.int64), row * args[10])
            for i in range(args[10]):
                if doubts[i] != 0 and index >= 0:
                    index = -1 - index
            out[row] = index

    return choice


@njit(**INLINE)
def is_finite(row: Any, size: Any) -> Any:
    """Return whether none of ``size`` elements is infinite or NaN."""
    none, sums = splat(f32(0.0)), splat(f32(0.0))
    full = size - size % WIDTH
    for i in range(0, full, WIDTH):
        sums = fma(load16(row, i), none, sums)
    if full < size:
        sums = fma(load_part(row, full, size - full), none, sums)
    return total(sums) == f32(0.0)


def build_doubts(element: Any) -> Callable[[Any], None]:
    """Build the kernel that looks for rows with numbers that are not finite, or that may be equal.

    args: logits, vocabulary size, elements of a task, tasks of a row, hidden states, their size,
    results (int64, one a task).
    """

    def doubts(args: Any) -> None:
        vocab, part, per_row, size = args[4], args[5], args[6], args[8]
        out = pointer(args[9], types.int64)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            row, first = task // per_row, task % per_row * part
            logits = shifted(pointer(args[3], element), row * vocab)
            sound = is_finite(shifted(logits, first), min(part, vocab - first))
            if first == 0:
                hidden = shifted(pointer(args[7], element), row * size)
                ends_differ = load(logits, 0) != load(logits, vocab - 1)
                sound = sound and ends_differ and is_finite(hidden, size)
            out[task] = 0 if sound else 1

    return doubts


def argmax(logits: torch.Tensor, doubts: torch.Tensor | None = None) -> torch.Tensor:
    """Compute ``reference.argmax`` for contiguous logits; -1 minus it for a row with doubts.

    doubts: (N, D) int64, of ``find_doubts``; None for no doubts.
    """
    num_rows, vocab = logits.shape
    per_row = -(-vocab // ARGMAX_PART)
    peaks = torch.empty((num_rows, per_row), dtype=torch.float32)
    places = torch.empty(num_rows, dtype=torch.int64)
    values = (logits.data_ptr(), vocab, ARGMAX_PART, per_row, peaks.data_ptr(), places.data_ptr())
    launch(kernel(build_peaks, logits.dtype), pack(num_rows * per_row, *values), num_rows * vocab)
    own = (0, 0) if doubts is None else (doubts.data_ptr(), doubts.shape[1])
    args = pack(num_rows, *values, *own)
    launch(kernel(build_choice, logits.dtype), args, num_rows * ARGMAX_PART)
    return places


def find_doubts(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return (N, D) int64: not 0 for a part of a row that speaks against the row.

    logits (N, V), hidden (N, H): contiguous, of one dtype.
    """
    num_rows, vocab = logits.shape
    per_row = -(-vocab // DOUBTS_PART)
    found = torch.empty((num_rows, per_row), dtype=torch.int64)
    size = hidden.shape[1]
    values = (logits.data_ptr(), vocab, DOUBTS_PART, per_row, hidden.data_ptr(), size)
    args = pack(num_rows * per_row, *values, found.data_ptr())
    launch(kernel(build_doubts, logits.dtype), args, num_rows * vocab)
    return found


def doubtful_rows(logits: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """Compute ``reference.doubtful_rows`` for contiguous tensors of one dtype."""
    doubts = find_doubts(logits, hidden).numpy()
    rows: list[int] = np.flatnonzero(doubts.any(axis=1)).tolist()
    return rows
