"""Products with int4 weights, which matrix tiles take as well."""

from __future__ import annotations

import functools

import torch

from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.launch import Launcher
from sensorium.kernels.cpu.linear import tiles
from sensorium.kernels.cpu.linear.grouped import weight
from sensorium.kernels.cpu.linear.grouped.tile import (
    GROUP,
    STEPS,
    SYMMETRIC,
    GroupLayout,
    compiled,
)
from sensorium.kernels.cpu.linear.grouped.weight import GroupedWeight
from sensorium.kernels.cpu.linear.integers import STEP, forms
from sensorium.kernels.cpu.numeric import WIDTH
from sensorium.kernels.weight import Multiply, QuantizedTensor

LAYOUT = GroupLayout(4)
"""Layout of symmetric weights, the only ones for which there are products on matrix tiles."""


@functools.cache
def kernel(dtype: torch.dtype, form: str) -> Launcher:
    """Return the kernel of symmetric weights, by vectors or by the tiles of a unit."""
    unit = tiles.units().get(form)
    if unit is None:
        return weight.kernel(LAYOUT, dtype, form)
    return compiled(LAYOUT, dtype, form, lambda: tiles.int4_panel(unit, LAYOUT.num_bytes))


def check_tiles(unit: amx.Unit) -> int:
    """Compare products by tiles with those by vectors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (40, 588), generator=generator, dtype=torch.int8)
    scales = torch.rand(40, 19, generator=generator) / 7
    packed = Int4Weight.pack(QuantizedTensor(values, scales, 4, GROUP), torch.float32)
    return tiles.compare(packed.bind_form, 588, unit.name, forms()[-1])


class Int4Weight(GroupedWeight):
    """Weight of int4 with scales by groups."""

    format = "int4"
    bits = 4

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        many = None
        if self.layout.offsets == SYMMETRIC and self.form not in tiles.units():
            many = tiles.many_rows("int4", "Int4Weight", self.dtype, kernel, check_tiles)
        return self.bind_form(self.form, bias, act, many)

    def kernel(self, form: str) -> Launcher:
        if self.layout.offsets == SYMMETRIC:
            return kernel(self.dtype, form)
        return super().kernel(form)

    @staticmethod
    def _place(panels: torch.Tensor, codes: torch.Tensor) -> None:
        # (P, 16, G, half, s, i) -> (P, G, half, s, 16, i)
        split = codes.unflatten(3, (2, STEPS // 2, STEP)).permute(0, 2, 3, 4, 1, 5)
        both = split[:, :, 0] | (split[:, :, 1] << 4)
        panels[:, :, : LAYOUT.weight_bytes] = both.flatten(2)

    def _codes(self, panel: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        halves = self.packed[:, :, : LAYOUT.weight_bytes].unflatten(2, (STEPS // 2, WIDTH, STEP))
        own = halves[panel, :, :, lane].flatten(2)
        return torch.cat((own & 0x0F, own >> 4), dim=2)
