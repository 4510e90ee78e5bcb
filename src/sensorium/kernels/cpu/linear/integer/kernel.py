"""Kernel of products with int8 and int4 weights: quantized rows, tasks, results.

One launch does it all. The threads first quantize the rows, wait for each other, and then share the
outputs (``sharing``): a task is a chunk of neighbouring panels (sixteen outputs) for a block of
rows. Within it each panel is read from memory once for all rows of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numba import types

from sensorium.kernels.cpu.launch import Launcher, pack
from sensorium.kernels.cpu.linear import epilogue
from sensorium.kernels.cpu.linear.integer.rows import build_quantize
from sensorium.kernels.cpu.linear.integers import BLOCK, fetch_first, local_array
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
    share_start,
    wait_for,
)
from sensorium.kernels.cpu.numeric import (
    INLINE,
    WIDTH,
    f32,
    fetch_add,
    fma,
    load16,
    load_part,
    njit,
    pointer,
    shifted,
    splat,
    store16,
    store_part,
)

ROW_BLOCK = 128
"""Most rows of a task."""
LEAST_ROW_BLOCK = 64
"""Least rows of a block: weights are widened once for each."""
ROW_BLOCK_BYTES = 256 * 1024
"""Quantized activations of a block of rows: what stays in the second cache."""
CHUNK_BYTES = 256 * 1024
"""Most bytes of weights in a task."""
CHUNKS_PER_THREAD = 6
"""Least number of tasks for each thread, so that none waits long for another."""
MANY_ROWS = 64
"""Rows from which on a task of quantization takes several."""
FEW_ROWS = 4
"""Rows from which on a task of quantization takes whole ones."""
PART_GROUPS = 16
"""Groups of a row that a task of quantization takes where there are few rows: the scales of a cache
line."""
PRIVATE_INPUTS = 8192
"""Most inputs of a row that, if it is alone, each thread quantizes for itself: that takes less time
than to wait for another and to fetch from its cache what it wrote. A multiple of ``BLOCK``."""


SLACK = 16 * BLOCK
"""Bytes behind the quantized rows that matrix tiles may read: a tile's rows of a block."""


class FewRows(NamedTuple):
    """A kernel for products of ``most`` rows and fewer, whose rows take no more memory."""

    most: int
    kernel: Launcher


class ManyRows(NamedTuple):
    """A kernel for products of ``least`` rows and more."""

    least: int
    kernel: Launcher


@dataclass(frozen=True)
class Layout:
    """Quantized rows: for each run of rows that a task takes, and each block of inputs, these rows.

    Scales and corrections likewise, for each group of inputs.
    """

    group: int
    """Inputs that share a scale, a multiple of ``BLOCK``."""
    row_bytes: int
    """Bytes of a block of a row."""
    bias: int
    """Number added to weights so that they have no sign."""


@njit(**INLINE)
def no_rows(rows: Any) -> Any:
    """Return 0, the number of rows that go crosswise in most forms."""
    return 0


@njit(**INLINE)
def _finish(args: Any, sums: Any, panel: Any, first: Any, rows: Any, out: Any, bias: Any) -> None:
    """Scale the float sums of a panel, add the bias, apply the activation function and store."""
    num_outputs, code = args[13], args[17]
    column = panel * WIDTH
    width = min(WIDTH, num_outputs - column)
    scale, shift = splat(f32(1.0)), splat(f32(0.0))
    if args[11] != 0:
        scale = load16(pointer(args[11], types.float32), column)
    if args[12] != 0:
        shift = load16(bias, column) if width == WIDTH else load_part(bias, column, width)
    for row in range(rows):
        value = epilogue.activate(fma(load16(sums, row * WIDTH), scale, shift), code)
        place = (first + row) * num_outputs + column
        if width == WIDTH:
            store16(out, place, value)
        else:
            store_part(out, place, value, width)


def build(
    element: Any,
    row_bytes: int,
    weight_bias: int,
    pairs: bool,
    multiply: Any,
    crossed_rows: Any = no_rows,
) -> Callable[[Any], None]:
    """Build the kernel for activations and results of one type.

    multiply: ``multiply(q, scales, corrections, rows, weights, inputs, group, sums)`` adds the
    products of a panel with a run of rows to ``sums``. crossed_rows: returns how many of the first
    rows of a run it takes crosswise, as ``int8`` does. args: x, results, rows, inputs,
    quantized rows, their scales, corrections (minus the bias of weights times the sum of a group),
    packed weights, scales of outputs (0: none), bias (0: none), outputs, panels of a task, rows of
    a run, runs, activation code, rows quantized by a task, such tasks, bytes of a panel, inputs
    that share a scale, counters of the shares of tasks (see ``sharing``), shares, groups of inputs
    quantized by a task, such parts of a row, 1 if each thread quantizes all rows for itself (0:
    once for all). The last two of the array count the tasks of quantization taken and done; a task
    more is done when the counters are set.
    """
    quantize = build_quantize(pairs)
    private_rows = local_array(types.int8, PRIVATE_INPUTS // BLOCK * row_bytes)
    private_scales = local_array(types.float32, PRIVATE_INPUTS // BLOCK)
    private_corrections = local_array(types.int32, PRIVATE_INPUTS // BLOCK)
    float_sums = local_array(types.float32, ROW_BLOCK * WIDTH)

    @njit(**INLINE)
    def quantize_rows(args: Any, thread: Any, places: Any) -> None:
        num_rows, inputs, run, group = args[5], args[6], args[15], args[21]
        padded = (inputs + BLOCK - 1) // BLOCK * BLOCK
        groups = (inputs + group - 1) // group
        base, scales, corrections = places
        own_groups, parts, shared = args[24], args[25], args[26] == 0
        if thread == 0:
            clear_counters(pointer(args[22], types.int64), args[23])
            fetch_add(args, DONE, 1)
        task = fetch_add(args, TAKEN, 1) if shared else 0
        while task < args[19]:
            first, first_input = task // parts * args[18], task % parts * own_groups * group
            for row in range(first, min(first + args[18], num_rows)):
                source = shifted(pointer(args[SOURCE], element), row * inputs)
                run_row = row % run
                first_row = row - run_row
                count = min(run, num_rows - first_row)
                crossed = crossed_rows(count)
                q = shifted(base, first_row * padded // BLOCK * row_bytes)
                end = min(first_input + own_groups * group, padded)
                for start in range(first_input, end, group):
                    out = shifted(q, (start // BLOCK * count + run_row) * row_bytes)
                    whole = min(group, padded - start)
                    size = min(group, inputs - start)
                    scale, total, products = quantize(
                        source, start, size, whole, out, count * row_bytes, run_row < crossed
                    )
                    place = first_row * groups + start // group * count + run_row
                    scales[place] = scale
                    correction = -weight_bias * total
                    if run_row < crossed:
                        correction -= products
                    corrections[place] = correction
            if shared:
                fetch_add(args, DONE, 1)
                task = fetch_add(args, TAKEN, 1)
            else:
                task += 1
        wait_for(args, DONE, args[19] + 1 if shared else 1)

    def integer_product(args: Any) -> None:
        weights, thread = pointer(args[10], types.uint8), fetch_add(args, 1, 1)
        tasks, threads = args[2], args[23]
        if thread < threads:  # the first weights come while the rows are quantized
            start = share_start(thread, tasks, threads) // args[16] * args[14]
            fetch_first(shifted(weights, start * args[20]))
        q = pointer(args[7], types.int8)
        scales, corrections = pointer(args[8], types.float32), pointer(args[9], types.int32)
        if args[26] != 0:
            q, scales, corrections = private_rows(), private_scales(), private_corrections()
        quantize_rows(args, thread, (q, scales, corrections))
        num_rows, inputs, num_outputs, group = args[5], args[6], args[13], args[21]
        num_blocks, groups = (inputs + BLOCK - 1) // BLOCK, (inputs + group - 1) // group
        bias, out = pointer(args[12], element), pointer(args[RESULT], element)
        sums = float_sums()
        panels = (num_outputs + WIDTH - 1) // WIDTH
        chunk, run, runs = args[14], args[15], args[16]
        counters, passed = pointer(args[22], types.int64), 0
        while True:
            task, passed = next_task(counters, thread, passed, tasks, threads)
            if task < 0:
                break
            first_panel, first = task // runs * chunk, task % runs * run
            rows = min(run, num_rows - first)
            own_q = shifted(q, first * num_blocks * row_bytes)
            own_scales = shifted(scales, first * groups)
            own_corrections = shifted(corrections, first * groups)
            for panel in range(first_panel, min(first_panel + chunk, panels)):
                for row in range(rows):
                    store16(sums, row * WIDTH, splat(f32(0.0)))
                own = shifted(weights, panel * args[20])
                multiply(own_q, own_scales, own_corrections, rows, own, inputs, group, sums)
                _finish(args, sums, panel, first, rows, out, bias)

    return integer_product


class IntegerProduct(RowProduct):
    """Product of rows with one packed weight: x (T, K) -> (T, N)."""

    def __init__(
        self,
        kernel: Launcher,
        layout: Layout,
        shape: tuple[int, int],
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        act: str | None,
        dtype: torch.dtype,
        few: FewRows | None = None,
        many: ManyRows | None = None,
    ) -> None:
        """Bind a kernel to its weights.

        weights: panels of bytes, the first axis that of panels. scales: float32 of the outputs,
        padded to whole panels. bias: (N,). dtype: that of the activations. few, many: kernels for
        few and for many rows, the latter of the same layout.
        """
        self.row_bytes = -(-shape[1] // BLOCK) * layout.row_bytes
        self.scale_bytes = -(-shape[1] // layout.group) * 4
        rows = ROW_BLOCK_BYTES // self.row_bytes // 16 * 16
        self.block_rows = max(LEAST_ROW_BLOCK, min(ROW_BLOCK, rows))
        fits = rows_that_fit(self.row_bytes + 2 * self.scale_bytes, self.block_rows)
        super().__init__(shape, dtype, fits)
        self.kernel, self.layout, self.few, self.many = kernel, layout, few, many
        bias = None if bias is None else bias.to(dtype).contiguous()
        self.kept = (weights, scales, bias)
        self.num_panels, self.panel_bytes = weights.shape[0], weights[0].numel()
        self.most_panels = max(1, CHUNK_BYTES // self.panel_bytes)
        self.addresses = tuple(0 if t is None else t.data_ptr() for t in self.kept)
        self.code = epilogue.CODES[act]

    def kernel_for(self, num_rows: int) -> Launcher:
        """Return the kernel for so many rows."""
        if self.many is not None and num_rows >= self.many.least:
            return self.many.kernel
        if self.few is not None and num_rows <= self.few.most:
            return self.few.kernel
        return self.kernel

    def plan(self, num_rows: int, threads: int) -> Plan:
        """Return the launch for so many rows."""
        quantized, scales = lines(num_rows * self.row_bytes), lines(num_rows * self.scale_bytes)
        private = num_rows == 1 and self.num_inputs <= PRIVATE_INPUTS
        counters = quantized + 2 * scales + lines(SLACK)
        at, number = scratch(counters + counter_bytes(threads))
        blocks = -(-num_rows // self.block_rows)
        chunk = min(self.most_panels, -(-self.num_panels // (threads * CHUNKS_PER_THREAD)))
        quantized_rows = 1 if num_rows < MANY_ROWS else 8
        groups = self.scale_bytes // 4
        own_groups = PART_GROUPS if num_rows < FEW_ROWS and not private else groups
        parts = -(-groups // own_groups)
        values = (
            *(-(-self.num_panels // chunk) * blocks, 0, 0, num_rows, self.num_inputs),
            *(at, at + quantized, at + quantized + scales),
            *self.addresses,
            *(self.num_outputs, chunk, self.block_rows, blocks, self.code),
            *(quantized_rows, -(-num_rows // quantized_rows) * parts, self.panel_bytes),
            *(self.layout.group, at + counters, threads, own_groups, parts),
            int(private),
        )
        launch = self.kernel_for(num_rows).on(
            threads, num_rows * self.num_inputs * self.num_outputs
        )
        return Plan(pack(*values), launch, threads, number)
