"""Products of rows with a packed weight by the engine's own kernels: memory, plans, launches.

A layer multiplies the same few numbers of rows again and again, and at decode its product takes
some tens of microseconds. So the arguments of a launch are kept, by number of rows; a call fills in
only where its rows and results lie.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from sensorium.kernels.cpu.launch import Kernel, Launcher, is_recording, record

SOURCE, RESULT = 3, 4
"""Arguments of every kernel of products: addresses of the rows and of the results."""
TAKEN, DONE = 30, 31
"""Counters of the tasks of the first phase, in which the rows are converted."""
KEPT_ROWS = 64
"""Most rows whose plan is kept."""
MOST_PLANS = 8
"""Most plans that a product keeps. Decode steps that recur are captured whole, and need none."""
SCRATCH_BYTES = 4 * 1024 * 1024
"""Memory of the converted rows that go through the weights at once, unless a block takes more.

Each task of a product reads a block of them: they should stay in the cache of all cores."""
LINE_BYTES = 64


class _Scratch(threading.local):
    """Memory of one thread's products, which grows to the largest."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.number = 0


_SCRATCH = _Scratch()
_NUMBERS = itertools.count(1)


def scratch(num_bytes: int) -> tuple[int, int]:
    """Return the address of this thread's memory, of at least so many bytes, and its number.

    No two memories have the same number, whenever and in whatever thread. For a recorded launch it
    lies in the memory of its recording, which gives it to later launches again.
    """
    if is_recording():
        return torch.empty(num_bytes, dtype=torch.uint8).data_ptr(), 0
    if _SCRATCH.memory.numel() < num_bytes:
        _SCRATCH.memory = torch.empty(num_bytes, dtype=torch.uint8)
        _SCRATCH.number = next(_NUMBERS)
    return _SCRATCH.memory.data_ptr(), _SCRATCH.number


def lines(num_bytes: int) -> int:
    """Round a number of bytes up to whole cache lines."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


@dataclass(slots=True)
class Plan:
    """Launch of a product for one number of rows."""

    args: Any
    launch: Kernel
    threads: int
    """Threads that it runs on, for which the memory is made."""
    memory: int
    """Number of the memory, as ``scratch`` gives it."""


class RowProduct(ABC):
    """Product of rows with one packed weight: x (T, K) -> (T, N)."""

    kernel: Launcher

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, most_rows: int) -> None:
        """Make a product of weights (N, K); more than ``most_rows`` rows go in blocks of these."""
        self.num_outputs, self.num_inputs = shape
        self.dtype = dtype
        self.most_rows = most_rows
        self.plans: dict[int, Plan] = {}
        """Kept launches by number of rows; one that is in use is not in it."""

    def kernel_for(self, num_rows: int) -> Launcher:
        """Return the kernel for so many rows."""
        return self.kernel

    @abstractmethod
    def plan(self, num_rows: int, threads: int) -> Plan:
        """Return the launch for so many rows on at most so many threads."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows; raise ValueError if they are not of the weight's inputs and type."""
        if x.dim() != 2:
            return self(x.flatten(0, -2)).view(*x.shape[:-1], self.num_outputs)
        num_rows, num_inputs = x.shape
        if num_inputs != self.num_inputs or x.dtype != self.dtype:
            raise ValueError(
                f"rows of {num_inputs} {x.dtype} for a weight of {self.num_inputs} {self.dtype}"
            )
        x = x.contiguous()
        out = x.new_empty((num_rows, self.num_outputs))
        source, result = x.data_ptr(), out.data_ptr()
        if 0 < num_rows <= self.most_rows:
            self._run(num_rows, source, result)
            return out
        size = x.element_size()
        for first in range(0, num_rows, self.most_rows):
            count = min(self.most_rows, num_rows - first)
            at_source, at_result = first * num_inputs * size, first * self.num_outputs * size
            self._run(count, source + at_source, result + at_result)
        return out

    def _run(self, num_rows: int, source: int, result: int) -> None:
        threads = torch.get_num_threads()
        if is_recording():
            args = self.plan(num_rows, threads).args
            args[SOURCE], args[RESULT] = source, result
            record(self.kernel_for(num_rows).address, args)
            return
        # A plan in use is in no other thread's reach: some launches let other threads run.
        plan = self.plans.pop(num_rows, None)
        if plan is None or plan.threads != threads or plan.memory != _SCRATCH.number:
            plan = self.plan(num_rows, threads)
        args = plan.args
        args[0] = args[1] = args[TAKEN] = args[DONE] = 0
        args[SOURCE], args[RESULT] = source, result
        plan.launch(args)
        if num_rows <= KEPT_ROWS:
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[num_rows] = plan


def rows_that_fit(row_bytes: int, block: int) -> int:
    """Return how many rows go at once: whole blocks within ``SCRATCH_BYTES``, at least one."""
    return max(block, SCRATCH_BYTES // row_bytes // block * block)
