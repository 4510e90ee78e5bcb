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
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.cpu.launch import Launcher, compile_kernel, pack
from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.linear.epilogue import CODES, activate
from sensorium.kernels.cpu.linear.panels import (
    MOST_ROWS,
    STEP,
    is_one_tile,
    most_panels,
    multiply_panels,
    scatter16,
    scatter_pairs,
)
from sensorium.kernels.cpu.linear.product import (
    DONE,
    RESULT,
    SOURCE,
    TAKEN,
    Plan,
    RowProduct,
    lines,
    rows_that_fit,
    scratch,
)
from sensorium.kernels.cpu.linear.sharing import (
    clear_counters,
    counter_bytes,
    next_task,
    wait_for,
)
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
FEW_DEPTH_BLOCK = 2048
"""Inputs of a block of few groups of rows, which wait for weights: long runs of a panel are fetched
ahead, and the groups behind the first find them in L2."""
FEW_GROUPS = 3
BLOCK_ROWS = 192
"""Rows of a task: their share of ``DEPTH_BLOCK`` inputs, and their sums, stay in L2."""
BLOCK_PANELS = 8
"""Panels of a task with many rows."""
MOST_PANELS = 8
"""Panels of a task with few rows."""
TASKS_PER_THREAD = 6
SERIAL_WORK = 128 * 1024
"""Multiply-adds that one thread runs; more are shared."""
WIDENED_INPUTS = 256
"""Inputs of a group of rows that a task widens."""
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


@njit(**INLINE)
def widen_part(x: Any, inputs: Any, count: Any, first: Any, last: Any, out: Any) -> None:
    """Widen the inputs [first, last) of ``count`` rows of x, side by side for each input.

    Those from ``inputs`` on are zeros.
    """
    full = min(last, inputs)
    for row in range(count):
        own, to = shifted(x, row * inputs), shifted(out, row)
        k = first
        while k + WIDTH <= full:
            if count == 1:
                store16(to, k, load16(own, k))
            else:
                scatter16(to, k * count, count, load16(own, k))
            k += WIDTH
        while k < full:
            store(to, k * count, load(own, k))
            k += 1
        while k < last:
            store(to, k * count, f32(0.0))
            k += 1


@njit(**INLINE)
def pair_part(x: Any, inputs: Any, count: Any, first: Any, last: Any, out: Any) -> None:
    """Copy the inputs [first, last) of ``count`` bf16 rows of x by pairs, as ``widen_part``."""
    full = min(last, inputs)
    for row in range(count):
        own, to = shifted(x, row * inputs), shifted(out, row)
        k = first
        while k + 2 * WIDTH <= full:
            scatter_pairs(to, k // 2 * count, count, own, k)
            k += 2 * WIDTH
        while k < last:
            pair = types.uint32(own[k]) if k < inputs else types.uint32(0)
            if k + 1 < inputs:
                pair |= types.uint32(own[k + 1]) << types.uint32(16)
            to[k // 2 * count] = pair
            k += 2


def build_product(element: Any, result: Any, paired: bool = False) -> Callable[[Any], None]:
    """Build the product of rows of ``result`` type with a weight of ``element`` type.

    paired: both are bf16, and the CPU multiplies pairs of them. args: x, out, rows, inputs, widened
    rows (float32, or pairs in uint32), weight, bias (0: none), scratch (float32),
    floats of a thread's scratch, inputs (even), outputs, groups, groups of a task, panels of a
    task, panels that go together, inputs of a block, activation, inputs of a task that widens, such
    tasks, counters of the shares of tasks (see ``sharing``), shares. The last two of the array
    count the widening tasks taken and done.
    """
    wide = types.uint32 if paired else types.float32
    step = 2 if paired else 1
    copy = pair_part if paired else widen_part

    @njit(**INLINE)
    def widen_rows(args: Any) -> None:
        rows, inputs, depth, groups, share = args[5], args[6], args[12], args[14], args[20]
        per_group = (depth + share - 1) // share
        while True:
            task = fetch_add(args, TAKEN, 1)
            if task >= args[21]:
                break
            if task == 0:
                clear_counters(pointer(args[22], types.int64), args[23])
            group, first = task // per_group, task % per_group * share
            start = first_row(group, groups, rows)
            count = first_row(group + 1, groups, rows) - start
            x = shifted(pointer(args[SOURCE], result), start * inputs)
            out = shifted(pointer(args[7], wide), start * (depth // step))
            copy(x, inputs, count, first, min(first + share, depth), out)
            fetch_add(args, DONE, 1)
        wait_for(args, DONE, args[21])

    def product(args: Any) -> None:
        thread = fetch_add(args, 1, 1)
        scratch = shifted(pointer(args[10], types.float32), thread * args[11])
        widen_rows(args)
        w, bias = pointer(args[8], element), pointer(args[9], result)
        rows, depth, outputs, groups = args[5], args[12], args[13], args[14]
        task_groups, task_panels, together, depth_block = args[15], args[16], args[17], args[18]
        num_panels = (outputs + WIDTH - 1) // WIDTH
        panel_tasks = (num_panels + task_panels - 1) // task_panels
        width = task_panels * WIDTH
        counters, passed = pointer(args[22], types.int64), 0
        while True:
            task, passed = next_task(counters, thread, passed, args[2], args[23])
            if task < 0:
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
                        a_at = row * (depth // step) + k // step * count
                        a = shifted(pointer(args[7], wide), a_at)
                        most = taken_together(count, together)
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
                out = shifted(pointer(args[RESULT], result), row * outputs + column)
                finish_row(sums, shifted(bias, column), args[9] != 0, args[19], out, count)

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


_PANELS = sum(most_panels(rows) << (4 * rows) for rows in range(1, MOST_ROWS + 1))
"""Panels that go together, in four bits for each number of rows."""


@njit(**INLINE)
def taken_together(rows: Any, together: Any) -> Any:
    """Return how many panels a group of rows takes of those that go together for all groups."""
    own = (_PANELS >> (4 * rows)) & 15
    return own if together % own == 0 else together


def together_of(largest: int, smallest: int) -> int:
    """Return the panels that go together for groups of so many rows, which differ by one at most.

    They stay in the first cache while the groups of a task go through them.
    """
    return most_panels(largest) if most_panels(largest) > 1 else most_panels(smallest)


def multiplies_pairs(form: torch.dtype, result: torch.dtype) -> bool:
    """Return whether the CPU has an instruction for pairs of bf16, which two bf16 types use."""
    return form == result == torch.bfloat16 and levels.has("avx512bf16")


@functools.cache
def product_kernel(form: torch.dtype, result: torch.dtype) -> Launcher:
    """Return the product of weights in ``form`` with rows and results in ``result``."""
    names = [str(dtype).removeprefix("torch.") for dtype in (form, result)]
    function = build_product(ELEMENT[form], ELEMENT[result], multiplies_pairs(form, result))
    return compile_kernel(function, "_".join(names))


@functools.cache
def pack_kernel(num_bytes: int) -> Launcher:
    """Return the kernel that puts elements of so many bytes into panels."""
    element = types.uint32 if num_bytes == 4 else types.uint16
    return compile_kernel(build_pack(element), f"{num_bytes}_bytes")


def warm_up(dtype: torch.dtype) -> None:
    """Compile or load the kernels of weights and activations of ``dtype``."""
    product_kernel(dtype, dtype)


# -- weights --------------------------------------------------------------------------------------


class FloatProduct(RowProduct):
    """Product with one weight in panels."""

    def __init__(self, weight: FloatWeight, bias: torch.Tensor | None, act: str | None) -> None:
        """Bind a weight, a bias (N,) and a key of ``CODES``."""
        depth = weight.num_inputs + weight.num_inputs % STEP
        pairs = multiplies_pairs(weight.panels.dtype, weight.dtype)
        self.widened_bytes = 2 if pairs else 4
        fits = rows_that_fit(self.widened_bytes * depth, BLOCK_ROWS)
        super().__init__(weight.shape, weight.dtype, fits)
        self.kernel = product_kernel(weight.panels.dtype, weight.dtype)
        self.bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self.panels, self.depth, self.code = weight.panels, depth, CODES[act]

    def plan(self, num_rows: int, threads: int) -> Plan:
        """Return the launch for so many rows."""
        num_panels, depth = self.panels.shape[0], self.depth
        groups = -(-num_rows // MOST_ROWS)
        largest, smallest = -(-num_rows // groups), num_rows // groups
        together = together_of(largest, smallest)
        if groups == 1:
            limit, task_groups = MOST_PANELS, 1
            depth_block = depth if is_one_tile(largest) else FEW_DEPTH_BLOCK
        else:
            limit, task_groups = BLOCK_PANELS, -(-BLOCK_ROWS // largest)
            depth_block = FEW_DEPTH_BLOCK if groups <= FEW_GROUPS else DEPTH_BLOCK
        limit = max(together, limit // together * together)
        share = -(-num_panels // (threads * TASKS_PER_THREAD))
        task_panels = min(limit, max(together, share // together * together))
        num_tasks = -(-groups // task_groups) * -(-num_panels // task_panels)
        floats = lines(4 * min(task_groups * largest, num_rows) * task_panels * WIDTH) // 4
        widened = lines(self.widened_bytes * num_rows * depth)
        counters = widened + 4 * threads * floats
        memory, number = scratch(counters + counter_bytes(threads))
        work = num_rows * self.num_outputs * depth
        shares = groups * -(-depth // WIDENED_INPUTS)
        values = (
            *(num_tasks, 0, 0, num_rows, self.num_inputs),
            *(memory, self.panels.data_ptr()),
            *(0 if self.bias is None else self.bias.data_ptr(), memory + widened, floats),
            *(depth, self.num_outputs, groups, task_groups, task_panels, together, depth_block),
            *(self.code, WIDENED_INPUTS, shares, memory + counters, threads),
        )
        launch = self.kernel.on(threads, work, SERIAL_WORK)
        return Plan(pack(*values), launch, threads, number)


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
        return FloatProduct(self, bias, act)

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
    panels = huge_pages.shared_zeros(shape, weight.dtype)
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
