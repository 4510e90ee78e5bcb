"""The SigLIP vision transformer (Zhai et al., 2023), which has no class token.

``SiglipTower.hidden_states`` takes square images of the trained size. ``embed`` and ``run`` take
rows of patches with a position each, so that images of several sizes, whose positions come from
elsewhere (NaViT), share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sensorium.layers.norm import LayerNorm
from sensorium.models.configs import ClipConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import norm_slot
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.clip import ClipLayer, PatchEmbedding, run_layers, unused_layers


class SiglipTower:
    """Patch embedding, learnt positions, the first ``depth`` layers and an optional final norm.

    ``depth`` may be less than the configuration's number of layers: then the rest is neither built
    nor loaded.
    """

    def __init__(
        self,
        config: ClipConfig,
        depth: int,
        normalization: Normalization,
        options: BuildOptions,
        *,
        post_norm: bool = False,
    ) -> None:
        self.config = config
        self.patches = PatchEmbedding(config, normalization, options, bias=True)
        self.positions = torch.empty(0)
        self.layers = [ClipLayer(config) for _ in range(depth)]
        self.post_norm = LayerNorm(config.hidden_size, config.norm_eps) if post_norm else None

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        config, own = self.config, f"{prefix}embeddings"
        yield self.patches.slot(f"{own}.patch_embedding")
        table = Part(f"{own}.position_embedding.weight", (config.num_patches, config.hidden_size))
        yield WeightSlot((table,), self._load_positions)
        for index, layer in enumerate(self.layers):
            yield from layer.slots(config, f"{prefix}encoder.layers.{index}")
        if self.post_norm is not None:
            yield norm_slot(self.post_norm, f"{prefix}post_layernorm")

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Regular expressions of the weights under ``prefix`` that this depth does not use."""
        norm = () if self.post_norm is not None else (rf"{prefix}post_layernorm\..*",)
        return (
            rf"{prefix}head\..*",
            *norm,
            *unused_layers(prefix, self.config, self.layers),
        )

    def _load_positions(self, table: torch.Tensor) -> None:
        self.positions = owned(table)

    def hidden_states(self, images: np.ndarray, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Return hidden states (B, patches, size) after ``wanted`` numbers of layers.

        They do not pass the final norm. ``images``: (B, H, W, 3) uint8, H and W the configuration's
        image_size.
        """
        batch, rows = len(images), self.config.num_patches
        x = self.patches(images).add_(self.positions).view(batch * rows, -1)
        starts = range(0, batch * rows + 1, rows)
        return [state.view(batch, rows, -1) for state in run_layers(self.layers, x, starts, wanted)]

    def embed(self, patches: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embed rows of patches (T, 3 * patch * patch) -> (T, size).

        ``patches``: as of ``patches.rows``; ``position_ids`` (T,): an index into the positions for
        each.
        """
        return self.patches.linear(patches).add_(self.positions[position_ids])

    def run(self, x: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Run all layers, then the norm if there is one: (T, size) -> (T, size).

        ``starts``: first row of each image, and T at the end; attention stays within each.
        """
        for layer in self.layers:
            x = layer(x, starts)
        return x if self.post_norm is None else self.post_norm(x)
