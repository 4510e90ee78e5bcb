"""LLaVA-1.5 (Liu et al., 2023): CLIP features of an image, projected into the decoder's embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sensorium.errors import ConfigError
from sensorium.layers.mlp import PlainMLP
from sensorium.models.clip import ClipTower
from sensorium.models.decoder import DecoderModel, apart
from sensorium.models.interface import BuildOptions
from sensorium.models.llava.config import LlavaConfig
from sensorium.models.pixels import Normalization
from sensorium.models.weights import Slot, linear_slot
from sensorium.multimodal.items import Features


class LlavaModel(DecoderModel):
    """The decoder with a vision tower and a projector; without both when images are skipped."""

    prefix = "language_model."

    def __init__(
        self, config: LlavaConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config.text, options)
        self.config = config
        self.tower: ClipTower | None = None
        self.projector: PlainMLP | None = None
        if "image" in options.skip_modalities:
            self.ignored_weights += (r"vision_tower\..*", r"multi_modal_projector\..*")
            return
        depth = max(config.feature_layers)
        try:
            self.tower = ClipTower(config.vision, depth, normalization, options)
            self.projector = PlainMLP(
                config.vision.hidden_size * len(config.feature_layers),
                config.text.hidden_size,
                config.text.hidden_size,
                act=config.projector_activation,
                bias=config.projector_bias,
            )
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error
        unused = range(depth, config.vision.num_layers)
        self.ignored_weights += (
            r"vision_tower\.post_layernorm\..*",
            *(rf"vision_tower\.encoder\.layers\.{number}\..*" for number in unused),
        )

    @property
    def has_encoder(self) -> bool:
        """Whether images are not skipped."""
        return self.tower is not None

    def slots(self) -> Iterator[Slot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        if self.tower is None or self.projector is None:
            return
        yield from self.tower.slots("vision_tower.")
        size = self.config.text.hidden_size
        yield linear_slot(self.projector.fc1, [("multi_modal_projector.linear_1", size)])
        yield linear_slot(self.projector.fc2, [("multi_modal_projector.linear_2", size)])

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Embeddings (num_embeds, H) of each image, all in one batch."""
        if self.tower is None or self.projector is None:
            return super().encode(items)
        images = np.stack([item.arrays["pixels"] for item in items])
        states = self.tower.hidden_states(images, self.config.feature_layers)
        first = 0 if self.config.keep_class_token else 1
        features = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        rows = features[:, first:]
        embeds = self.projector(rows.reshape(-1, rows.shape[-1]))
        return apart(embeds.view(len(items), -1, embeds.shape[-1]).unbind(0))
