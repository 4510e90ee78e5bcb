"""The CLIP vision transformer (Radford et al., 2021), and the parts of it that SigLIP shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sensorium.layers.attention import VisionAttention
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import PlainMLP
from sensorium.layers.norm import LayerNorm
from sensorium.models.configs import ClipConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import linear_slot, norm_slot
from sensorium.models.media.pixels import Normalization

IN_CHANNELS = 3


class PixelScale:
    """Normalisation of pixels on the model's device in float32, cast to the model's dtype."""

    def __init__(self, normalization: Normalization, options: BuildOptions) -> None:
        mean = torch.tensor(normalization.mean, device=options.device)
        std = torch.tensor(normalization.std, device=options.device)
        self.weight = normalization.scale / std
        self.bias = -mean / std
        self.dtype, self.device = options.dtype, options.device

    def to_device(self, pixels: np.ndarray) -> torch.Tensor:
        """Return the array as a uint8 tensor on the device."""
        return torch.from_numpy(np.require(pixels, requirements="W")).to(self.device)

    def exact(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 (..., C, n) to float32; channels on the last axis but one."""
        x = pixels.to(torch.float32)
        return x.mul_(self.weight[:, None]).add_(self.bias[:, None])

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 (..., C, n) to the model's dtype; channels on the last axis but one."""
        return self.exact(pixels).to(self.dtype)


class PatchEmbedding:
    """Patch embedding: squares of pixels, normalised and projected to the tower's width.

    This is a convolution whose stride is its kernel's size.
    """

    def __init__(
        self,
        config: ClipConfig,
        normalization: Normalization,
        options: BuildOptions,
        bias: bool = False,
    ) -> None:
        self.size = config.patch_size
        self.scale = PixelScale(normalization, options)
        self.linear = Linear(IN_CHANNELS * config.patch_size**2, config.hidden_size, bias)

    def slot(self, name: str) -> WeightSlot:
        """Slot of the kernel (hidden_size, 3, patch, patch) under ``name``, and of its bias."""
        width = self.linear.num_outputs
        parts = [Part(f"{name}.weight", (width, IN_CHANNELS, self.size, self.size))]
        if self.linear.has_bias:
            parts.append(Part(f"{name}.bias", (width,)))
        return WeightSlot(tuple(parts), self._load)

    def _load(self, kernel: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.linear.load(owned(kernel).flatten(1), None if bias is None else owned(bias))

    def rows(self, images: np.ndarray) -> torch.Tensor:
        """Cut images (B, H, W, 3) uint8 of one size into rows of normalised patches.

        The result is (B * rows * columns, 3 * patch * patch). Pixels of H and W beyond a multiple
        of the patch are not used.
        """
        size, (batch, height, width, channels) = self.size, images.shape
        rows, columns = height // size, width // size
        pixels = self.scale.to_device(images)[:, : rows * size, : columns * size]
        grid = pixels.reshape(batch, rows, size, columns, size, channels)
        cells = grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, channels, size * size)
        return self.scale(cells).flatten(1)

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """Embed (B, H, W, 3) uint8 -> (B, rows * columns, hidden_size)."""
        return self.linear(self.rows(images)).view(len(images), -1, self.linear.num_outputs)


class ClipLayer:
    """Pre-norm block of CLIP and SigLIP: attention, then an MLP with the configured activation."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    def __init__(self, config: ClipConfig) -> None:
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = PlainMLP(config.hidden_size, config.inner_size, act=config.activation)

    def slots(self, config: ClipConfig, name: str) -> Iterator[WeightSlot]:
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
        """Run (T, size) -> (T, size) in new memory.

        ``starts``: as ``cu_seqlens`` of VisionAttention.
        """
        x = x + self.attention(self.attention_norm(x), starts)
        return x.add_(self.mlp(self.mlp_norm(x)))


def run_layers(
    layers: Sequence[ClipLayer], x: torch.Tensor, starts: Sequence[int], wanted: Sequence[int]
) -> list[torch.Tensor]:
    """Return hidden states (T, size) after ``wanted`` numbers of layers, 0 for ``x`` itself.

    ``starts``: as for the layers.
    """
    found = {0: x}
    for number, layer in enumerate(layers, start=1):
        x = layer(x, starts)
        if number in wanted:
            found[number] = x
    return [found[number] for number in wanted]


def unused_layers(prefix: str, config: ClipConfig, layers: Sequence[ClipLayer]) -> tuple[str, ...]:
    """Regular expressions of the weights of a tower's layers that are not built."""
    numbers = range(len(layers), config.num_layers)
    return tuple(rf"{prefix}encoder\.layers\.{number}\..*" for number in numbers)


class ClipTower:
    """Patch embedding, class token, learnt positions and the first ``depth`` layers.

    ``depth`` may be less than the configuration's number of layers: then the rest is neither built
    nor loaded.
    """

    def __init__(
        self, config: ClipConfig, depth: int, normalization: Normalization, options: BuildOptions
    ) -> None:
        self.config = config
        self.patches = PatchEmbedding(config, normalization, options)
        self.class_token = torch.empty(0)
        self.positions = torch.empty(0)
        self.pre_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = [ClipLayer(config) for _ in range(depth)]

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Regular expressions of the weights under ``prefix`` that this depth does not use."""
        return (rf"{prefix}post_layernorm\..*", *unused_layers(prefix, self.config, self.layers))

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        config, own = self.config, f"{prefix}embeddings"
        table = (config.num_patches + 1, config.hidden_size)
        parts = (
            Part(f"{own}.class_embedding", (config.hidden_size,)),
            Part(f"{own}.position_embedding.weight", table),
        )
        yield WeightSlot(parts, self._load_embeddings)
        yield self.patches.slot(f"{own}.patch_embedding")
        yield norm_slot(self.pre_norm, f"{prefix}pre_layrnorm")
        for index, layer in enumerate(self.layers):
            yield from layer.slots(config, f"{prefix}encoder.layers.{index}")

    def _load_embeddings(self, class_token: torch.Tensor, positions: torch.Tensor) -> None:
        self.class_token, self.positions = owned(class_token), owned(positions)

    def hidden_states(self, images: np.ndarray, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Return hidden states (B, 1 + patches, size) after ``wanted`` numbers of layers.

        images: (B, H, W, 3) uint8.
        """
        return self.states_of(self.patches(images), wanted)

    def states_of(self, patches: torch.Tensor, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Return hidden states of embedded patches (B, patches, size)."""
        batch, rows = len(patches), self.config.num_patches + 1
        first = self.class_token.expand(batch, 1, -1)
        x = torch.cat((first, patches), dim=1).add_(self.positions)
        x = self.pre_norm(x).view(batch * rows, -1)
        starts = range(0, batch * rows + 1, rows)
        return [state.view(batch, rows, -1) for state in run_layers(self.layers, x, starts, wanted)]
