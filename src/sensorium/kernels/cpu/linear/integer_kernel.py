"""Kernel of products with int8 and int4 weights: quantized rows, tasks, results.

One launch does it all. The threads first quantize the rows, wait for each other, and then share the
outputs: a task is a chunk of neighbouring panels (sixteen outputs) for a block of rows. Within it
each panel is read from memory once for all rows of the block.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu.launch import NUM_ARGS, Args, Launcher
from sensorium.kernels.cpu.linear import epilogue
from sensorium.kernels.cpu.linear.integers import (
    build_quantize,
    local_array,
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
_ARGUMENTS = struct.Struct(f"21q{8 * (NUM_ARGS - 21)}x")
MANY_ROWS = 64
"""Rows from which on a task of quantization takes several."""
PADDING = 32
"""Inputs are padded with zeros to a multiple of this."""


@dataclass(frozen=True)
class Layout:
    """Quantized activations of T rows: for each group its T rows, of ``row_bytes`` each."""

    group: int
    """Inputs that share a scale."""
    row_bytes: int
    """Bytes of a group of a row."""
    bias: int
    """Number added to weights so that they have no sign."""


@njit(**INLINE)
def _finish(args: Any, sums: Any, panel: Any, first: Any, rows: Any, out: Any, bias: Any) -> None:
    """Scale the float sums of a panel, add the bias, apply the activation function and store."""
    num_outputs, code = args[13], args[17]
    column = panel * WIDTH
    width = min(WIDTH, num_outputs - column)
    scale, shift = splat(f32(1.0)), splat(f32(0.0))
    if args[10] != 0:
        scale = load16(pointer(args[10], types.float32), column)
    if args[11] != 0:
        shift = load16(bias, column) if width == WIDTH else load_part(bias, column, width)
    for row in range(rows):
        value = epilogue.activate(fma(load16(sums, row * WIDTH), scale, shift), code)
        place = (first + row) * num_outputs + column
        if width == WIDTH:
            store16(out, place, value)
        else:
            store_part(out, place, value, width)


def build(element: Any, layout: Layout, pairs: bool, multiply: Any) -> Callable[[Any], None]:
    """Build the kernel for activations and results of one type.

    multiply: ``multiply(q, scales, corrections, num_rows, first, rows, weights, inputs, sums)``
    adds the products of a panel with some rows to ``sums``. args: x, rows, inputs, quantized rows,
    their scales, corrections (minus the bias of weights times the sum of a group), packed weights,
    scales of outputs (0: none), bias (0: none), results, outputs, panels of a task, rows of a
    block, blocks, activation code, rows quantized by a task, such tasks, bytes of a panel. The last
    two of the array count the tasks of quantization taken and done.
    """
    quantize = build_quantize(pairs)
    group, row_bytes, weight_bias = layout.group, layout.row_bytes, layout.bias
    float_sums = local_array(types.float32, ROW_BLOCK * WIDTH)

    @njit(**INLINE)
    def quantize_rows(args: Any) -> None:
        num_rows, inputs = args[4], args[5]
        padded = (inputs + PADDING - 1) // PADDING * PADDING
        scales, corrections = pointer(args[7], types.float32), pointer(args[8], types.int32)
        while True:
            task = fetch_add(args, 30, 1)
            if task >= args[19]:
                break
            first = task * args[18]
            for row in range(first, min(first + args[18], num_rows)):
                source = shifted(pointer(args[3], element), row * inputs)
                for start in range(0, padded, group):
                    place = start // group * num_rows + row
                    out = shifted(pointer(args[6], types.int8), place * row_bytes)
                    whole = min(group, padded - start)
                    size = min(group, inputs - start)
                    scale, total = quantize(source, start, size, whole, out)
                    scales[place] = scale
                    corrections[place] = -weight_bias * total
            fetch_add(args, 31, 1)
        wait_for(args, 31, args[19])

    def integer_product(args: Any) -> None:
        quantize_rows(args)
        num_rows, inputs, num_outputs = args[4], args[5], args[13]
        q = pointer(args[6], types.int8)
        scales, corrections = pointer(args[7], types.float32), pointer(args[8], types.int32)
        weights = pointer(args[9], types.uint8)
        bias, out = pointer(args[11], element), pointer(args[12], element)
        sums = float_sums()
        panels, chunk, block, blocks = (
            (num_outputs + WIDTH - 1) // WIDTH,
            args[14],
            args[15],
            args[16],
        )
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            first_panel, first = task // blocks * chunk, task % blocks * block
            rows = min(block, num_rows - first)
            for panel in range(first_panel, min(first_panel + chunk, panels)):
                for row in range(rows):
                    store16(sums, row * WIDTH, splat(f32(0.0)))
                own = shifted(weights, panel * args[20])
                multiply(q, scales, corrections, num_rows, first, rows, own, inputs, sums)
                _finish(args, sums, panel, first, rows, out, bias)

    return integer_product


class IntegerProduct:
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
    ) -> None:
        """Bind a kernel to its weights.

        weights: panels of bytes, the first axis that of panels. scales: float32 of the outputs,
        padded to whole panels. bias: (N,). dtype: that of the activations.
        """
        self.kernel, self.layout = kernel, layout
        self.num_outputs, self.num_inputs = shape
        self.dtype = dtype
        bias = None if bias is None else bias.to(dtype).contiguous()
        self.kept = (weights, scales, bias)
        self.num_panels, self.panel_bytes = weights.shape[0], weights[0].numel()
        num_groups = -(-self.num_inputs // layout.group)
        self.row_bytes, self.scale_bytes = num_groups * layout.row_bytes, num_groups * 4
        rows = ROW_BLOCK_BYTES // self.row_bytes // 16 * 16
        self.block_rows = max(LEAST_ROW_BLOCK, min(ROW_BLOCK, rows))
        self.most_panels = max(1, CHUNK_BYTES // self.panel_bytes)
        self.addresses = tuple(0 if t is None else t.data_ptr() for t in self.kept)
        self.code = epilogue.CODES[act]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2:
            return self(x.flatten(0, -2)).view(*x.shape[:-1], self.num_outputs)
        if x.shape[1] != self.num_inputs or x.dtype != self.dtype:
            raise ValueError(
                f"rows of {x.shape[1]} {x.dtype} for a weight of {self.num_inputs} {self.dtype}"
            )
        num_rows = x.shape[0]
        out = x.new_empty((num_rows, self.num_outputs))
        if num_rows == 0:
            return out
        x = x.contiguous()
        quantized_bytes, scale_bytes = num_rows * self.row_bytes, num_rows * self.scale_bytes
        scratch = torch.empty(quantized_bytes + 2 * scale_bytes, dtype=torch.uint8)
        at = scratch.data_ptr()
        blocks = -(-num_rows // self.block_rows)
        chunk = -(-self.num_panels // (torch.get_num_threads() * CHUNKS_PER_THREAD))
        chunk = min(self.most_panels, chunk)
        quantized_rows = 1 if num_rows < MANY_ROWS else 8
        packed = _ARGUMENTS.pack(
            *(0, 0, -(-self.num_panels // chunk) * blocks),
            *(x.data_ptr(), num_rows, self.num_inputs),
            *(at, at + quantized_bytes, at + quantized_bytes + scale_bytes),
            *self.addresses,
            *(out.data_ptr(), self.num_outputs, chunk, self.block_rows, blocks, self.code),
            *(quantized_rows, -(-num_rows // quantized_rows), self.panel_bytes),
        )
        # The constructor of the array takes three times as long.
        args = Args.from_buffer_copy(packed)
        self.kernel.for_weight(num_rows * self.num_inputs * self.num_outputs)(args)
        return out
