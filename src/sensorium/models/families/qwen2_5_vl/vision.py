"""The vision tower of Qwen2.5-VL (Bai et al., 2025).

Most blocks attend within windows of merge cells.

The rows are brought into the order of the windows once, before the first block, so that a window is
a run of rows, and back after the last. A frame of 5 x 6 merge cells in windows of 4 x 4 has four
windows:

     0  1  2  3 |  4  5
     6  7  8  9 | 10 11
    12 13 14 15 | 16 17
    18 19 20 21 | 22 23
    ------------+------
    24 25 26 27 | 28 29
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch

from sensorium.layers.attention import VisionAttention
from sensorium.layers.mlp import GatedMLP
from sensorium.layers.norm import RMSNorm
from sensorium.models.families.qwen2_5_vl.config import WindowedVisionConfig
from sensorium.models.families.qwen2_vl.config import VisionConfig
from sensorium.models.families.qwen2_vl.vision import NORM_EPS, Grid, VisionTower, frame_starts
from sensorium.models.interface import WeightSlot
from sensorium.models.loading.weights import linear_slot, norm_slot


class WindowedBlock:
    """Pre-norm block: attention with rotary, then a gated MLP."""

    __slots__ = ("attention", "mlp", "norm1", "norm2")

    def __init__(self, config: VisionConfig) -> None:
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp = GatedMLP(config.hidden_size, config.inner_size, bias=True, act=config.activation)

    def slots(self, config: VisionConfig, name: str) -> Iterator[WeightSlot]:
        """Weights under ``name``."""
        size, inner = config.hidden_size, config.inner_size
        yield norm_slot(self.norm1, f"{name}.norm1")
        yield linear_slot(self.attention.qkv, [(f"{name}.attn.qkv", 3 * size)])
        yield linear_slot(self.attention.o, [(f"{name}.attn.proj", size)])
        yield norm_slot(self.norm2, f"{name}.norm2")
        halves = [(f"{name}.mlp.gate_proj", inner), (f"{name}.mlp.up_proj", inner)]
        yield linear_slot(self.mlp.gate_up, halves)
        yield linear_slot(self.mlp.down, [(f"{name}.mlp.down_proj", size)])

    def __call__(
        self, x: torch.Tensor, starts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Run (P, size) -> (P, size), in place."""
        mixed = self.attention(self.norm1(x), starts, cos, sin)
        return x.add_(self.mlp(self.norm2.forward_add(x, mixed)))


class WindowedTower(VisionTower):
    """Vision tower of Qwen2-VL with window attention."""

    block_class = WindowedBlock
    norm_class = RMSNorm
    config: WindowedVisionConfig

    def run_blocks(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Run (P, size) -> (P, size)."""
        cells = self.config.merge_size**2
        order, sizes = window_order(grids, self.config.merge_size, self.config.window_cells)
        rows = torch.from_numpy((order[:, None] * cells + np.arange(cells)).reshape(-1))
        rows = rows.to(self.device)
        cos, sin = (factors[rows] for factors in self.rotary(grids))
        windows = list(accumulate((size * cells for size in sizes), initial=0))
        frames = frame_starts(grids)
        x = x[rows]
        for index, block in enumerate(self.blocks):
            x = block(x, frames if index in self.config.full_blocks else windows, cos, sin)
        restored = torch.empty_like(x)
        restored[rows] = x
        return restored


def window_order(
    grids: Sequence[Grid], merge_size: int, window_cells: int
) -> tuple[np.ndarray, list[int]]:
    """Return merge cells of all items in window order (C,) int64, and the size of each window."""
    orders, sizes, first = [], [], 0
    for t, h, w in grids:
        tall, wide = h // merge_size, w // merge_size
        cells = np.arange(t * tall * wide).reshape(t, tall, wide) + first
        first += cells.size
        margin = ((0, 0), (0, -tall % window_cells), (0, -wide % window_cells))
        padded = np.pad(cells, margin, constant_values=-1)
        down, across = padded.shape[1] // window_cells, padded.shape[2] // window_cells
        windows = padded.reshape(t, down, window_cells, across, window_cells)
        windows = windows.transpose(0, 1, 3, 2, 4).reshape(t * down * across, -1)
        present = windows >= 0
        orders.append(windows[present])
        sizes += present.sum(axis=1).tolist()
    return np.concatenate(orders), sizes
