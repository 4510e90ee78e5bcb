"""FP8: numbers of eight bits (E4M3 or E5M2) with scales of blocks, outputs or whole weights.

``weight`` (N, K) in FP8. DeepSeek and Qwen (``fp8``): ``weight_scale_inv`` (N / a, K / b), rounded
up, for blocks of a outputs and b inputs, or one number. AutoFP8, FBGEMM, compressed-tensors and
ModelOpt: ``weight_scale`` for the whole, (N, 1) for each output, or for blocks. In spite of its
name ``weight_scale_inv`` is a factor, too: w[n, k] = weight * scale. Scales of activations
(``input_scale``) are not used: activations are not FP8 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import FLOATS, FP8, Tensors

_SCALES = (*FLOATS, "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """The tensor ``weight`` in FP8 of a layer, and its scales."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        return f"{self.base}.weight", self._scale

    @property
    def _scale(self) -> str:
        inverse = f"{self.base}.weight_scale_inv"
        return inverse if inverse in self.tensors else f"{self.base}.weight_scale"

    def _block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the outputs and inputs that share a scale. Raises ConfigError."""
        stated = self.settings.block()
        if self._scale not in self.tensors:
            raise self.tensors.error(self._scale, "is missing")
        found = self.tensors.shape(self._scale)
        if found in ((), (1,), (1, 1)):
            return shape
        if found in ((shape[0],), (shape[0], 1)):
            return 1, shape[1]
        for block in (stated, *self.settings.compressed_blocks(), (128, 128)):
            if block is not None and found == _blocks(shape, block):
                return block
        raise self.tensors.error(self._scale, f"is {found}, which does not scale a weight {shape}")

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        self.tensors.check(self.names[0], (shape,), FP8)
        self._block(shape)
        self.tensors.check(self._scale, (self.tensors.shape(self._scale),), _SCALES)

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        height, width = self._block(shape)
        weight = self.tensors.read(self.names[0])
        scales = (
            self.tensors.read_finite(self._scale).float().reshape(_blocks(shape, (height, width)))
        )

        def read(first: int, end: int) -> torch.Tensor:
            own = scales[torch.arange(first, end) // height]
            if width < shape[1]:
                own = own[:, torch.arange(shape[1]) // width]
            return weight[first:end].float() * own

        return CodedWeight(shape, self._label(shape, (height, width)), read, (weight,))

    def _label(self, shape: tuple[int, int], block: tuple[int, int]) -> str:
        if block == shape:
            scales = "one scale"
        elif block == (1, shape[1]):
            scales = "a scale per output"
        else:
            scales = f"blocks of {block[0]} x {block[1]}"
        named = self.settings.method if self.settings.method != "fp8" else ""
        return ", ".join(filter(None, ("fp8", named, scales)))


def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a weight has along its outputs and its inputs."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
