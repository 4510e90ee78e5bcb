"""MLX: groups of inputs with a scale and a minimum, as mlx-lm and mlx-vlm write them.

``weight`` (N, K b / 32) uint32 holds the codes of an output, b bits each, one behind the other from
the lowest bits on; with 3, 5 and 6 bits they run across the ends of words. ``scales`` and
``biases`` (N, G). w[n, k] = code * scale + bias. Embeddings are quantized as layers are.

Kernels of convolutions have their channels last: (N, ..., C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.packing import WORD_BITS, bit_stream, centre
from sensorium.models.loading.published.settings import MLX_BITS, Settings
from sensorium.models.loading.published.tensors import FLOATS, Tensors

CONVOLUTION_AXES = (4, 5)
"""Axes of kernels of convolutions over images and videos."""


@dataclass(frozen=True, slots=True)
class MlxWeight:
    """The tensors ``weight``, ``scales`` and ``biases`` of a layer."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        return tuple(f"{self.base}.{end}" for end in ("weight", "scales", "biases"))

    def _bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of this layer, which may differ from the others'. Raises ConfigError."""
        words = self.names[0]
        self.tensors.check_rank(words, 2, ("U32",))
        found = self.tensors.shape(words)
        bits, rest = divmod(found[1] * WORD_BITS, shape[1])
        if found[0] != shape[0] or rest or bits not in MLX_BITS:
            raise self.tensors.error(words, f"is {found}, which are no codes of a weight {shape}")
        return bits

    def _group(self, shape: tuple[int, int]) -> int:
        """Return how many inputs share a scale. Raises ConfigError."""
        scales = self.names[1]
        self.tensors.check_rank(scales, 2, FLOATS)
        rows, groups = self.tensors.shape(scales)
        if rows != shape[0] or not groups or shape[1] % groups:
            raise self.tensors.error(
                scales, f"is {(rows, groups)}, which does not scale a weight {shape}"
            )
        return shape[1] // groups

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        self._bits(shape)
        group = self._group(shape)
        self.tensors.check(self.names[2], ((shape[0], shape[1] // group),), FLOATS)

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        bits, group = self._bits(shape), self._group(shape)
        words = self.tensors.read(self.names[0])
        scales, biases = (self.tensors.read_finite(name) for name in self.names[1:])

        def read(first: int, end: int) -> QuantizedTensor:
            codes = bit_stream(words[first:end], bits)
            own, minimums = scales[first:end].float(), biases[first:end].float()
            if bits <= 4:
                return QuantizedTensor(codes.view(torch.int8), own, 4, group, minimums=minimums)
            # The integers get a sign: minimums are then near zero, and lose nothing in 16 bits.
            values = (codes - centre(bits)).view(torch.int8)  # bytes wrap around
            return QuantizedTensor(values, own, 8, group, minimums=minimums + centre(bits) * own)

        label = f"mlx, {bits} bits, groups of {group}"
        return CodedWeight(shape, label, read, (words, scales, biases))


def is_channels_last(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether the kernel of a convolution has its channels behind all other axes.

    wanted: its shape with the channels behind the outputs.
    """
    if len(wanted) not in CONVOLUTION_AXES or stored == wanted or len(stored) != len(wanted):
        return False
    return wanted == (stored[0], stored[-1], *stored[1:-1])
