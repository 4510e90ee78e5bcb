"""Kernels of products with weights that have a scale for each 32 inputs of an output.

Packed in panels of sixteen outputs, in each of them group by group of 32 inputs, that is eight
steps of four, in one stream: the integers, the sixteen outputs' scales, and what weights that are
not symmetric need beside (``GroupLayout``). For 4 bits, byte ``[s][n][i]`` of 256 holds input
``4 s + i`` of output n in its low half and input ``4 (s + 4) + i`` in its high half; for 8 bits,
byte ``[s][n][i]`` of 512 holds input ``4 s + i``.

A sum over a group is an exact int32, zero points included. As float32, times the product of the
weights' and the activations' scale, the groups' sums are added in their order; then, where there
are minimums, each times the sum of the group's activations.

With AVX2 alone, int4 is multiplied by ``vpmaddubsw``: the sums of two products of each of the eight
steps add up to 8 * 2 * 15 * 127 = 30480 at most, which fits 16 bits. int8 would saturate, and is
multiplied as 16-bit numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
import torch
from numba.core import cgutils

from sensorium.kernels.cpu.launch import Launcher, compile_kernel
from sensorium.kernels.cpu.linear.int8 import TILE_ROWS, emit_steps
from sensorium.kernels.cpu.linear.integer.kernel import Layout, build
from sensorium.kernels.cpu.linear.integers import (
    BLOCK,
    FETCH_AHEAD,
    I8,
    I64,
    STEP,
    Form,
    Values,
    fetch_lines,
    lanes,
    opaque,
    tile_function,
)
from sensorium.kernels.cpu.numeric import ELEMENT, INLINE, WIDTH, njit, shifted

GROUP = BLOCK
"""Inputs that share a scale, of weights and of rows."""
STEPS = GROUP // STEP
SYMMETRIC, ZEROS, MINIMUMS = "", "zeros", "minimums"
OFFSET_BYTES = {SYMMETRIC: 0, ZEROS: WIDTH, MINIMUMS: 2 * WIDTH}
"""Bytes of a group and panel for zero points (uint8) or for minimums (float16, negative)."""


@dataclass(frozen=True)
class GroupLayout:
    """Bytes of a group of a panel: integers, float16 scales, zero points or minimums.

    bits: 4 or 8. offsets: ``SYMMETRIC``, ``ZEROS`` or ``MINIMUMS``.
    """

    bits: int
    offsets: str = SYMMETRIC

    @property
    def weight_bytes(self) -> int:
        """Bytes of the integers."""
        return GROUP * WIDTH * self.bits // 8

    @property
    def offsets_at(self) -> int:
        """Place of the zero points or minimums, behind the scales."""
        return self.weight_bytes + 2 * WIDTH

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.offsets_at + OFFSET_BYTES[self.offsets]

    @property
    def bias(self) -> int:
        """Number added to integers, and their zero points, so that they have no sign.

        Those of 4 bits with zero points or minimums have none.
        """
        return 0 if self.bits == 4 and self.offsets != SYMMETRIC else 1 << (self.bits - 1)

    @property
    def name(self) -> str:
        """Name in those of compiled kernels."""
        return "_".join(filter(None, (f"int{self.bits}", "groups", self.offsets)))

    def rows(self, form: str) -> Layout:
        """Return the layout of quantized activations for a form of instructions."""
        pairs = self.bits == 8 and form == "avx2"
        correction = self.bias if self.offsets == SYMMETRIC else 1
        return Layout(GROUP, GROUP * (2 if pairs else 1), correction)


def _nibbles(form: Form, weights: ir.Value) -> list[list[ir.Value]]:
    """Load the weights of a step and of the fourth after it: bytes of each part."""
    builder = form.builder
    mask = form.constant(form.bytes, 0x0F)
    low, high = [], []
    for p in range(form.parts):
        raw = form.load(weights, STEP * p * form.width, form.bytes)
        low.append(builder.and_(raw, mask))
        wide = builder.bitcast(raw, form.shorts)
        moved = builder.lshr(wide, form.constant(form.shorts, 4))
        high.append(builder.and_(builder.bitcast(moved, form.bytes), mask))
    return [low, high]


def _half_floats(form: Form, weights: ir.Value, start: int) -> list[ir.Value]:
    """Load a number of float16 for each output of the panel as float32."""
    short = lanes(ir.HalfType(), form.width)
    loaded = [form.load(weights, start + 2 * p * form.width, short) for p in range(form.parts)]
    return [form.builder.fpext(raw, form.floats) for raw in loaded]


def _starts(
    form: Form, layout: GroupLayout, weights: ir.Value, corrections: ir.Value, num_rows: int
) -> Values:
    """Return what sums begin with: minus the sum of activations times zero point or bias."""
    builder = form.builder
    own = [form.repeated(corrections, 4 * r, form.sums) for r in range(num_rows)]
    if layout.offsets == MINIMUMS:
        bias = form.constant(form.sums, layout.bias)
        own = [builder.mul(correction, bias) for correction in own]
    if layout.offsets != ZEROS:
        return [[correction] * form.parts for correction in own]
    # Both factors fit 16 bits. The upper halves of the zero points are zero.
    zeros = []
    for p in range(form.parts):
        raw = form.load(weights, layout.offsets_at + p * form.width, lanes(I8, form.width))
        zeros.append(builder.bitcast(builder.zext(raw, form.sums), form.shorts))
    return [
        [form.multiply_shorts(zero, builder.bitcast(correction, form.shorts)) for zero in zeros]
        for correction in own
    ]


def _nibble_sums(form: Form, weights: ir.Value, rows: ir.Value, starts: Values) -> Values:
    """Return the sums of a group of 4 bits for each row and part."""
    builder = form.builder
    zeros = [[form.constant(form.shorts, 0) for _ in own] for own in starts]
    kind = form.sums if form.vnni else form.shorts
    slots = form.slots(kind, starts if form.vnni else zeros)
    # A loop whose length LLVM does not know: unrolled, it would be reordered into many more live
    # vectors than there are registers.
    with cgutils.for_range(builder, opaque(builder, STEPS // 2)) as loop:
        place = builder.mul(loop.index, I64(STEP))
        own_rows = builder.gep(rows, [place])
        own_weights = builder.gep(weights, [builder.mul(place, I64(WIDTH))])
        for step, steps in zip((0, STEPS // 2), _nibbles(form, own_weights), strict=True):
            for r, row_slots in enumerate(slots):
                row = form.repeated(own_rows, r * GROUP + STEP * step, form.bytes)
                for slot, own in zip(row_slots, steps, strict=True):
                    before = builder.load(slot)
                    if form.vnni:
                        after = form.multiply_bytes(before, own, row)
                    else:
                        after = form.add(before, form.multiply_pairs(own, row))
                    builder.store(after, slot)
    sums = form.loaded(slots)
    if form.vnni:
        return sums
    ones = form.constant(form.shorts, 1)
    return [
        [form.add(form.multiply_shorts(s, ones), start) for s, start in zip(a, b, strict=True)]
        for a, b in zip(sums, starts, strict=True)
    ]


def _byte_sums(form: Form, weights: ir.Value, rows: ir.Value, starts: Values) -> Values:
    """Return the sums of a group of 8 bits for each row and part."""
    slots = form.slots(form.sums, starts)
    emit_steps(form, [slots], weights, rows)
    return form.loaded(slots)


def _emit_tile(
    builder: ir.IRBuilder, num_rows: int, args: Any, name: str, layout: GroupLayout
) -> None:
    """Emit the products of ``num_rows`` rows with all groups of a panel."""
    q, scales, corrections, stride, weights, groups, totals = args
    form = Form(builder, name)
    slots = form.load_totals(totals, num_rows)
    multiply = _nibble_sums if layout.bits == 4 else _byte_sums
    with cgutils.for_range(builder, groups) as loop:
        own = builder.gep(weights, [builder.mul(loop.index, I64(layout.num_bytes))])
        if num_rows > 1:
            fetch_lines(builder, own, FETCH_AHEAD, layout.num_bytes)
        place = builder.mul(loop.index, stride)
        row_at = builder.gep(q, [builder.mul(place, I64(layout.rows(name).row_bytes))])
        word = builder.mul(place, I64(4))
        scales_at, corrections_at = builder.gep(scales, [word]), builder.gep(corrections, [word])
        starts = _starts(form, layout, own, corrections_at, num_rows)
        sums = multiply(form, own, row_at, starts)
        factors = _half_floats(form, own, layout.weight_bytes)
        least = None
        if layout.offsets == MINIMUMS:
            least = _half_floats(form, own, layout.offsets_at)
        for r in range(num_rows):
            row_scale = form.repeated(scales_at, 4 * r, form.floats)
            for p in range(form.parts):
                scale = builder.fmul(factors[p], row_scale)
                total = form.scaled(sums[r][p], scale, builder.load(slots[r][p]))
                if least is not None:
                    correction = form.repeated(corrections_at, 4 * r, form.sums)
                    shift = builder.fmul(least[p], row_scale)
                    total = form.scaled(correction, shift, total)
                builder.store(total, slots[r][p])
    form.store_totals(totals, slots)


def _panel(name: str, layout: GroupLayout) -> Any:
    """Return the inlined function that multiplies rows with a panel."""
    most = TILE_ROWS[name]
    tile = tile_function(most, functools.partial(_emit_tile, name=name, layout=layout))
    row_bytes = layout.rows(name).row_bytes

    @njit(**INLINE)
    def multiply(
        q: Any,
        scales: Any,
        corrections: Any,
        rows: Any,
        weights: Any,
        inputs: Any,
        group: Any,
        sums: Any,
    ) -> None:
        groups = (inputs + GROUP - 1) // GROUP
        for row in range(0, rows, most):
            tile(
                min(most, rows - row),
                shifted(q, row * row_bytes),
                shifted(scales, row),
                shifted(corrections, row),
                rows,
                weights,
                groups,
                shifted(sums, row * WIDTH),
            )

    return multiply


def compiled(
    layout: GroupLayout, dtype: torch.dtype, form: str, panel: Callable[[], Any] | None = None
) -> Launcher:
    """Return the kernel for activations of ``dtype``, compiled or loaded.

    panel: makes the product with a panel, by default the one with vectors.
    """
    rows = layout.rows(form)
    multiply = _panel(form, layout) if panel is None else panel()
    pairs = rows.row_bytes > GROUP
    function = build(ELEMENT[dtype], rows.row_bytes, rows.bias, pairs, multiply)
    return compile_kernel(function, f"{layout.name}_{str(dtype).removeprefix('torch.')}_{form}")
