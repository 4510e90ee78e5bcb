"""Products with weights that rest as bf16, fp16 or float32, summed in float32.

A weight lies in panels of sixteen outputs, each in the order in which its product reads it: for
every input the numbers of sixteen outputs, with bf16 in pairs of inputs ([N/16][K/2][16][2]), which
one shift and one mask widen. One row reads the weights once, at the speed of the memory; many rows
run by blocks that stay in the caches.

Rows go in groups of almost equal size, as the registers hold them. Their values are widened once
and stored input by input, [group][K][rows of the group].
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.cpu.launch import Launcher, compile_kernel, is_recording, pack
from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.linear.epilogue import CODES, activate
from sensorium.kernels.cpu.linear.panels import MOST_ROWS, STEP, most_panels, multiply_panels
from sensorium.kernels.cpu.numeric import (
    ELEMENT,
    INLINE,
    WIDTH,
    f32,
    fetch_add,
    load,
    load16,
    load_part,
    njit,
    pointer,
    shifted,
    store,
    store16,
    store_part,
)
from sensorium.kernels.weight import Multiply, PackedWeight

DEPTH_BLOCK = 256
"""Inputs after which many rows go on to the next panel: a panel's share then stays in L1."""
BLOCK_ROWS = 192
"""Rows of a task: their share of ``DEPTH_BLOCK`` inputs, and their sums, stay in L2."""
BLOCK_PANELS = 8
"""Panels of a task with many rows."""
MOST_PANELS = 32
"""Panels of a task with few rows."""
TASKS_PER_THREAD = 6
ACTIVATION_BYTES = 16 * 1024 * 1024
"""Memory of the widened rows that go through the weights at once."""
SERIAL_ELEMENTS = 8192
"""Numbers that one thread widens; more are shared."""
SERIAL_WORK = 128 * 1024
"""Multiply-adds that one thread runs; more are shared."""
RELEASED_WORK = 256 * 1024 * 1024
"""Multiply-adds from which a product runs without the GIL."""
HUGE_BYTES = 2 << 20
"""Size from which panels get memory with huge pages."""
PADDED_VALUES = 1 << 20
"""Weights that are padded at once."""


# -- kernels --------------------------------------------------------------------------------------


@njit(**INLINE)
def first_row(group: Any, groups: Any, rows: Any) -> Any:
    """Return the first row of a group when ``rows`` are shared by ``groups`` almost equally."""
    larger = rows % groups
    return group * (rows // groups) + min(group, larger)


@njit(**INLINE)
def finish_row(sums: Any, bias: Any, has_bias: Any, act: Any, out: Any, count: Any) -> None:
    """Write ``act(sums + bias)``, rounded, for ``count`` outputs of a row.

    sums: float32; its last vector is read whole. bias, out: pointers of the result's type.
    """
    full = count - count % WIDTH
    for i in range(0, full, WIDTH):
        value = load16(sums, i)
        if has_bias:
            value = value + load16(bias, i)
        store16(out, i, activate(value, act))
    if full < count:
        rest = count - full
        value = load16(sums, full)
        if has_bias:
            value = value + load_part(bias, full, rest)
        store_part(out, full, activate(value, act), rest)


def build_widen(element: Any) -> Callable[[Any], None]:
    """Build the kernel that widens rows, group by group.

    args: rows, out (float32), number of rows, inputs, inputs rounded up to an even number, groups.
    """

    def widen(args: Any) -> None:
        rows, depth, padded, groups = args[5], args[6], args[7], args[8]
        while True:
            group = fetch_add(args, 0, 1)
            if group >= args[2]:
                break
            start = first_row(group, groups, rows)
            count = first_row(group + 1, groups, rows) - start
            x = shifted(pointer(args[3], element), start * depth)
            out = shifted(pointer(args[4], types.float32), start * padded)
            if count == 1:
                full = depth - depth % WIDTH
                for k in range(0, full, WIDTH):
                    store16(out, k, load16(x, k))
                if full < depth:
                    store_part(out, full, load_part(x, full, depth - full), depth - full)
            else:
                for row in range(count):
                    own = shifted(x, row * depth)
                    to = shifted(out, row)
                    for k in range(depth):
                        store(to, k * count, load(own, k))
            for k in range(depth * count, padded * count):
                store(out, k, f32(0.0))

    return widen


def build_product(element: Any, result: Any) -> Callable[[Any], None]:
    """Build the product of widened rows with a weight of ``element`` type.

    args: widened rows, weight, bias (0: none), out, scratch (float32), rows, groups, inputs (even),
    outputs, activation, groups of a task, panels of a task, panels that go together, inputs of a
    block, floats of a thread's scratch.
    """

    def product(args: Any) -> None:
        w, bias = pointer(args[4], element), pointer(args[5], result)
        rows, groups, depth, outputs = args[8], args[9], args[10], args[11]
        act, task_groups, task_panels = args[12], args[13], args[14]
        together, depth_block = args[15], args[16]
        num_panels = (outputs + WIDTH - 1) // WIDTH
        panel_tasks = (num_panels + task_panels - 1) // task_panels
        scratch = pointer(args[7], types.float32)
        scratch = shifted(scratch, fetch_add(args, 1, 1) * args[17])
        width = task_panels * WIDTH
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            first_panel = (task % panel_tasks) * task_panels
            last_panel = min(first_panel + task_panels, num_panels)
            first_group = (task // panel_tasks) * task_groups
            last_group = min(first_group + task_groups, groups)
            block_row = first_row(first_group, groups, rows)
            for k in range(0, depth, depth_block):
                length = min(depth_block, depth - k)
                for chunk in range(first_panel, last_panel, together):
                    chunk_end = min(chunk + together, last_panel)
                    for group in range(first_group, last_group):
                        row = first_row(group, groups, rows)
                        count = first_row(group + 1, groups, rows) - row
                        a = shifted(pointer(args[3], types.float32), row * depth + k * count)
                        most = most_together(count)
                        panel = chunk
                        while panel < chunk_end:
                            taken = most if panel + most <= chunk_end else 1
                            own = shifted(w, (panel * depth + k) * WIDTH)
                            place = (row - block_row) * width + (panel - first_panel) * WIDTH
                            sums = shifted(scratch, place)
                            multiply_panels(
                                count, taken, a, own, depth * WIDTH, length, sums, width, k > 0
                            )
                            panel += taken
            column = first_panel * WIDTH
            count = min(last_panel * WIDTH, outputs) - column
            end_row = first_row(last_group, groups, rows)
            for row in range(block_row, end_row):
                sums = shifted(scratch, (row - block_row) * width)
                out = shifted(pointer(args[6], result), row * outputs + column)
                finish_row(sums, shifted(bias, column), args[5] != 0, act, out, count)

    return product


def build_pack(element: Any) -> Callable[[Any], None]:
    """Build the kernel that puts rows into panels. Elements are those of a panel: pairs for bf16.

    args: weight, panels, elements of a row.
    """

    def pack_panels(args: Any) -> None:
        size = args[5]
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            rows = shifted(pointer(args[3], element), task * WIDTH * size)
            out = shifted(pointer(args[4], element), task * WIDTH * size)
            # A cache line of every row at a time: longer strides would throw each other out.
            for first in range(0, size, WIDTH):
                last = min(first + WIDTH, size)
                for lane in range(WIDTH):
                    for k in range(first, last):
                        out[k * WIDTH + lane] = rows[lane * size + k]

    return pack_panels


_LIMITS = [most_panels(rows) for rows in range(1, MOST_ROWS + 1)]
_FIRST, _SECOND, _THIRD = sorted(set(_LIMITS), reverse=True)
_FIRST_ROWS = _LIMITS.count(_FIRST)
_SECOND_ROWS = _FIRST_ROWS + _LIMITS.count(_SECOND)


@njit(**INLINE)
def most_together(rows: Any) -> Any:
    """Return ``most_panels(rows)``."""
    if rows <= _FIRST_ROWS:
        return _FIRST
    return _SECOND if rows <= _SECOND_ROWS else _THIRD


@functools.cache
def product_kernel(form: torch.dtype, result: torch.dtype) -> Launcher:
    """Return the product of weights in ``form`` with results in ``result``."""
    names = [str(dtype).removeprefix("torch.") for dtype in (form, result)]
    return compile_kernel(build_product(ELEMENT[form], ELEMENT[result]), "_".join(names))


@functools.cache
def widen_kernel(dtype: torch.dtype) -> Launcher:
    """Return the kernel that widens rows of ``dtype``."""
    return compile_kernel(build_widen(ELEMENT[dtype]), str(dtype).removeprefix("torch."))


@functools.cache
def pack_kernel(num_bytes: int) -> Launcher:
    """Return the kernel that puts elements of so many bytes into panels."""
    element = types.uint32 if num_bytes == 4 else types.uint16
    return compile_kernel(build_pack(element), f"{num_bytes}_bytes")


def warm_up(dtype: torch.dtype) -> None:
    """Compile or load the kernels of weights and activations of ``dtype``."""
    widen_kernel(dtype)
    product_kernel(dtype, dtype)


# -- weights --------------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Memory of one thread's products, which grows to the largest."""

    def __init__(self) -> None:
        self._kept = {"rows": torch.empty(0), "sums": torch.empty(0)}

    def get(self, name: str, size: int) -> torch.Tensor:
        """Return at least ``size`` floats; a recorded launch gets memory of its own."""
        if is_recording():
            return torch.empty(size)
        if self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size)
        return self._kept[name]


_SCRATCH = _Scratch()


class FloatWeight(PackedWeight):
    """Weight in panels of sixteen outputs, at rest in bf16, fp16 or float32."""

    def __init__(self, panels: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Wrap ``panels``: (N/16, K/2, 16, 2) for bf16, else (N/16, K, 16).

        N is rounded up to a multiple of 16, K to an even number.
        """
        self.panels, self.dtype = panels, dtype
        self.num_outputs, self.num_inputs = shape
        self.format = str(panels.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        code = CODES[act]
        if bias is not None:
            bias = bias.to(self.dtype).contiguous()

        def run(x: torch.Tensor) -> torch.Tensor:
            if x.dim() != 2:
                return run(x.flatten(0, -2)).view(*x.shape[:-1], self.num_outputs)
            return multiply(x, self, bias, code)

        return run

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        panel, lane = ids // WIDTH, ids % WIDTH
        if self.panels.dtype == torch.bfloat16:
            pairs = self.panels.view(torch.int32).squeeze(-1)
            found = pairs[panel, :, lane].view(torch.bfloat16)
        else:
            found = self.panels[panel, :, lane]
        return found[:, : self.num_inputs].to(self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"panels": self.panels}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> FloatWeight:
        panels = tensors["panels"]
        num_panels, depth = -(-shape[0] // WIDTH), shape[1] + shape[1] % STEP
        paired = panels.dtype == torch.bfloat16
        form = (num_panels, depth // 2, WIDTH, 2) if paired else (num_panels, depth, WIDTH)
        if tuple(panels.shape) != form or not panels.is_contiguous():
            raise ValueError(f"these are not the panels of a weight of {shape}")
        return cls(panels, shape, dtype)


def available(form: str) -> bool:
    """Return whether the kernels are made for this CPU and a float format.

    On other processors than x86 the libraries are better.
    """
    needed = ("avx2", "fma", "f16c") if form == "float16" else ("avx2", "fma")
    return levels.is_x86() and all(map(levels.has, needed))


def pack_weight(weight: torch.Tensor, dtype: torch.dtype | None = None) -> FloatWeight:
    """Pack a (N, K) weight, which keeps its type at rest, for activations of ``dtype``.

    By default they have the weight's own.
    """
    dtype = weight.dtype if dtype is None else dtype
    num_outputs, num_inputs = weight.shape
    num_panels, depth = -(-num_outputs // WIDTH), num_inputs + num_inputs % STEP
    pairs = weight.dtype == torch.bfloat16
    shape = (num_panels, depth // STEP, WIDTH, STEP) if pairs else (num_panels, depth, WIDTH)
    large = math.prod(shape) * weight.dtype.itemsize >= HUGE_BYTES
    panels = huge_pages.zeros(shape, weight.dtype) if large else weight.new_empty(shape)
    # Rows and inputs that lack to whole panels are added in bands: a whole copy might be large.
    most = num_panels if depth == num_inputs else PADDED_VALUES // (WIDTH * depth)
    starts = [*range(0, num_outputs // WIDTH, max(1, most)), num_outputs // WIDTH, num_panels]
    for first, end in pairwise(starts):
        rows = weight[first * WIDTH : end * WIDTH]
        missing = (0, depth - num_inputs, 0, (end - first) * WIDTH - len(rows))
        rows = torch.nn.functional.pad(rows, missing) if any(missing) else rows
        if end > first:
            _place(rows.contiguous(), panels[first:end])
    return FloatWeight(panels, (num_outputs, num_inputs), dtype)


def _place(rows: torch.Tensor, panels: torch.Tensor) -> None:
    """Put rows (P * 16, K) into P panels, K even."""
    num_panels, size = panels.shape[:2]
    args = pack(num_panels, rows.data_ptr(), panels.data_ptr(), size)
    pack_kernel(2 if rows.dtype == torch.float16 else 4).released(args)


def multiply(
    x: torch.Tensor, weight: FloatWeight, bias: torch.Tensor | None, act: int
) -> torch.Tensor:
    """Compute ``act(x W^T + bias)``: (T, K) -> (T, N). act: a value of ``CODES``."""
    num_rows = x.shape[0]
    if x.shape[1] != weight.num_inputs or x.dtype != weight.dtype:
        raise ValueError(
            f"rows of {x.shape[1]} {x.dtype} for a weight of {weight.num_inputs} {weight.dtype}"
        )
    x = x.contiguous()
    out = x.new_empty((num_rows, weight.num_outputs))
    depth = weight.num_inputs + weight.num_inputs % STEP
    fit = ACTIVATION_BYTES // (4 * depth)
    step = BLOCK_ROWS if fit >= BLOCK_ROWS else MOST_ROWS
    most = max(MOST_ROWS, fit // step * step)
    for start in range(0, num_rows, most):
        rows = slice(start, min(start + most, num_rows))
        _multiply_block(x[rows], weight, bias, act, out[rows], depth)
    return out


def _widened(x: torch.Tensor, depth: int, groups: int) -> torch.Tensor:
    """Return the rows as float32, group by group."""
    num_rows, num_inputs = x.shape
    if num_rows == 1 and x.dtype == torch.float32 and depth == num_inputs:
        return x
    out = _SCRATCH.get("rows", num_rows * depth)
    args = pack(groups, x.data_ptr(), out.data_ptr(), num_rows, num_inputs, depth, groups)
    kernel = widen_kernel(x.dtype)
    (kernel.serial if x.numel() <= SERIAL_ELEMENTS or groups == 1 else kernel.parallel)(args)
    return out


def _multiply_block(
    x: torch.Tensor,
    weight: FloatWeight,
    bias: torch.Tensor | None,
    act: int,
    out: torch.Tensor,
    depth: int,
) -> None:
    """Multiply rows whose widened form fits ``ACTIVATION_BYTES``."""
    num_rows, num_outputs = out.shape
    groups = -(-num_rows // MOST_ROWS)
    largest = -(-num_rows // groups)
    together = most_panels(largest)
    num_panels, threads = weight.panels.shape[0], torch.get_num_threads()
    if groups == 1:
        depth_block, task_groups, limit = depth, 1, MOST_PANELS
    else:
        depth_block, task_groups = DEPTH_BLOCK, -(-BLOCK_ROWS // largest)
        limit = BLOCK_PANELS
    share = -(-num_panels // (threads * TASKS_PER_THREAD))
    task_panels = min(limit, -(-share // together) * together)
    num_tasks = -(-groups // task_groups) * -(-num_panels // task_panels)
    size = min(task_groups * largest, num_rows) * task_panels * WIDTH
    sums = _SCRATCH.get("sums", threads * size)
    wide = _widened(x, depth, groups)
    args = pack(
        num_tasks,
        wide.data_ptr(),
        weight.panels.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        sums.data_ptr(),
        num_rows,
        groups,
        depth,
        num_outputs,
        act,
        task_groups,
        task_panels,
        together,
        depth_block,
        size,
    )
    kernel = product_kernel(weight.panels.dtype, weight.dtype)
    work = num_rows * num_outputs * depth
    if work < SERIAL_WORK:
        kernel.serial(args)
    else:
        (kernel.parallel if work < RELEASED_WORK else kernel.released)(args)
