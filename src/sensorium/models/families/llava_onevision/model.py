"""LLaVA-OneVision (Li et al., 2024): projected SigLIP features of tiles and frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sensorium.models.families.llava_onevision.config import LlavaOnevisionConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.projected import ProjectedModel
from sensorium.models.parts.siglip import SiglipTower
from sensorium.multimodal.items import Features

IMAGES_PER_BATCH = 16
"""Tiles or frames that the tower sees at once: enough to fill a machine, few enough for its
memory."""


class LlavaOnevisionModel(ProjectedModel[LlavaOnevisionConfig, SiglipTower]):
    """The decoder with a vision tower and a projector, or alone without images and videos."""

    tower_class = SiglipTower
    seen = frozenset({"image", "video"})

    def __init__(
        self, config: LlavaOnevisionConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config, normalization, options)
        self.newline = torch.empty(0)
        if self.tower is None:
            self.ignored_weights += ("image_newline",)

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        if self.tower is not None:
            size = self.config.text.hidden_size
            yield WeightSlot((Part("image_newline", (size,)),), self._load_newline)

    def _load_newline(self, newline: torch.Tensor) -> None:
        self.newline = owned(newline)

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each item.

        The tiles of all images, or frames of all videos, share batches.
        """
        if self.tower is None or self.projector is None or not items:
            return super().encode(items)
        images = [item.arrays["pixels"] for item in items]
        is_video = items[0].modality == "video"
        features = self._features(np.concatenate(images), is_video)
        parts = features.split([len(own) for own in images])
        if is_video:
            return [torch.cat((part.flatten(0, 1), self.newline[None])) for part in parts]
        return [
            self._image(part, *map(int, item.meta["original_size"]))
            for part, item in zip(parts, items, strict=True)
        ]

    def _features(self, images: np.ndarray, pooled: bool) -> torch.Tensor:
        """Return features (N, features, H) of (N, size, size, 3) uint8."""
        found = []
        for start in range(0, len(images), IMAGES_PER_BATCH):
            features = self._projected(images[start : start + IMAGES_PER_BATCH])
            found.append(self._pooled(features) if pooled else features)
        return torch.cat(found) if len(found) > 1 else found[0]

    def _projected(self, images: np.ndarray) -> torch.Tensor:
        """Return projected features (N, side * side, H) of (N, size, size, 3) uint8."""
        assert self.tower is not None
        assert self.projector is not None
        states = self.tower.hidden_states(images, self.config.feature_layers)
        features = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        embeds = self.projector(features.flatten(0, 1))
        return embeds.view(len(images), -1, embeds.shape[-1])

    def _pooled(self, features: torch.Tensor) -> torch.Tensor:
        """Pool features: (N, side * side, H) -> (N, pooled_side * pooled_side, H)."""
        grids = self.config.grids
        maps = features.unflatten(1, (grids.side, grids.side))
        return scale_down(maps, grids.pooled_side, grids.pooled_side).flatten(1, 2)

    def _image(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Join the features of an image's tiles into embeddings (num_embeds, H).

        features: (1 + tiles, side * side, H), or (1, side * side, H) of one image among several.
        ``height`` and ``width``: the image's own, in pixels.
        """
        grids, size = self.config.grids, features.shape[-1]
        if len(features) == 1:
            return torch.cat((features[0], self.newline[None]))
        layout = grids.layout(height, width)
        shape = (layout.tile_rows, layout.tile_columns, grids.side, grids.side, size)
        tiles = features[1:].view(shape).transpose(1, 2)
        maps = tiles.reshape(layout.tile_rows * grids.side, layout.tile_columns * grids.side, size)
        bottom, right = layout.top + layout.height, layout.left + layout.width
        kept = maps[layout.top : bottom, layout.left : right]
        rows, columns = layout.rows_and_columns
        if layout.scaled is not None:
            kept = scale_down(kept[None], rows, columns)[0]
        found = features.new_empty(grids.num_base + rows * (columns + 1), size)
        found[: grids.num_base] = features[0]
        lines = found[grids.num_base :].view(rows, columns + 1, size)
        lines[:, :columns] = kept
        lines[:, columns] = self.newline
        return found


def scale_down(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale (N, rows, columns, C) to (N, height, width, C), bilinear between centres."""
    scaled = F.interpolate(maps.permute(0, 3, 1, 2), size=(height, width), mode="bilinear")
    return scaled.permute(0, 2, 3, 1)
