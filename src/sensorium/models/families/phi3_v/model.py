"""Phi-3.5-Vision (Abdin et al., 2024): CLIP features of tiles and thumbnail, with separators.

The features are merged, get learnt separators between rows and views, and are projected into the
decoder's embeddings. The thumbnail is the whole image at a tile's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sensorium.errors import ConfigError
from sensorium.layers.mlp import PlainMLP
from sensorium.models.families.phi3_v.config import Phi3VConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import linear_slot
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.clip import IN_CHANNELS, ClipTower
from sensorium.models.parts.decoder import DecoderModel, clone_parts
from sensorium.multimodal.items import Features

MERGED = 4
"""Patches whose features make one embedding."""
MAX_TILES = 32
"""Tiles that the tower takes at once: more would need memory without being faster."""


class Phi3VModel(DecoderModel):
    """The decoder with tower, separators and projector; without them when images are skipped."""

    def __init__(
        self, config: Phi3VConfig, normalization: Normalization, options: BuildOptions
    ) -> None:
        super().__init__(config.text, options)
        self.config = config
        self.tower: ClipTower | None = None
        self.projector: PlainMLP | None = None
        self.row_end = torch.empty(0)
        self.view_end = torch.empty(0)
        if "image" in options.skip_modalities:
            self.ignored_weights += (r"(vision_tower|projector|separators)\..*",)
            return
        depth, size = config.feature_layer, config.text.hidden_size
        try:
            self.tower = ClipTower(config.vision, depth, normalization, options)
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error
        self.projector = PlainMLP(MERGED * config.vision.hidden_size, size, size, act="gelu")
        self.ignored_weights += self.tower.ignored("vision_tower.")

    @property
    def has_encoder(self) -> bool:
        """Return whether the model takes images."""
        return self.tower is not None

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        if self.tower is None or self.projector is None:
            return
        yield from self.tower.slots("vision_tower.")
        size, width = self.config.text.hidden_size, MERGED * self.config.vision.hidden_size
        yield linear_slot(self.projector.fc1, [("projector.0", size)])
        yield linear_slot(self.projector.fc2, [("projector.2", size)])
        parts = (
            Part("separators.sub_GN", (1, 1, 1, width)),
            Part("separators.glb_GN", (1, 1, width)),
        )
        yield WeightSlot(parts, self._load_separators)

    def _load_separators(self, row_end: torch.Tensor, view_end: torch.Tensor) -> None:
        self.row_end, self.view_end = owned(row_end).flatten(), owned(view_end).flatten()

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each image; all their tiles run together."""
        if self.tower is None or self.projector is None:
            return super().encode(items)
        size = self.config.vision.image_size
        pixels = [self.tower.patches.scale.to_device(item.arrays["pixels"]) for item in items]
        grids = [(image.shape[0] // size, image.shape[1] // size) for image in pixels]
        views = torch.cat([self.views(image) for image in pixels])
        features = torch.cat([self._features(part) for part in views.split(MAX_TILES)])
        parts = features.split([rows * columns + 1 for rows, columns in grids])
        sequences = [self._sequence(*pair) for pair in zip(parts, grids, strict=True)]
        embeds = self.projector(torch.cat(sequences))
        return clone_parts(embeds.split([len(sequence) for sequence in sequences]))

    def views(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the views (views, 3, tile, tile) of an image (H, W, 3) uint8.

        These are its tiles row by row, then the thumbnail. The thumbnail is made of the normalised
        image with bicubic interpolation in float32 without antialiasing, as in the reference's
        processor.
        """
        if self.tower is None:
            raise ValueError("the vision tower is switched off")
        size, scale = self.config.vision.image_size, self.tower.patches.scale
        rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
        flat = scale.exact(pixels.permute(2, 0, 1).flatten(1))
        image = flat.view(1, IN_CHANNELS, rows * size, columns * size)
        whole = torch.nn.functional.interpolate(image, (size, size), mode="bicubic")
        cut = image.view(IN_CHANNELS, rows, size, columns, size).permute(1, 3, 0, 2, 4)
        return torch.cat((cut.reshape(-1, IN_CHANNELS, size, size), whole)).to(scale.dtype)

    def _features(self, views: torch.Tensor) -> torch.Tensor:
        """Return features (B, cells, cells, 4 * size) of views (B, 3, tile, tile).

        The features of 2 x 2 patches are joined, row by row.
        """
        assert self.tower is not None
        patch, cells, batch = self.config.vision.patch_size, self.config.cells, len(views)
        side = 2 * cells
        grid = views.view(batch, IN_CHANNELS, side, patch, side, patch)
        rows = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch * side * side, -1)
        patches = self.tower.patches.linear(rows).view(batch, side * side, -1)
        (states,) = self.tower.states_of(patches, (self.config.feature_layer,))
        quads = states[:, 1:].reshape(batch, cells, 2, cells, 2, -1)
        return quads.permute(0, 1, 3, 2, 4, 5).reshape(batch, cells, cells, -1)

    def _sequence(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Join features of an image's views, with separators, into the projector's input (n, D).

        features: (rows * columns + 1, cells, cells, D). A view is its rows, each followed by
        ``row_end``; ``view_end`` stands between the two views.
        """
        (rows, columns), cells = grid, self.config.cells
        tiles = features[:-1].view(rows, columns, cells, cells, -1).transpose(1, 2)
        views = [
            self._with_row_ends(tiles.reshape(rows * cells, columns * cells, -1)),
            self._with_row_ends(features[-1]),
        ]
        if self.config.global_first:
            views.reverse()
        return torch.cat((views[0], self.view_end[None], views[1]))

    def _with_row_ends(self, view: torch.Tensor) -> torch.Tensor:
        """Append a row end to each row: (rows, columns, D) -> (rows * (columns + 1), D)."""
        ends = self.row_end.expand(view.shape[0], 1, -1)
        return torch.cat((view, ends), dim=1).flatten(0, 1)
