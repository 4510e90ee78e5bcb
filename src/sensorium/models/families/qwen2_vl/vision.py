"""The vision tower of Qwen2-VL (Wang et al., 2024).

Any resolution, two-dimensional rotary, patches merged 2 x 2.

A *patch* is temporal_patch_size frames of patch_size x patch_size pixels. The patches of a merge
cell are adjacent rows, so that the merger is a reshape. For a grid of 1 x 4 x 4 patches, merged 2 x
2, the rows come in this order:

     0  1 |  4  5
     2  3 |  6  7
    ------+------
     8  9 | 12 13
    10 11 | 14 15
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from sensorium.layers.attention import VisionAttention
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import PlainMLP
from sensorium.layers.norm import LayerNorm
from sensorium.layers.rotary import axial_cos_sin
from sensorium.models.families.qwen2_vl.config import VisionConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import linear_slot, norm_slot
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.clip import PixelScale

NORM_EPS = 1e-6
CHANNELS = 3

Grid = tuple[int, int, int]
"""Temporal, vertical and horizontal number of patches."""


class VisionBlock:
    """Pre-norm block: attention with rotary, then an MLP."""

    __slots__ = ("attention", "mlp", "norm1", "norm2")
    fc_names = ("fc1", "fc2")

    def __init__(self, config: VisionConfig) -> None:
        self.norm1 = LayerNorm(config.hidden_size, NORM_EPS)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.norm2 = LayerNorm(config.hidden_size, NORM_EPS)
        self.mlp = PlainMLP(config.hidden_size, config.inner_size, act=config.activation)

    def slots(self, config: VisionConfig, name: str) -> Iterator[WeightSlot]:
        """Weights under ``name``."""
        size = config.hidden_size
        yield norm_slot(self.norm1, f"{name}.norm1")
        yield linear_slot(self.attention.qkv, [(f"{name}.attn.qkv", 3 * size)])
        yield linear_slot(self.attention.o, [(f"{name}.attn.proj", size)])
        yield norm_slot(self.norm2, f"{name}.norm2")
        first, second = self.fc_names
        yield linear_slot(self.mlp.fc1, [(f"{name}.mlp.{first}", config.inner_size)])
        yield linear_slot(self.mlp.fc2, [(f"{name}.mlp.{second}", size)])

    def __call__(
        self, x: torch.Tensor, starts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Run (P, size) -> (P, size), in place."""
        x.add_(self.attention(self.norm1(x), starts, cos, sin))
        return x.add_(self.mlp(self.norm2(x)))


class Merger:
    """Merger of the patches of a merge cell into one embedding.

    Norm of the patches or, with ``joined_first``, of the joined cell, then an MLP. ``names``: of
    the norm and of the two layers in the checkpoint.
    """

    __slots__ = ("cell", "joined_first", "mlp", "names", "norm")

    def __init__(
        self,
        config: VisionConfig,
        norm_class: type[Any] = LayerNorm,
        names: tuple[str, str, str] = ("ln_q", "mlp.0", "mlp.2"),
        joined_first: bool = False,
    ) -> None:
        self.cell = config.hidden_size * config.merge_size**2
        self.joined_first = joined_first
        self.names = names
        self.norm = norm_class(self.cell if joined_first else config.hidden_size, NORM_EPS)
        self.mlp = PlainMLP(self.cell, self.cell, config.num_outputs, act="gelu")

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        norm, first, second = (f"{prefix}.{name}" for name in self.names)
        yield norm_slot(self.norm, norm)
        yield linear_slot(self.mlp.fc1, [(first, self.cell)])
        yield linear_slot(self.mlp.fc2, [(second, self.mlp.fc2.num_outputs)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Merge (P, size) -> (cells, num_outputs)."""
        cells = self.norm(x.view(-1, self.cell) if self.joined_first else x)
        return self.mlp(cells.view(-1, self.cell))


class VisionTower:
    """Vision tower over images or videos of different sizes.

    Its outputs have the decoder's width.
    """

    block_class: type[Any] = VisionBlock
    norm_class: type[Any] = LayerNorm
    merger_names = ("ln_q", "mlp.0", "mlp.2")
    patch_bias = False

    def __init__(
        self, config: VisionConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        self.config = config
        self.device = options.device
        self.scale = PixelScale(normalization, options)
        self.patch = Linear(
            CHANNELS * config.temporal_patch_size * config.patch_size**2,
            config.hidden_size,
            self.patch_bias,
        )
        self.blocks = [self.block_class(config) for _ in range(config.depth)]
        self.merger = Merger(config, self.norm_class, self.merger_names)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        config = self.config
        size, own = config.patch_size, f"{prefix}patch_embed.proj"
        kernel = (config.hidden_size, CHANNELS, config.temporal_patch_size, size, size)
        parts = [Part(f"{own}.weight", kernel)]
        if self.patch_bias:
            parts.append(Part(f"{own}.bias", (config.hidden_size,)))
        yield WeightSlot(tuple(parts), self._load_patch)
        for index, block in enumerate(self.blocks):
            yield from block.slots(config, f"{prefix}blocks.{index}")
        yield from self.merger.slots(f"{prefix}merger")

    def _load_patch(self, kernel: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.patch.load(owned(kernel).flatten(1), None if bias is None else owned(bias))

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return embeddings of each item.

        They are (t * h * w / merge_size^2, num_outputs or a multiple of it). An item is an image
        (H, W, 3) or a video (frames, H, W, 3), uint8, its edges multiples of patch_size times
        merge_size, its number of frames a multiple of temporal_patch_size. Attention is full within
        each temporal index of an item.
        """
        patches, grids = [], []
        for item in pixels:
            rows, grid = self.patches(self.scale.to_device(item))
            patches.append(rows)
            grids.append(grid)
        x = self.patch(torch.cat(patches) if len(patches) > 1 else patches[0])
        cells = self.config.merge_size**2
        return list(self.merged(x, grids).split([t * h * w // cells for t, h, w in grids]))

    def merged(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Merge embedded patches (P, size) into embeddings of all cells, in patch order."""
        return self.merger(self.run_blocks(x, grids))

    def run_blocks(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Run (P, size) -> (P, size), in place."""
        cos, sin = self.rotary(grids)
        starts = frame_starts(grids)
        for block in self.blocks:
            x = block(x, starts, cos, sin)
        return x

    def patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Return normalised patches of an item, and its grid (t, h, w).

        The patches are (t * h * w, 3 * frames * patch * patch).
        """
        size, merge, depth = (
            self.config.patch_size,
            self.config.merge_size,
            self.config.temporal_patch_size,
        )
        if pixels.dim() == 3:
            pixels = pixels.expand(depth, *pixels.shape)  # a still image fills a temporal patch
        frames, height, width, channels = pixels.shape
        grid = (frames // depth, height // size, width // size)
        t, h, w = grid
        cells = pixels.reshape(
            t, depth, h // merge, merge, size, w // merge, merge, size, channels
        ).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        flat = cells.reshape(t * h * w, channels, depth * size * size)
        return self.scale(flat).flatten(1), grid

    def rotary(self, grids: Sequence[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (P, head_dim / 2) float32 of all patches.

        Half the frequencies follow rows, half columns.
        """
        merge = self.config.merge_size
        positions = []
        for t, h, w in grids:
            rows = torch.arange(h, device=self.device)[:, None].expand(h, w)
            columns = torch.arange(w, device=self.device).expand(h, w)
            both = torch.stack((rows, columns), dim=-1)
            cells = both.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
            positions.append(cells.reshape(h * w, 2).repeat(t, 1))
        head_dim = self.config.hidden_size // self.config.num_heads
        return axial_cos_sin(torch.cat(positions), head_dim)


def frame_starts(grids: Sequence[Grid]) -> list[int]:
    """Return the first row of each temporal index of each item, and the number of rows."""
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    return list(accumulate(lengths, initial=0))
