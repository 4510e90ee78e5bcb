"""Configuration of MiniCPM-V 2.6, read from config.json with decoder fields at the top level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.errors import ConfigError
from sensorium.models.configs import (
    ClipConfig,
    TextConfig,
    bad,
    count,
    read_siglip_config,
    read_text_config,
    section,
)
from sensorium.models.interface import TextShape

HEAD_DIM = 128
"""Dimension of a head of the resampler's attention."""

_VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class MiniCPMVConfig:
    """Configuration of a SigLIP tower for views of any shape, a resampler, and a Qwen2 decoder."""

    text: TextConfig
    vision: ClipConfig
    """``image_size`` says how many positions the tower has learnt, not how large a view is."""
    depth: int
    """Layers of the tower that are run: all, or all but the last."""
    num_queries: int
    """Embeddings of one view."""

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        return self.text.shape


def read_minicpmv_config(config: Mapping[str, Any]) -> MiniCPMVConfig:
    """Interpret config.json.

    Raises ConfigError naming the field for values that are impossible, and for the other versions,
    which share the name of the architecture and little else.
    """
    version = config.get("version")
    if str(version) != "2.6":
        raise ConfigError(
            f"config.json: MiniCPM-V of version {version!r} is not supported, only 2.6.",
            param="model",
        )
    text = read_text_config({**config, "model_type": "qwen2"})
    if text.hidden_size % HEAD_DIM:
        bad("hidden_size", f"{text.hidden_size} must be a multiple of {HEAD_DIM} for the resampler")
    vision = read_siglip_config(_VISION_DEFAULTS | _siglip(section(config, "vision_config")))
    depth = vision.num_layers - bool(config.get("drop_vision_last_layer", False))
    if depth < 1:
        bad("drop_vision_last_layer", "leaves no layer of the vision tower")
    if vision.image_size < vision.patch_size:
        bad("vision_config.image_size", f"{vision.image_size} is less than a patch")
    return MiniCPMVConfig(text, vision, depth, count(config, "query_num", 64))


def _siglip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tower's configuration with one name of its kind, as files have two."""
    if config.get("model_type") != "siglip":
        return dict(config)
    return {**config, "model_type": "siglip_vision_model"}
