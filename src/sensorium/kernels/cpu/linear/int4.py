"""Products with int4 weights, a bf16 scale for each 32 inputs of an output.

Packed in panels of sixteen outputs, in each of them group by group of 32 inputs, that is eight
steps of four: 256 bytes of weights plus 8 and the sixteen outputs' scales, in one stream. Byte
``[s][n][i]`` of the 256 holds input ``4 s + i`` of output n in its low half and input
``4 (s + 4) + i`` in its high half.

A sum over a group is an exact int32. As float32, times the product of the weights' and the
activations' scale, the groups' sums are added in their order.

With AVX2 alone, bytes are multiplied by ``vpmaddubsw``; the sums of two products of each of the
eight steps add up to 8 * 2 * 15 * 127 = 30480 at most, which fits 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self

import llvmlite.ir as ir
import torch
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu import amx, huge_pages
from sensorium.kernels.cpu.launch import Launcher, compile_kernel
from sensorium.kernels.cpu.linear import tiles
from sensorium.kernels.cpu.linear.integer_kernel import (
    IntegerProduct,
    Layout,
    ManyRows,
    build,
)
from sensorium.kernels.cpu.linear.integers import (
    FETCH_AHEAD,
    I16,
    I64,
    STEP,
    Form,
    fetch_lines,
    for_each_count,
    forms,
    lanes,
    opaque,
)
from sensorium.kernels.cpu.numeric import ELEMENT, INLINE, WIDTH, intrinsic, njit, shifted
from sensorium.kernels.weight import Multiply, PackedWeight, QuantizedTensor

GROUP = 32
"""Inputs that share a scale, of weights and of rows."""
BIAS = 8
TILE_ROWS = {"avx2": 4, "vnni256": 6, "vnni512": 12}
"""Rows that are multiplied at once."""
STEPS = GROUP // STEP
WEIGHT_BYTES = GROUP * WIDTH // 2
GROUP_BYTES = WEIGHT_BYTES + 2 * WIDTH
"""Bytes of a panel and group: weights, scales."""


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


def _scales(form: Form, weights: ir.Value) -> list[ir.Value]:
    """Load a group's bf16 scales as float32."""
    builder, short = form.builder, lanes(I16, form.width)
    found = []
    for p in range(form.parts):
        raw = form.load(weights, WEIGHT_BYTES + 2 * p * form.width, short)
        bits = builder.shl(builder.zext(raw, form.sums), form.constant(form.sums, 16))
        found.append(builder.bitcast(bits, form.floats))
    return found


def _group_sums(
    form: Form, weights: ir.Value, rows: ir.Value, corrections: ir.Value, num_rows: int
) -> list[list[ir.Value]]:
    """Return the sums of a group for each row and part, corrected for the bias of the weights."""
    builder = form.builder
    starts = [form.repeated(corrections, 4 * r, form.sums) for r in range(num_rows)]
    kind = form.sums if form.vnni else form.shorts
    slots = [
        [cgutils.alloca_once(builder, kind) for _ in range(form.parts)] for _ in range(num_rows)
    ]
    for own, start in zip(slots, starts, strict=True):
        for slot in own:
            builder.store(start if form.vnni else form.constant(kind, 0), slot)
    # A loop whose length LLVM does not know: unrolled, it would be reordered into many more live
    # vectors than there are registers.
    with cgutils.for_range(builder, opaque(builder, STEPS // 2)) as loop:
        place = builder.mul(loop.index, I64(STEP))
        own_rows = builder.gep(rows, [place])
        own_weights = builder.gep(weights, [builder.mul(place, I64(WIDTH))])
        for step, steps in zip((0, STEPS // 2), _nibbles(form, own_weights), strict=True):
            for r in range(num_rows):
                row = form.repeated(own_rows, r * GROUP + STEP * step, form.bytes)
                for slot, own in zip(slots[r], steps, strict=True):
                    before = builder.load(slot)
                    if form.vnni:
                        after = form.multiply_bytes(before, own, row)
                    else:
                        after = form.add(before, form.multiply_pairs(own, row))
                    builder.store(after, slot)
    sums = [[builder.load(slot) for slot in own] for own in slots]
    if form.vnni:
        return sums
    ones = form.constant(form.shorts, 1)
    return [
        [form.add(form.multiply_shorts(short, ones), start) for short in own]
        for own, start in zip(sums, starts, strict=True)
    ]


def _emit_tile(builder: ir.IRBuilder, name: str, num_rows: int, args: Any) -> None:
    """Emit the products of ``num_rows`` rows with all groups of a panel."""
    q, scales, corrections, stride, weights, groups, totals = args
    form = Form(builder, name)
    slots = [
        [cgutils.alloca_once(builder, form.floats) for _ in range(form.parts)]
        for _ in range(num_rows)
    ]
    for r in range(num_rows):
        for p in range(form.parts):
            offset = 4 * (r * WIDTH + p * form.width)
            builder.store(form.load(totals, offset, form.floats), slots[r][p])
    with cgutils.for_range(builder, groups) as loop:
        own = builder.gep(weights, [builder.mul(loop.index, I64(GROUP_BYTES))])
        if FETCH_AHEAD:
            fetch_lines(builder, own, FETCH_AHEAD, GROUP_BYTES)
        place = builder.mul(loop.index, stride)
        row_at = builder.gep(q, [builder.mul(place, I64(GROUP))])
        word = builder.mul(place, I64(4))
        scales_at, corrections_at = builder.gep(scales, [word]), builder.gep(corrections, [word])
        sums = _group_sums(form, own, row_at, corrections_at, num_rows)
        weight_scales = _scales(form, own)
        for r in range(num_rows):
            row_scale = form.repeated(scales_at, 4 * r, form.floats)
            for p in range(form.parts):
                scale = builder.fmul(weight_scales[p], row_scale)
                total = form.scaled(sums[r][p], scale, builder.load(slots[r][p]))
                builder.store(total, slots[r][p])
    for r in range(num_rows):
        for p in range(form.parts):
            offset = 4 * (r * WIDTH + p * form.width)
            form.store(totals, offset, builder.load(slots[r][p]))


def _tile(name: str) -> Any:
    """Return the intrinsic that multiplies some rows with a panel."""

    @intrinsic
    def multiply_tile(
        typingctx: Any,
        rows: Any,
        q: Any,
        scales: Any,
        corrections: Any,
        stride: Any,
        weights: Any,
        groups: Any,
        totals: Any,
    ) -> Any:
        """Add the products of ``groups`` groups to totals (rows, 16).

        stride: rows between two groups of q, scales and corrections.
        """

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            byte = ir.IntType(8).as_pointer()
            q, scales, corrections, weights, totals = (
                builder.bitcast(args[i], byte) for i in (1, 2, 3, 5, 7)
            )
            operands = (q, scales, corrections, args[4], weights, args[6], totals)
            for_each_count(
                builder,
                args[0],
                TILE_ROWS[name],
                lambda number: _emit_tile(builder, name, number, operands),
            )
            return context.get_dummy_value()

        number = types.int64
        kinds = (number, q, scales, corrections, number, weights, number, totals)
        return types.void(*kinds), codegen

    return multiply_tile


def _panel(name: str) -> Any:
    """Return the inlined function that multiplies rows with a panel."""
    tile, most = _tile(name), TILE_ROWS[name]

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
                shifted(q, row * GROUP),
                shifted(scales, row),
                shifted(corrections, row),
                rows,
                weights,
                groups,
                shifted(sums, row * WIDTH),
            )

    return multiply


LAYOUT = Layout(GROUP, GROUP, BIAS)


def check_tiles(unit: amx.Unit) -> int:
    """Compare products by tiles with those by vectors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (40, 588), generator=generator, dtype=torch.int8)
    scales = torch.rand(40, 19, generator=generator) / 7
    weight = Int4Weight.pack(QuantizedTensor(values, scales, 4, GROUP), torch.float32)
    return tiles.compare(weight.bind_form, 588, unit.name, forms()[-1])


@functools.cache
def kernel(dtype: torch.dtype, form: str) -> Launcher:
    """Return the kernel for activations of ``dtype``, compiled or loaded at first use."""
    unit = tiles.units().get(form)
    panel = _panel(form) if unit is None else tiles.int4_panel(unit, GROUP_BYTES)
    function = build(ELEMENT[dtype], LAYOUT.row_bytes, BIAS, False, panel)
    return compile_kernel(function, f"int4_{str(dtype).removeprefix('torch.')}_{form}")


class Int4Weight(PackedWeight):
    """Weight of int4 with a bf16 scale per 32 inputs, packed for the integer kernel."""

    format = "int4"

    def __init__(
        self,
        packed: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        form: str | None = None,
    ) -> None:
        self.packed, self.dtype = packed, dtype
        self.num_outputs, self.num_inputs = shape
        self.form = form or forms()[-1]

    @staticmethod
    def takes(weight: QuantizedTensor) -> bool:
        """Return whether ``pack`` takes a weight: 4 bits, groups of a multiple of 32 inputs."""
        return weight.bits == 4 and (weight.scales.shape[1] == 1 or weight.group % GROUP == 0)

    @classmethod
    def pack(cls, weight: QuantizedTensor, dtype: torch.dtype) -> Self:
        """Pack a weight quantized to 4 bits by groups of a multiple of 32 inputs.

        Scales are rounded to bf16. Raises ValueError for other bits or groups.
        """
        num_outputs, num_inputs = weight.shape
        groups, given = -(-num_inputs // GROUP), weight.scales.shape[1]
        if not cls.takes(weight):
            raise ValueError("int4 products take 4 bits and groups of a multiple of 32 inputs")
        panels = -(-num_outputs // WIDTH)
        packed = huge_pages.shared_zeros((panels, groups, GROUP_BYTES), torch.uint8)
        repeated = weight.group // GROUP if given > 1 else groups
        scales = weight.scales.repeat_interleave(repeated, dim=1)[:, :groups].to(torch.bfloat16)
        band = max(1, PACK_VALUES // (WIDTH * num_inputs))
        for first in range(0, panels, band):
            rows = slice(first * WIDTH, (first + band) * WIDTH)
            _place(packed[first : first + band], weight.values[rows], scales[rows])
        return cls(packed, (num_outputs, num_inputs), dtype)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        many = None
        if self.form not in tiles.units():
            many = tiles.many_rows("int4", "Int4Weight", self.dtype, kernel, check_tiles)
        return self.bind_form(self.form, bias, act, many)

    def bind_form(
        self,
        form: str,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        many: ManyRows | None = None,
    ) -> Multiply:
        """Return ``bind`` in one form of instructions, with ``many`` for many rows."""
        own, packed = kernel(self.dtype, form), self.packed
        return IntegerProduct(*(own, LAYOUT, self.shape, packed, None, bias, act, self.dtype, many))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        panel, lane = ids // WIDTH, ids % WIDTH
        halves = self.packed[:, :, :WEIGHT_BYTES].unflatten(2, (STEPS // 2, WIDTH, STEP))
        own = halves[panel, :, :, lane].flatten(2)
        values = torch.cat((own & 0x0F, own >> 4), dim=2).float().sub_(BIAS)
        # The scales are the last of a group, two bytes each.
        shorts = self.packed.view(torch.bfloat16)
        scales = shorts[panel, :, WEIGHT_BYTES // 2 + lane]
        wide = values.mul_(scales.float()[:, :, None]).flatten(1)
        return wide[:, : self.num_inputs].to(self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"packed": self.packed}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        packed = tensors["packed"]
        form = (-(-shape[0] // WIDTH), -(-shape[1] // GROUP), GROUP_BYTES)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != form or not packed.is_contiguous():
            raise ValueError(f"these are not the panels of a weight of {shape}")
        return cls(packed, shape, dtype)


PACK_VALUES = 4 * 1024 * 1024
"""Weights that are packed at once: bounds temporary memory."""


def _place(panels: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Write values (rows, K) and scales (rows, G) into panels (P, G, GROUP_BYTES)."""
    num_panels, groups, _ = panels.shape
    num_rows, num_inputs = values.shape
    biased = torch.full((num_panels * WIDTH, groups * GROUP), BIAS, dtype=torch.uint8)
    torch.add(values, BIAS, out=(shifted_values := torch.empty_like(values)))
    biased[:num_rows, :num_inputs] = shifted_values.view(torch.uint8)
    # (P, 16, G, half, s, i) -> (P, G, half, s, 16, i)
    split = biased.view(num_panels, WIDTH, groups, 2, STEPS // 2, STEP).permute(0, 2, 3, 4, 1, 5)
    bytes_of_halves = split[:, :, 0] | (split[:, :, 1] << 4)
    panels[:, :, :WEIGHT_BYTES] = bytes_of_halves.flatten(2)
    padded = torch.zeros((num_panels * WIDTH, groups), dtype=torch.bfloat16)
    padded[:num_rows] = scales
    by_group = padded.view(num_panels, WIDTH, groups).transpose(1, 2).contiguous()
    panels[:, :, WEIGHT_BYTES:] = by_group.view(torch.uint8)
