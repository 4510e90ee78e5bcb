"""MiniCPM-V 2.6 (Yao et al., 2024): a tower for views of any shape, a resampler, Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sensorium.errors import ConfigError
from sensorium.models.families.minicpmv.config import MiniCPMVConfig
from sensorium.models.families.minicpmv.resampler import Resampler
from sensorium.models.families.minicpmv.vision import Size, view_features
from sensorium.models.interface import BuildOptions, WeightSlot
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.decoder import DecoderModel, clone_parts
from sensorium.models.parts.siglip import SiglipTower
from sensorium.multimodal.items import Features

MAX_PATCHES = 16384
"""Patches that go through the tower at once: 16 views of usual size. More would take memory and
win no time."""
MEDIA = frozenset({"image", "video"})


class MiniCPMVModel(DecoderModel):
    """The decoder with a tower and a resampler, or alone without images and videos."""

    prefix = "language_model."

    def __init__(
        self, config: MiniCPMVConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config.text, options)
        self.tower: SiglipTower | None = None
        self.resampler: Resampler | None = None
        if options.skip_modalities >= MEDIA:
            self.ignored_weights += (r"vpm\..*", r"resampler\..*")
            return
        try:
            self.tower = SiglipTower(
                config.vision, config.depth, normalization, options, post_norm=True
            )
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error
        self.resampler = Resampler(config, options)
        self.ignored_weights += (r"resampler\.pos_embed", *self.tower.ignored(r"vpm\."))

    @property
    def has_encoder(self) -> bool:
        """Return whether the model takes images or videos."""
        return self.tower is not None

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        if self.tower is not None and self.resampler is not None:
            yield from self.tower.slots("vpm.")
            yield from self.resampler.slots("resampler.")

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each image or video.

        The views of all of them run in one batch, or in several where there are many patches.
        """
        if self.tower is None or self.resampler is None:
            return super().encode(items)
        embeds = []
        for patches, sizes in batches(items, MAX_PATCHES):
            pixels = self.tower.patches.scale.to_device(patches)
            rows = view_features(self.tower, pixels, sizes)
            embeds.append(self.resampler(rows, sizes).flatten(0, 1))
        joined = torch.cat(embeds) if len(embeds) > 1 else embeds[0]
        return clone_parts(joined.split([item.num_embeds for item in items]))


def batches(items: Sequence[Features], most: int) -> Iterator[tuple[np.ndarray, list[Size]]]:
    """Yield consecutive views of all items, as many together as have at most ``most`` patches.

    A larger view is a batch of its own. A batch is its patches (P, values) uint8, and the sizes of
    its views in patches.
    """
    parts: list[np.ndarray] = []
    sizes: list[Size] = []
    num = 0
    for item in items:
        start = 0
        for rows, columns in item.arrays["sizes"].tolist():
            length = rows * columns
            if num + length > most and sizes:
                yield np.concatenate(parts), sizes
                parts, sizes, num = [], [], 0
            parts.append(item.arrays["patches"][start : start + length])
            sizes.append((rows, columns))
            start, num = start + length, num + length
    yield np.concatenate(parts), sizes
