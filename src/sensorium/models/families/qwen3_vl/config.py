"""Configuration of Qwen3-VL, read from config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.models.configs import bad, count, filled, section
from sensorium.models.families.qwen2_vl.config import (
    Qwen2VLConfig,
    VisionConfig,
    read_common_vision,
    read_vl_config,
)

_VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}
_MROPE = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}


@dataclass(frozen=True, slots=True)
class DeepVisionConfig(VisionConfig):
    """A tower with a square table of learnt positions and features of several depths.

    Features are also taken after ``deep_blocks`` (from 0).
    """

    table_side: int
    deep_blocks: tuple[int, ...]

    @property
    def num_deep(self) -> int:
        """Number of deep blocks."""
        return len(self.deep_blocks)


def read_qwen3_vl_config(config: Mapping[str, Any]) -> Qwen2VLConfig:
    """Interpret config.json. Raises ConfigError naming the field for values that are impossible."""
    text = filled(_TEXT_DEFAULTS, section(config, "text_config"))
    key = "rope_parameters" if not text.get("rope_scaling") else "rope_scaling"
    scaling = text.get(key) or {}
    if not isinstance(scaling, Mapping):
        bad(f"text_config.{key}", f"must be a mapping, got {scaling!r}")
    text[key] = {**_MROPE, **scaling}
    read = read_vl_config({**config, "text_config": text}, _read_vision, model_type="qwen3")
    deep = read.vision.deep_blocks if isinstance(read.vision, DeepVisionConfig) else ()
    if len(deep) > read.text.num_layers:
        bad(
            "vision_config.deepstack_visual_indexes",
            f"there are {len(deep)} of them, but only {read.text.num_layers} layers of the decoder",
        )
    return read


def _read_vision(config: Mapping[str, Any]) -> DeepVisionConfig:
    values = filled(_VISION_DEFAULTS, config)
    common = read_common_vision(values, "hidden_size")
    table = count(values, "num_position_embeddings")
    side = math.isqrt(table)
    if side * side != table:
        bad("vision_config.num_position_embeddings", f"{table} is no square")
    blocks = values["deepstack_visual_indexes"]
    if (
        not isinstance(blocks, list)
        or not all(type(index) is int and 0 <= index < common["depth"] for index in blocks)
        or len(set(blocks)) != len(blocks)
    ):
        bad(
            "vision_config.deepstack_visual_indexes",
            f"must be a list of different indices below {common['depth']}, got {blocks!r}",
        )
    return DeepVisionConfig(
        **common,
        inner_size=count(values, "intermediate_size"),
        num_outputs=count(values, "out_hidden_size"),
        table_side=side,
        deep_blocks=tuple(blocks),
    )
