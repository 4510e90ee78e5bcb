"""The likeliest next token of each row, with what speaks against the row, in one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu.elementwise import (
    ARGMAX_PART,
    DOUBTS_PART,
    build_doubts,
    build_peaks,
    kernel,
    launch,
)
from sensorium.kernels.cpu.launch import pack
from sensorium.kernels.cpu.numeric import fetch_add, load, pointer, shifted


def build_choice(element: Any) -> Callable[[Any], None]:
    """Build the kernel that finds the first of the largest logits, and joins the doubts of a row.

    args: those of ``build_peaks``, then choices (int64), doubts of each row (int64), their number.
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


def choose(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return (N,) int64: the index of the largest logit of each row, or -1 minus it in doubt.

    logits (N, V), hidden (N, H): contiguous, of one dtype. Doubtful are the rows that
    ``ops.doubtful_rows`` returns.
    """
    num_rows, vocab = logits.shape
    per_row, num_doubts = -(-vocab // ARGMAX_PART), -(-vocab // DOUBTS_PART)
    peaks = torch.empty((num_rows, per_row), dtype=torch.float32)
    doubts = torch.empty((num_rows, num_doubts), dtype=torch.int64)
    found = torch.empty(num_rows, dtype=torch.int64)
    size, dtype = num_rows * vocab, logits.dtype
    values = (logits.data_ptr(), vocab, ARGMAX_PART, per_row, peaks.data_ptr(), found.data_ptr())
    launch(kernel(build_peaks, dtype), pack(num_rows * per_row, *values), size)
    checks = (logits.data_ptr(), vocab, DOUBTS_PART, num_doubts, hidden.data_ptr())
    args = pack(num_rows * num_doubts, *checks, hidden.shape[1], doubts.data_ptr())
    launch(kernel(build_doubts, dtype), args, size)
    args = pack(num_rows, *values, doubts.data_ptr(), num_doubts)
    launch(kernel(build_choice, dtype), args, num_rows * ARGMAX_PART)
    return found
