"""Products with int8 weights, one scale for each output.

Packed in panels of sixteen outputs, in each of them step by step of four inputs:
``[N / 16][K / 4][16][4]`` bytes, the weight plus 128. A sum over a group of 64 inputs is an exact
int32; the groups' sums times the activations' scales are added in float32 in the order of the
groups, and the total is multiplied by the output's scale.

With AVX2 alone bytes are multiplied as 16-bit numbers (``vpmaddwd``): the even bytes of four by
inputs 0 and 2, the odd ones by 1 and 3. Multiplying bytes directly (``vpmaddubsw``) would saturate.
Many rows go crosswise there (``integer.crossed``). For one or two rows (``SIGNS``) magnitudes of
weights are multiplied by activations with the weights' signs: two products of at most 128 * 127
fit 16 bits. That takes fewer instructions for a byte of weights, and more for a row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self

import llvmlite.ir as ir
import torch
from numba.core import cgutils

from sensorium.kernels.cpu import amx, huge_pages
from sensorium.kernels.cpu.launch import Launcher, compile_kernel
from sensorium.kernels.cpu.linear import tiles
from sensorium.kernels.cpu.linear.integer.crossed import (
    CROSSED_ROWS,
    GROUP,
    buffer,
    crossed_tile,
    rows_of,
    widen,
)
from sensorium.kernels.cpu.linear.integer.kernel import (
    FewRows,
    IntegerProduct,
    Layout,
    ManyRows,
    build,
)
from sensorium.kernels.cpu.linear.integers import (
    BLOCK,
    FETCH_AHEAD,
    I64,
    SIGNS,
    STEP,
    STEP_BYTES,
    Form,
    Values,
    fetch_lines,
    forms,
    opaque,
    tile_function,
)
from sensorium.kernels.cpu.numeric import ELEMENT, INLINE, WIDTH, njit, shifted
from sensorium.kernels.weight import Multiply, PackedWeight, QuantizedTensor

BIAS = 128
TILE_ROWS = {"avx2": 4, SIGNS: 2, "vnni256": 6, "vnni512": 12}
"""Rows that are multiplied at once: as many as keep their sums in registers."""


def _emit_step(
    form: Form,
    sums: Values,
    w: ir.Value,
    w_at: Any,
    q: ir.Value,
    q_at: Any,
) -> None:
    """Add the products of one step to the sums (stack slots) of each row and part."""
    builder = form.builder
    size = 4 * form.width
    loaded = [form.load(w, builder.add(w_at, I64(p * size)), form.bytes) for p in range(form.parts)]
    if form.vnni:
        for r, own in enumerate(sums):
            row = form.repeated(q, builder.add(q_at, I64(r * BLOCK)), form.bytes)
            for slot, value in zip(own, loaded, strict=True):
                builder.store(form.multiply_bytes(builder.load(slot), value, row), slot)
        return
    if form.name == SIGNS:
        _emit_signs(form, sums, loaded, q, q_at)
        return
    _emit_pairs(form, sums, form.halves(loaded), q, q_at)


def _emit_signs(
    form: Form,
    sums: Values,
    loaded: list[ir.Value],
    q: ir.Value,
    q_at: Any,
) -> None:
    """Add the products of one step: magnitudes of weights by bytes of rows with their signs."""
    builder = form.builder
    bias, ones = form.constant(form.bytes, BIAS), form.constant(form.shorts, 1)
    signed = [builder.xor(value, bias) for value in loaded]
    sizes = [form.magnitudes(value) for value in signed]
    for r, own in enumerate(sums):
        row = form.repeated(q, builder.add(q_at, I64(r * BLOCK)), form.bytes)
        for p, slot in enumerate(own):
            pairs = form.multiply_pairs(sizes[p], form.with_signs(row, signed[p]))
            total = form.add(builder.load(slot), form.multiply_shorts(pairs, ones))
            builder.store(total, slot)


def _emit_pairs(
    form: Form,
    sums: Values,
    halves: Values,
    q: ir.Value,
    q_at: ir.Value,
) -> None:
    """Add the products of one step of 16-bit weights."""
    builder = form.builder
    q_at = builder.shl(q_at, I64(1))
    for r, own in enumerate(sums):
        for half, values in enumerate(halves):
            offset = builder.add(q_at, I64(r * 2 * BLOCK + 4 * half))
            row = form.repeated(q, offset, form.shorts)
            for slot, value in zip(own, values, strict=True):
                total = form.add(builder.load(slot), form.multiply_shorts(value, row))
                builder.store(total, slot)


def _emit_tile(builder: ir.IRBuilder, num_rows: int, args: Any, name: str) -> None:
    """Emit the products of ``num_rows`` rows with blocks of a panel, group by group."""
    q, scales, corrections, stride, weights, blocks, totals = args
    form = Form(builder, name)
    floats = form.load_totals(totals, num_rows)
    per_group = I64(GROUP // BLOCK)
    groups = builder.udiv(builder.add(blocks, I64(GROUP // BLOCK - 1)), per_group)
    with cgutils.for_range(builder, groups) as group:
        first = builder.mul(group.index, per_group)
        left = builder.sub(blocks, first)
        own_blocks = builder.select(builder.icmp_signed("<", left, per_group), left, per_group)
        word = builder.mul(builder.mul(group.index, stride), I64(4))
        sums = _group_sums(form, num_rows, builder.gep(corrections, [word]))
        with cgutils.for_range(builder, own_blocks) as block:
            index = builder.add(first, block.index)
            _emit_block(form, sums, builder.mul(index, stride), index, q, weights)
        own_scales = builder.gep(scales, [word])
        for r, own in enumerate(floats):
            scale = form.repeated(own_scales, 4 * r, form.floats)
            for p, slot in enumerate(own):
                total = functools.reduce(form.add, (builder.load(s[r][p]) for s in sums))
                builder.store(form.scaled(total, scale, builder.load(slot)), slot)
    form.store_totals(totals, floats)


def _group_sums(form: Form, num_rows: int, corrections: ir.Value) -> list[Values]:
    """Return sets of sums of a group: the first starts with the corrections, others with zero.

    Few rows have too few sums to hide the latency of an instruction: their steps take turns.
    """
    own = [[form.repeated(corrections, 4 * r, form.sums)] * form.parts for r in range(num_rows)]
    zeros = [[form.constant(form.sums, 0)] * form.parts] * num_rows
    sets = max(1, 4 // num_rows) if form.vnni else 1
    return [form.slots(form.sums, starts) for starts in (own, *[zeros] * (sets - 1))]


def _emit_block(
    form: Form, sums: list[Values], place: ir.Value, index: ir.Value, q: ir.Value, weights: ir.Value
) -> None:
    """Add the products of a block of inputs; ``place``: rows before it in ``q``."""
    builder = form.builder
    block_bytes = I64(2 * BLOCK if form.name == "avx2" else BLOCK)
    own_q = builder.gep(q, [builder.mul(place, block_bytes)])
    own_w = builder.gep(weights, [builder.mul(index, I64(BLOCK * WIDTH))])
    if form.name != SIGNS:
        fetch_lines(builder, own_w, FETCH_AHEAD, BLOCK * WIDTH)
    emit_steps(form, sums, own_w, own_q)


def emit_steps(form: Form, sums: list[Values], weights: ir.Value, q: ir.Value) -> None:
    """Add the products of the steps of a block to sets of sums, which take turns."""
    builder, num_rows = form.builder, len(sums[0])
    unrolled = 4 if form.vnni or form.name == SIGNS or num_rows == 1 else 1
    # A loop whose length LLVM does not know: unrolled, it would need too many registers.
    with cgutils.for_range(builder, opaque(builder, BLOCK // STEP // unrolled)) as loop:
        for step in range(unrolled):
            index = builder.add(builder.mul(loop.index, I64(unrolled)), I64(step))
            w_at, q_at = builder.mul(index, I64(STEP_BYTES)), builder.mul(index, I64(STEP))
            _emit_step(form, sums[step % len(sums)], weights, w_at, q, q_at)


def _panel(name: str) -> Any:
    """Return the inlined function that multiplies rows with a panel."""
    most = TILE_ROWS[name]
    tile = tile_function(most, functools.partial(_emit_tile, name=name))
    pairs = name == "avx2"
    row_bytes = BLOCK * (2 if pairs else 1)
    first_rows = rows_of(name)

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
        padded = (inputs + BLOCK - 1) // BLOCK * BLOCK
        if rows <= most:
            tile(rows, q, scales, corrections, rows, weights, padded // BLOCK, sums)
            return
        wide = buffer()
        first = first_rows(rows)
        for start in range(0, padded, group):
            blocks = min(group, padded - start) // BLOCK
            own = shifted(weights, start * WIDTH)
            q_place, place = start // BLOCK * rows, start // group * rows
            if pairs and first > 0:
                widen(own, blocks * (BLOCK // STEP), wide)
                for row in range(0, first, CROSSED_ROWS):
                    crossed_tile(
                        CROSSED_ROWS,
                        shifted(q, (q_place + row) * row_bytes),
                        shifted(scales, place + row),
                        shifted(corrections, place + row),
                        rows,
                        wide,
                        blocks,
                        shifted(sums, row * WIDTH),
                    )
            for row in range(first, rows, most):
                tile(
                    min(most, rows - row),
                    shifted(q, (q_place + row) * row_bytes),
                    shifted(scales, place + row),
                    shifted(corrections, place + row),
                    rows,
                    own,
                    blocks,
                    shifted(sums, row * WIDTH),
                )

    return multiply


def check_tiles(unit: amx.Unit) -> int:
    """Compare products by tiles with those by vectors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (40, 588), generator=generator, dtype=torch.int8)
    scales = torch.rand(40, 1, generator=generator) / 127
    weight = Int8Weight.pack(QuantizedTensor(values, scales, 8, 588), torch.float32)
    return tiles.compare(weight.bind_form, 588, unit.name, forms()[-1])


def layout(form: str) -> Layout:
    """Return the layout of quantized activations."""
    return Layout(GROUP, BLOCK * (2 if form == "avx2" else 1), BIAS)


@functools.cache
def kernel(dtype: torch.dtype, form: str) -> Launcher:
    """Return the kernel for activations of ``dtype``, compiled or loaded at first use."""
    pairs = form == "avx2"
    unit = tiles.units().get(form)
    panel = _panel(form) if unit is None else tiles.int8_panel(unit)
    own_rows = rows_of(form)
    bias = 0 if form == SIGNS else BIAS
    function = build(ELEMENT[dtype], layout(form).row_bytes, bias, pairs, panel, own_rows)
    return compile_kernel(function, f"int8_{str(dtype).removeprefix('torch.')}_{form}")


class Int8Weight(PackedWeight):
    """Weight of int8 with a float32 scale per output, packed for the integer kernel."""

    format = "int8"

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        form: str | None = None,
    ) -> None:
        self.packed, self.scales, self.dtype = packed, scales, dtype
        self.num_outputs, self.num_inputs = shape
        self.form = form or forms()[-1]

    @staticmethod
    def takes(weight: QuantizedTensor) -> bool:
        """Return whether ``pack`` takes a weight: 8 bits, one scale for each output alone."""
        symmetric = weight.zeros is None and weight.minimums is None
        return weight.bits == 8 and weight.scales.shape[1] == 1 and symmetric

    @classmethod
    def pack(cls, weight: QuantizedTensor, dtype: torch.dtype) -> Self:
        """Pack a weight quantized to 8 bits with one scale per output.

        Raises ValueError for other bits or groups.
        """
        num_outputs, num_inputs = weight.shape
        if not cls.takes(weight):
            raise ValueError("int8 products take 8 bits and one scale for each output")
        panels, steps = -(-num_outputs // WIDTH), -(-num_inputs // BLOCK) * (BLOCK // STEP)
        packed = huge_pages.shared_zeros((panels, steps, WIDTH, STEP), torch.uint8)
        packed.fill_(BIAS)
        full = num_outputs // WIDTH
        _place(packed[:full], weight.values[: full * WIDTH])
        if full < panels:
            last = weight.values.new_zeros((WIDTH, num_inputs))
            last[: num_outputs - full * WIDTH] = weight.values[full * WIDTH :]
            _place(packed[full:], last)
        scales = torch.zeros(panels * WIDTH)
        scales[:num_outputs] = weight.scales[:, 0]
        return cls(packed, scales, (num_outputs, num_inputs), dtype)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        many = None
        if layout(self.form) == layout("") and self.form not in tiles.units():
            many = tiles.many_rows("int8", "Int8Weight", self.dtype, kernel, check_tiles)
        return self.bind_form(self.form, bias, act, many)

    def bind_form(
        self,
        form: str,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        many: ManyRows | None = None,
    ) -> Multiply:
        """Return ``bind`` in one form of instructions, with ``many`` for many rows."""
        own, used, scales = kernel(self.dtype, form), layout(form), self.scales
        few = FewRows(TILE_ROWS[SIGNS], kernel(self.dtype, SIGNS)) if form == "avx2" else None
        return IntegerProduct(
            *(own, used, self.shape, self.packed, scales, bias, act, self.dtype, few, many)
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        chosen = self.packed[ids // WIDTH, :, ids % WIDTH].flatten(1)[:, : self.num_inputs]
        values = chosen.to(torch.int16).sub_(BIAS).float()
        return values.mul_(self.scales[ids][:, None]).to(self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"packed": self.packed, "scales": self.scales}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        packed, scales = tensors["packed"], tensors["scales"]
        panels, steps = -(-shape[0] // WIDTH), -(-shape[1] // BLOCK) * (BLOCK // STEP)
        forms = (panels, steps, WIDTH, STEP), (panels * WIDTH,)
        if (tuple(packed.shape), tuple(scales.shape)) != forms or not (
            packed.dtype == torch.uint8
            and scales.dtype == torch.float32
            and packed.is_contiguous()
            and scales.is_contiguous()
        ):
            raise ValueError(f"these are not the panels of a weight of {shape}")
        return cls(packed, scales, shape, dtype)


def _place(panels: torch.Tensor, values: torch.Tensor) -> None:
    """Write values (P * 16, K) into panels (P, steps, 16, 4), biased."""
    num_panels, _, _, _ = panels.shape
    num_inputs = values.shape[1]
    # The bias flips the sign bit of a byte in two's complement.
    unsigned = values.contiguous().view(torch.uint8)
    whole = num_inputs // STEP
    by_panel = unsigned.view(num_panels, WIDTH, num_inputs)
    steps = by_panel[:, :, : whole * STEP].unflatten(2, (whole, STEP)).transpose(1, 2)
    panels[:, :whole] = steps
    panels[:, :whole].bitwise_xor_(BIAS)
    if rest := num_inputs % STEP:
        panels[:, whole, :, :rest] = by_panel[:, :, whole * STEP :]
        panels[:, whole, :, :rest].bitwise_xor_(BIAS)
