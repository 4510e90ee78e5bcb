"""Qwen2-VL (Wang et al., 2024): a vision tower of any resolution before a Qwen2 decoder.

The decoder has three position axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sensorium.errors import ConfigError
from sensorium.models.families.qwen2_vl.config import Qwen2VLConfig
from sensorium.models.families.qwen2_vl.vision import VisionTower
from sensorium.models.interface import BuildOptions, WeightSlot
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.decoder import DecoderModel, clone_parts
from sensorium.multimodal.items import Features


class Qwen2VLModel(DecoderModel):
    """The decoder with a vision tower; without it when images and videos are skipped."""

    prefix = "language_model."
    tower_class: type[Any] = VisionTower
    modalities = frozenset(("image", "video"))

    def __init__(
        self, config: Qwen2VLConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config.text, options)
        self.tower: VisionTower | None = None
        if self.modalities <= options.skip_modalities:
            self.ignored_weights += (r"visual\..*",)
            return
        try:
            self.tower = self.tower_class(config.vision, normalization, options)
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error

    @property
    def has_encoder(self) -> bool:
        """Return whether the model takes images or videos."""
        return self.tower is not None

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        if self.tower is not None:
            yield from self.tower.slots("visual.")

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each image or video, all in one batch."""
        if self.tower is None:
            return super().encode(items)
        return clone_parts(self.tower([item.arrays["pixels"] for item in items]))
