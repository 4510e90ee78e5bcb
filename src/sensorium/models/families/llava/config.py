"""Configuration of LLaVA-1.5, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.models.configs import (
    CLIP_LARGE_336,
    ClipConfig,
    TextConfig,
    bad,
    feature_layers,
    filled,
    read_clip_config,
    read_text_config,
    section,
    ties_head,
)
from sensorium.models.interface import TextShape


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """Configuration of LLaVA-1.5: a CLIP tower, a two-layer projector and a decoder."""

    text: TextConfig
    vision: ClipConfig
    image_token_id: int
    image_in_vocabulary: bool
    """If false, texts are cut at the placeholder before they are tokenized, as no token is it."""
    projector_activation: str
    projector_bias: bool
    feature_layers: tuple[int, ...]
    """After how many layers of the tower features are taken; several are joined along the
    channels."""
    keep_class_token: bool

    @property
    def num_embeds(self) -> int:
        """Number of embeddings of one image."""
        return self.vision.num_patches + self.keep_class_token

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        return self.text.shape


def read_llava_config(config: Mapping[str, Any]) -> LlavaConfig:
    """Interpret config.json. Raises ConfigError naming the field for values that are impossible."""
    config = filled({}, config)
    text = section(config, "text_config")
    decoder = read_text_config(filled({"model_type": "llama"}, text), tied=ties_head(config))
    vision = read_clip_config(section(config, "vision_config"), CLIP_LARGE_336)
    name = "image_token_id" if "image_token_id" in config else "image_token_index"
    image_token_id = config.get(name, 32000)
    if isinstance(image_token_id, bool) or not isinstance(image_token_id, int):
        bad(name, f"must be an integer, got {image_token_id!r:.80}")
    if not 0 <= image_token_id < decoder.vocab_size:
        bad(name, f"{image_token_id} is outside the vocabulary of {decoder.vocab_size}")
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        bad("vision_feature_select_strategy", f"must be 'default' or 'full', got {strategy!r}")
    return LlavaConfig(
        text=decoder,
        vision=vision,
        image_token_id=image_token_id,
        image_in_vocabulary=config.get("image_token_in_vocabulary") is not False,
        projector_activation=str(config.get("projector_hidden_act", "gelu")),
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        feature_layers=feature_layers(config.get("vision_feature_layer", -2), vision.num_layers),
        keep_class_token=strategy == "full",
    )
