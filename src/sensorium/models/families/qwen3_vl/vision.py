"""The vision tower of Qwen3-VL: learnt positions, and mergers after several blocks (DeepStack).

DeepStack: Meng et al., 2024. Positions are rotary, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sensorium.models.families.qwen2_vl.vision import (
    Grid,
    Merger,
    VisionBlock,
    VisionTower,
    frame_starts,
)
from sensorium.models.families.qwen3_vl.config import DeepVisionConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.media.pixels import Normalization


class DeepVisionBlock(VisionBlock):
    """Block of Qwen2-VL with other weight names of its MLP."""

    __slots__ = ()
    fc_names = ("linear_fc1", "linear_fc2")


class DeepVisionTower(VisionTower):
    """Vision tower with (1 + number of deep blocks) embeddings per merge cell, side by side."""

    block_class: type[Any] = DeepVisionBlock
    merger_names = ("norm", "linear_fc1", "linear_fc2")
    patch_bias = True
    config: DeepVisionConfig

    def __init__(
        self, config: DeepVisionConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config, normalization, options)
        self.table = torch.empty(0)
        self.deep_mergers = {
            block: Merger(config, self.norm_class, self.merger_names, joined_first=True)
            for block in config.deep_blocks
        }

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        yield from super().slots(prefix)
        table = (self.config.table_side**2, self.config.hidden_size)
        yield WeightSlot((Part(f"{prefix}pos_embed.weight", table),), self._load_table)
        for index, merger in enumerate(self.deep_mergers.values()):
            yield from merger.slots(f"{prefix}deepstack_merger_list.{index}")

    def _load_table(self, table: torch.Tensor) -> None:
        side = self.config.table_side
        self.table = owned(table).t().reshape(1, -1, side, side).contiguous()

    def merged(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Return embeddings (cells, (1 + deep blocks) * num_outputs).

        The deep ones are in the order of their blocks.
        """
        x.add_(torch.cat([self._positions(grid) for grid in grids]))
        cos, sin = self.rotary(grids)
        starts = frame_starts(grids)
        deep = []
        for index, block in enumerate(self.blocks):
            x = block(x, starts, cos, sin)
            if index in self.deep_mergers:
                deep.append(self.deep_mergers[index](x))
        return torch.cat([self.merger(x), *deep], dim=1)

    def _positions(self, grid: Grid) -> torch.Tensor:
        """Return learnt positions (t * h * w, size) of a grid, in the order of the patches.

        They are interpolated from the table.
        """
        t, h, w = grid
        merge = self.config.merge_size
        plane = torch.nn.functional.interpolate(
            self.table.float(), size=(h, w), mode="bilinear", align_corners=True
        )
        cells = plane[0].view(-1, h // merge, merge, w // merge, merge).permute(1, 3, 2, 4, 0)
        return cells.reshape(h * w, -1).to(self.table.dtype).repeat(t, 1)
