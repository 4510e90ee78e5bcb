"""The vision tower of Qwen3-VL: learnt positions besides the rotary ones, and mergers after several blocks (DeepStack,
Meng et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sensorium.layers.linear import Linear
from sensorium.layers.mlp import PlainMLP
from sensorium.layers.norm import LayerNorm
from sensorium.models.interface import BuildOptions
from sensorium.models.pixels import Normalization
from sensorium.models.qwen2_vl.vision import (
    CHANNELS,
    NORM_EPS,
    Grid,
    VisionBlock,
    VisionTower,
    frame_starts,
)
from sensorium.models.qwen3_vl.config import DeepVisionConfig
from sensorium.models.weights import Part, Slot, linear_slot, norm_slot, owned


class DeepVisionBlock(VisionBlock):
    """Qwen2-VL's block, whose MLP is spelled otherwise."""

    __slots__ = ()
    fc_names = ("linear_fc1", "linear_fc2")


class Merger:
    """Joins the patches of a merge cell into one embedding: norm of the patches, or of the joined cell, then an MLP."""

    __slots__ = ("cell", "joined_first", "mlp", "norm")

    def __init__(self, config: DeepVisionConfig, joined_first: bool) -> None:
        self.cell = config.hidden_size * config.merge_size**2
        self.joined_first = joined_first
        self.norm = LayerNorm(self.cell if joined_first else config.hidden_size, NORM_EPS)
        self.mlp = PlainMLP(self.cell, self.cell, config.num_outputs, act="gelu")

    def slots(self, name: str) -> Iterator[Slot]:
        """Weights under ``name``."""
        yield norm_slot(self.norm, f"{name}.norm")
        yield linear_slot(self.mlp.fc1, [(f"{name}.linear_fc1", self.cell)])
        yield linear_slot(self.mlp.fc2, [(f"{name}.linear_fc2", self.mlp.fc2.num_outputs)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(P, size) -> (cells, num_outputs)."""
        cells = self.norm(x.view(-1, self.cell)) if self.joined_first else self.norm(x)
        return self.mlp(cells.view(-1, self.cell))


class DeepVisionTower(VisionTower):
    """Gives (1 + number of deep blocks) embeddings per merge cell, side by side."""

    block_class: type[Any] = DeepVisionBlock
    config: DeepVisionConfig

    def __init__(
        self, config: DeepVisionConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config, normalization, options)
        self.patch = Linear(self.patch.num_inputs, config.hidden_size, bias=True)
        self.table = torch.empty(0)
        self.last_merger = Merger(config, joined_first=False)
        self.deep_mergers = {
            block: Merger(config, joined_first=True) for block in config.deep_blocks
        }

    def slots(self, prefix: str) -> Iterator[Slot]:
        """Weights under ``prefix``."""
        config, own = self.config, f"{prefix}patch_embed.proj"
        size = config.patch_size
        kernel = (config.hidden_size, CHANNELS, config.temporal_patch_size, size, size)
        parts = (Part(f"{own}.weight", kernel), Part(f"{own}.bias", (config.hidden_size,)))
        yield Slot(parts, self._load_patch)
        table = (config.table_side**2, config.hidden_size)
        yield Slot((Part(f"{prefix}pos_embed.weight", table),), self._load_table)
        for index, block in enumerate(self.blocks):
            yield from block.slots(config, f"{prefix}blocks.{index}")
        yield from self.last_merger.slots(f"{prefix}merger")
        for index, merger in enumerate(self.deep_mergers.values()):
            yield from merger.slots(f"{prefix}deepstack_merger_list.{index}")

    def _load_patch(self, kernel: torch.Tensor, *bias: torch.Tensor) -> None:
        self.patch.load(owned(kernel).flatten(1), *map(owned, bias))

    def _load_table(self, table: torch.Tensor) -> None:
        side = self.config.table_side
        self.table = owned(table).t().reshape(1, -1, side, side).contiguous()

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Embeddings (t * h * w / merge_size^2, (1 + deep blocks) * num_outputs) of each item; see ``VisionTower``."""
        patches, grids = [], []
        for item in pixels:
            rows, grid = self.patches(self.scale.to_device(item))
            patches.append(rows)
            grids.append(grid)
        x = self.patch(torch.cat(patches) if len(patches) > 1 else patches[0])
        x.add_(torch.cat([self._positions(grid) for grid in grids]))
        cos, sin = self.rotary(grids)
        starts = frame_starts(grids)
        deep = []
        for index, block in enumerate(self.blocks):
            x = block(x, starts, cos, sin)
            if (
                index in self.deep_mergers
            ):  # in the order of the blocks, whatever that of the configuration
                deep.append(self.deep_mergers[index](x))
        merged = torch.cat([self.last_merger(x), *deep], dim=1)
        cells = self.config.merge_size**2
        return list(merged.split([t * h * w // cells for t, h, w in grids]))

    def _positions(self, grid: Grid) -> torch.Tensor:
        """Learnt positions (t * h * w, size) of a grid, interpolated from the table, in the order of the patches."""
        t, h, w = grid
        merge = self.config.merge_size
        plane = torch.nn.functional.interpolate(
            self.table.float(), size=(h, w), mode="bilinear", align_corners=True
        )
        cells = plane[0].view(-1, h // merge, merge, w // merge, merge).permute(1, 3, 2, 4, 0)
        return cells.reshape(h * w, -1).to(self.table.dtype).repeat(t, 1)
