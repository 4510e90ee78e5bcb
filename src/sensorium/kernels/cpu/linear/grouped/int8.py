"""Products with int8 weights that have scales by groups, as some published files have them."""

from __future__ import annotations

import torch

from sensorium.kernels.cpu.linear.grouped.tile import STEPS, GroupLayout
from sensorium.kernels.cpu.linear.grouped.weight import GroupedWeight
from sensorium.kernels.cpu.linear.integers import STEP
from sensorium.kernels.cpu.numeric import WIDTH

LAYOUT = GroupLayout(8)


class GroupedInt8Weight(GroupedWeight):
    """Weight of int8 with scales by groups."""

    format = "int8"
    bits = 8

    @staticmethod
    def _place(panels: torch.Tensor, codes: torch.Tensor) -> None:
        # (P, 16, G, s, i) -> (P, G, s, 16, i)
        split = codes.unflatten(3, (STEPS, STEP)).permute(0, 2, 3, 1, 4)
        panels[:, :, : LAYOUT.weight_bytes] = split.flatten(2)

    def _codes(self, panel: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        steps = self.packed[:, :, : LAYOUT.weight_bytes].unflatten(2, (STEPS, WIDTH, STEP))
        own: torch.Tensor = steps[panel, :, :, lane].flatten(2)
        return own
