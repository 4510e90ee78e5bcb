"""Configuration of LLaVA-OneVision, read from config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.models.configs import (
    ClipConfig,
    TextConfig,
    bad,
    count,
    feature_layers,
    filled,
    read_siglip_config,
    read_text_config,
    section,
    ties_head,
)
from sensorium.models.families.llava_onevision.tiles import Grids, Pinpoints
from sensorium.models.interface import TextShape

_SIGLIP_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_EDGES = (384, 768, 1152, 1536, 1920, 2304)
DEFAULT_PINPOINTS: Pinpoints = tuple((height, width) for height in _EDGES for width in _EDGES)


@dataclass(frozen=True, slots=True)
class LlavaOnevisionConfig:
    """Configuration of LLaVA-OneVision: a SigLIP tower, a two-layer projector and a decoder."""

    text: TextConfig
    vision: ClipConfig
    image_token_id: int
    video_token_id: int
    projector_activation: str
    projector_bias: bool
    feature_layers: tuple[int, ...]
    """After how many layers of the tower features are taken; several are joined along the
    channels."""
    grids: Grids

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        return self.text.shape


def read_llava_onevision_config(config: Mapping[str, Any]) -> LlavaOnevisionConfig:
    """Interpret config.json. Raises ConfigError naming the field for values that are impossible.

    The head is tied when either the whole or its decoder says so: published files say it of the
    decoder alone.
    """
    config = filled({}, config)
    text = section(config, "text_config")
    decoder = read_text_config(filled({"model_type": "qwen2"}, text), tied=ties_head(config))
    whole = {"vision_config": _SIGLIP_DEFAULTS, **config}
    vision = read_siglip_config(section(whole, "vision_config"))
    strategy = config.get("vision_feature_select_strategy", "full")
    if strategy != "full":
        bad(
            "vision_feature_select_strategy",
            f"must be 'full', got {strategy!r}: a SigLIP tower has no class token to leave out",
        )
    return LlavaOnevisionConfig(
        text=decoder,
        vision=vision,
        image_token_id=_token_id(config, "image", 151646, decoder),
        video_token_id=_token_id(config, "video", 151647, decoder),
        projector_activation=str(config.get("projector_hidden_act", "gelu")),
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        feature_layers=feature_layers(config.get("vision_feature_layer", -1), vision.num_layers),
        grids=Grids(
            tile=vision.image_size,
            side=vision.image_size // vision.patch_size,
            pinpoints=read_pinpoints(config.get("image_grid_pinpoints"), vision.image_size),
            most=_most_tiles(config.get("vision_aspect_ratio", "anyres_max_9")),
        ),
    )


def read_pinpoints(value: Any, tile: int) -> Pinpoints:
    """Return the grid sizes (height, width) that images are fitted into; published ones for None.

    Raises ConfigError for anything but a list of pairs of positive multiples of ``tile``.
    """
    pairs = DEFAULT_PINPOINTS if value is None else value
    if not isinstance(pairs, list | tuple) or not pairs:
        bad("image_grid_pinpoints", f"must be a list of pairs of height and width, got {value!r}")
    found = []
    for pair in pairs:
        edges = tuple(pair) if isinstance(pair, list | tuple) else (pair,)
        if [type(edge) is int and edge > 0 and edge % tile == 0 for edge in edges] != [True, True]:
            bad(
                "image_grid_pinpoints",
                f"must be pairs of positive multiples of the vision tower's image_size {tile}, got "
                f"{pair!r}",
            )
        found.append((edges[0], edges[1]))
    return tuple(found)


def _token_id(config: Mapping[str, Any], modality: str, default: int, text: TextConfig) -> int:
    name = f"{modality}_token_id" if f"{modality}_token_id" in config else f"{modality}_token_index"
    token_id = count(config, name, default)
    if token_id >= text.vocab_size:
        bad(name, f"{token_id} is outside the vocabulary of {text.vocab_size}")
    return token_id


def _most_tiles(value: Any) -> int:
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(value))
    if match is None:
        bad("vision_aspect_ratio", f"must be 'anyres_max_' and a number from 1, got {value!r}")
    return int(match[1])
