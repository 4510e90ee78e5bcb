"""Tasks that threads take from their shares, and from those of others: each once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import types

from sensorium.kernels.cpu.launch import Launcher, compile_kernel, pack
from sensorium.kernels.cpu.linear.sharing import LINE, next_task, share_start
from sensorium.kernels.cpu.numeric import fetch_add, pointer


def build() -> Any:
    """Build the kernel that takes tasks, at most so many a thread.

    args: counters of the shares, shares, times that each task was taken, tasks that the first
    thread takes at most, order in which it took them. ``args[1]`` counts the threads.
    """

    def taking(args: Any) -> None:
        counters, times = pointer(args[3], types.int64), pointer(args[5], types.int64)
        thread, passed, number = fetch_add(args, 1, 1), 0, 0
        order = pointer(args[7], types.int64)
        while thread > 0 or number < args[6]:
            task, passed = next_task(counters, thread, passed, args[2], args[4])
            if task < 0:
                break
            if thread == 0:
                order[number] = task
            fetch_add(times, task, 1)
            number += 1

    return taking


@pytest.fixture(scope="module")
def kernel() -> Launcher:
    return compile_kernel(build(), "test")


def run(kernel: Launcher, tasks: int, shares: int, threads: int, first: int) -> tuple[Any, Any]:
    """Return how often each task was taken, and the order of those of the first thread."""
    counters = np.zeros(shares * LINE, np.int64)
    times, order = np.zeros(tasks, np.int64), np.full(tasks, -1, np.int64)
    addresses = counters.ctypes.data, shares, times.ctypes.data, first, order.ctypes.data
    args = pack(tasks, *addresses)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernel.released(args)
    finally:
        torch.set_num_threads(before)
    return times, order


@pytest.mark.parametrize("tasks", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize(("shares", "threads"), [(1, 1), (2, 2), (3, 2), (4, 4), (2, 4), (16, 3)])
def test_each_task_is_taken_once(kernel: Launcher, tasks: int, shares: int, threads: int) -> None:
    for _ in range(5):
        times, _ = run(kernel, tasks, shares, threads, tasks)
        assert times.tolist() == [1] * tasks


def test_a_thread_alone_takes_its_share_in_order_and_then_the_others_from_their_ends(
    kernel: Launcher,
) -> None:
    times, order = run(kernel, 9, 3, 1, 9)
    assert order.tolist() == [0, 1, 2, 5, 4, 3, 8, 7, 6]
    assert times.tolist() == [1] * 9


def test_others_do_the_share_of_a_thread_that_does_nothing(kernel: Launcher) -> None:
    times, order = run(kernel, 100, 2, 2, 0)
    assert order.max() == -1
    assert times.tolist() == [1] * 100


def test_shares_are_neighbours_and_almost_equal() -> None:
    # The plain function: compiled code of functions within kernels cannot be called from Python.
    starts = [share_start.py_func(number, 100, 7) for number in range(8)]
    sizes = np.diff(starts)
    assert (starts[0], starts[-1]) == (0, 100)
    assert sizes.max() - sizes.min() <= 1
