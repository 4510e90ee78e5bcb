"""Qwen3-VL: vision features of several depths, added to the first layers of a Qwen3 decoder.

Between encoder and decoder an embedding is (1 + D) * H wide: the replacement of the token's
embedding, then what is added after layer 0, 1 … D - 1. Embeddings of tokens have zeros there.
"""

from __future__ import annotations

from typing import Any

import torch

from sensorium.kernels.batch import AttentionBatch
from sensorium.models.families.qwen2_vl.config import Qwen2VLConfig
from sensorium.models.families.qwen2_vl.model import Qwen2VLModel
from sensorium.models.families.qwen3_vl.vision import DeepVisionTower
from sensorium.models.interface import BuildOptions
from sensorium.models.media.pixels import Normalization


class Qwen3VLModel(Qwen2VLModel):
    """The decoder with a vision tower; without it when images and videos are skipped."""

    tower_class: type[Any] = DeepVisionTower
    modalities = frozenset(("image",))

    def __init__(
        self, config: Qwen2VLConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config, normalization, options)
        self.num_deep = 0
        if self.tower is not None:
            self.shape = config.shape
            self.num_deep = config.vision.num_deep

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T, (1 + D) * H) of ids (T,), zeros from H on."""
        plain = super().embed(ids)
        if not self.num_deep:
            return plain
        wide = plain.new_zeros(len(ids), (1 + self.num_deep) * plain.shape[1])
        wide[:, : plain.shape[1]] = plain
        return wide

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Return hidden states (T, H) after the final norm of embeddings (T, (1 + D) * H)."""
        first, *deep = (part.contiguous() for part in embeds.chunk(1 + self.num_deep, dim=1))
        return self.decoder.forward(first, batch, deep)
