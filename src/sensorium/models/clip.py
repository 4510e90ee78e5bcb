"""The CLIP vision transformer (Radford et al., 2021), as far as its hidden states are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sensorium.layers.attention import VisionAttention
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import PlainMLP
from sensorium.layers.norm import LayerNorm
from sensorium.models.configs import ClipConfig
from sensorium.models.interface import BuildOptions
from sensorium.models.pixels import Normalization
from sensorium.models.weights import Part, Slot, linear_slot, norm_slot, owned

IN_CHANNELS = 3


class PixelScale:
    """Normalises pixels on the model's device in float32, then casts to its dtype."""

    def __init__(self, normalization: Normalization, options: BuildOptions) -> None:
        mean = torch.tensor(normalization.mean, device=options.device)
        std = torch.tensor(normalization.std, device=options.device)
        self.weight = normalization.scale / std
        self.bias = -mean / std
        self.dtype, self.device = options.dtype, options.device

    def to_device(self, pixels: np.ndarray) -> torch.Tensor:
        """The array as a uint8 tensor on the device."""
        return torch.from_numpy(np.require(pixels, requirements="W")).to(self.device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., C, n) -> the model's dtype: channels on the last axis but one."""
        x = pixels.to(torch.float32)
        return x.mul_(self.weight[:, None]).add_(self.bias[:, None]).to(self.dtype)


class ClipLayer:
    """Pre-norm block: attention, then an MLP with the configured activation."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    def __init__(self, config: ClipConfig) -> None:
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = PlainMLP(config.hidden_size, config.inner_size, act=config.activation)

    def slots(self, config: ClipConfig, name: str) -> Iterator[Slot]:
        """Weights under ``name``."""
        size = config.hidden_size
        own = f"{name}.self_attn"
        yield norm_slot(self.attention_norm, f"{name}.layer_norm1")
        parts = [(f"{own}.{p}_proj", size) for p in "qkv"]
        yield linear_slot(self.attention.qkv, parts)
        yield linear_slot(self.attention.o, [(f"{own}.out_proj", size)])
        yield norm_slot(self.mlp_norm, f"{name}.layer_norm2")
        yield linear_slot(self.mlp.fc1, [(f"{name}.mlp.fc1", config.inner_size)])
        yield linear_slot(self.mlp.fc2, [(f"{name}.mlp.fc2", size)])

    def __call__(self, x: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """(T, size) -> (T, size) in new memory; ``starts`` as ``cu_seqlens`` of VisionAttention."""
        x = x + self.attention(self.attention_norm(x), starts)
        return x.add_(self.mlp(self.mlp_norm(x)))


class ClipTower:
    """Patch embedding, class token, learnt positions and the first ``depth`` layers.

    ``depth`` may be less than the configuration's number of layers: then the rest is neither built nor loaded.
    """

    def __init__(
        self, config: ClipConfig, depth: int, normalization: Normalization, options: BuildOptions
    ) -> None:
        self.config = config
        self.scale = PixelScale(normalization, options)
        self.patch = Linear(IN_CHANNELS * config.patch_size**2, config.hidden_size)
        self.class_token = torch.empty(0)
        self.positions = torch.empty(0)
        self.pre_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = [ClipLayer(config) for _ in range(depth)]

    def slots(self, prefix: str) -> Iterator[Slot]:
        """Weights under ``prefix``."""
        config, own = self.config, f"{prefix}embeddings"
        kernel = (config.hidden_size, IN_CHANNELS, config.patch_size, config.patch_size)
        table = (config.num_patches + 1, config.hidden_size)
        parts = (
            Part(f"{own}.class_embedding", (config.hidden_size,)),
            Part(f"{own}.patch_embedding.weight", kernel),
            Part(f"{own}.position_embedding.weight", table),
        )
        yield Slot(parts, self._load_embeddings)
        yield norm_slot(self.pre_norm, f"{prefix}pre_layrnorm")
        for index, layer in enumerate(self.layers):
            yield from layer.slots(config, f"{prefix}encoder.layers.{index}")

    def _load_embeddings(
        self, class_token: torch.Tensor, kernel: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.class_token, self.positions = owned(class_token), owned(positions)
        self.patch.load(owned(kernel).flatten(1))

    def hidden_states(self, images: np.ndarray, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Hidden states (B, 1 + patches, size) after ``wanted`` numbers of layers, of images (B, H, W, 3) uint8."""
        batch, rows = len(images), self.config.num_patches + 1
        patches = self.patch(self._patches(images)).view(batch, rows - 1, -1)
        first = self.class_token.expand(batch, 1, -1)
        x = torch.cat((first, patches), dim=1).add_(self.positions)
        x = self.pre_norm(x).view(batch * rows, -1)
        starts = range(0, batch * rows + 1, rows)
        found = {0: x}
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, starts)
            if number in wanted:
                found[number] = x
        return [found[number].view(batch, rows, -1) for number in wanted]

    def _patches(self, images: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) -> (B * patches, 3 * patch * patch), normalised."""
        size = self.config.patch_size
        side = self.config.image_size // size
        pixels = self.scale.to_device(images)[:, : side * size, : side * size]
        batch, channels = pixels.shape[0], pixels.shape[3]
        grid = pixels.reshape(batch, side, size, side, size, channels)
        cells = grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, channels, size * size)
        return self.scale(cells).flatten(1)
