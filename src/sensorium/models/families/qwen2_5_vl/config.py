"""Configuration of Qwen2.5-VL, read from config.json: Qwen2-VL's with another vision tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sensorium.models.configs import bad, count, filled, section
from sensorium.models.families.qwen2_vl.config import (
    Qwen2VLConfig,
    VisionConfig,
    read_common_vision,
    read_vl_config,
)

_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
}


@dataclass(frozen=True, slots=True)
class WindowedVisionConfig(VisionConfig):
    """A tower whose blocks, but for ``full_blocks``, attend within windows of merge cells.

    Windows are ``window_cells`` x ``window_cells``.
    """

    window_cells: int
    full_blocks: frozenset[int]


def read_qwen2_5_vl_config(config: Mapping[str, Any]) -> Qwen2VLConfig:
    """Interpret config.json. Raises ConfigError naming the field for values that are impossible."""
    vision = filled(_VISION_DEFAULTS, section(config, "vision_config"))
    rate = vision["tokens_per_second"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        bad("vision_config.tokens_per_second", f"must be a positive number, got {rate!r}")
    return replace(read_vl_config(config, _read_vision), tokens_per_second=float(rate))


def _read_vision(config: Mapping[str, Any]) -> WindowedVisionConfig:
    values = filled(_VISION_DEFAULTS, config)
    common = read_common_vision(values, "hidden_size")
    window = count(values, "window_size")
    window_cells = window // common["merge_size"] // common["patch_size"]
    if window_cells < 1:
        bad("vision_config.window_size", f"{window} pixels are less than a merge cell")
    blocks = values["fullatt_block_indexes"]
    if not isinstance(blocks, list) or not all(type(index) is int for index in blocks):
        bad("vision_config.fullatt_block_indexes", f"must be a list of integers, got {blocks!r}")
    return WindowedVisionConfig(
        **common,
        inner_size=count(values, "intermediate_size"),
        num_outputs=count(values, "out_hidden_size"),
        window_cells=window_cells,
        full_blocks=frozenset(blocks),
    )
