"""Configuration of Qwen2-VL, read from config.json, flat (as published) or with ``text_config``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sensorium.models.configs import (
    TextConfig,
    bad,
    count,
    filled,
    read_text_config,
    section,
    ties_head,
)
from sensorium.models.interface import TextShape

_VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MROPE_SECTION = [16, 24, 24]


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Configuration of the vision tower.

    ``hidden_size`` is the width inside, ``num_outputs`` that of its embeddings.
    """

    depth: int
    hidden_size: int
    inner_size: int
    num_outputs: int
    num_heads: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    activation: str

    @property
    def num_deep(self) -> int:
        """Number of features that the tower returns besides the last block's."""
        return 0


@dataclass(frozen=True, slots=True)
class Qwen2VLConfig:
    """Configuration of a vision tower with a merger, and a decoder with three position axes."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    tokens_per_second: float | None = None
    """Temporal positions of a second of video, where positions follow time; else they count
    temporal patches."""

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        return replace(self.text.shape, num_deep=self.vision.num_deep)


def read_qwen2_vl_config(config: Mapping[str, Any]) -> Qwen2VLConfig:
    """Interpret config.json. Raises ConfigError naming the field for values that are impossible."""
    return read_vl_config(config, _read_vision)


def read_vl_config(
    config: Mapping[str, Any],
    read_vision: Callable[[Mapping[str, Any]], VisionConfig],
    model_type: str = "qwen2_vl_text",
) -> Qwen2VLConfig:
    """Read the configuration of a family that resembles Qwen2-VL.

    It differs in ``vision_config`` and decoder.
    """
    nested = config.get("text_config")
    text = config if nested is None else section(config, "text_config")
    decoder = read_text_config(
        {**_with_section(text), "model_type": model_type}, tied=ties_head(config)
    )
    vision = read_vision(section(config, "vision_config"))
    if vision.num_outputs != decoder.hidden_size:
        bad(
            "vision_config",
            f"its output size {vision.num_outputs} is not the decoder's hidden size "
            f"{decoder.hidden_size}",
        )
    ids = {
        "image_token_id": count(config, "image_token_id", 151655),
        "video_token_id": count(config, "video_token_id", 151656),
    }
    for name, token_id in ids.items():
        if token_id >= decoder.vocab_size:
            bad(name, f"{token_id} is outside the vocabulary of {decoder.vocab_size}")
    return Qwen2VLConfig(decoder, vision, **ids)


def _with_section(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text configuration with an ``mrope_section``, which some files leave out."""
    key = "rope_parameters" if not text.get("rope_scaling") else "rope_scaling"
    rope = text.get(key) or {}
    if not isinstance(rope, Mapping):
        bad(key, f"must be a mapping, got {rope!r:.80}")
    rope = dict(rope)
    rope.setdefault("mrope_section", _MROPE_SECTION)
    return {**text, key: rope}


def _read_vision(config: Mapping[str, Any]) -> VisionConfig:
    values = filled(_VISION_DEFAULTS, config)
    common = read_common_vision(values, "embed_dim")
    return VisionConfig(
        **common,
        inner_size=int(common["hidden_size"] * values["mlp_ratio"]),
        num_outputs=count(values, "hidden_size"),
    )


def read_common_vision(values: Mapping[str, Any], width: str) -> dict[str, Any]:
    """Read the fields of ``VisionConfig`` that all towers of this kind spell alike.

    ``width``: the name of the field of the width.
    """
    hidden_size, num_heads = count(values, width), count(values, "num_heads")
    if hidden_size % num_heads or hidden_size // num_heads % 4:
        bad(
            f"vision_config.{width}",
            f"{hidden_size} over {num_heads} heads must give a head size divisible by 4",
        )
    if count(values, "in_channels") != 3:
        bad("vision_config.in_channels", f"must be 3, got {values['in_channels']}")
    return {
        "depth": count(values, "depth"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "patch_size": count(values, "patch_size"),
        "merge_size": count(values, "spatial_merge_size"),
        "temporal_patch_size": count(values, "temporal_patch_size"),
        "activation": str(values["hidden_act"]),
    }
