"""LLaVA-1.5 (Liu et al., 2023): CLIP features of an image, projected for the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sensorium.models.families.llava.config import LlavaConfig
from sensorium.models.parts.clip import ClipTower
from sensorium.models.parts.decoder import clone_parts
from sensorium.models.parts.projected import ProjectedModel
from sensorium.multimodal.items import Features


class LlavaModel(ProjectedModel[LlavaConfig, ClipTower]):
    """The decoder with a vision tower and a projector; without both when images are skipped."""

    tower_class = ClipTower
    seen = frozenset({"image"})

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each image, all in one batch."""
        if self.tower is None or self.projector is None:
            return super().encode(items)
        images = np.stack([item.arrays["pixels"] for item in items])
        states = self.tower.hidden_states(images, self.config.feature_layers)
        first = 0 if self.config.keep_class_token else 1
        features = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        rows = features[:, first:]
        embeds = self.projector(rows.reshape(-1, rows.shape[-1]))
        return clone_parts(embeds.view(len(items), -1, embeds.shape[-1]).unbind(0))
