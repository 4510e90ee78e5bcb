"""AWQ (Lin et al., 2023) as AutoAWQ writes it: 4 bits, zero points, groups of inputs.

``gemm`` (also run by the kernels named exllama and ipex): ``qweight`` (K, N / 8) int32
holds eight outputs of an input in each word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest
bits on; ``qzeros`` (G, N / 8) likewise; ``scales`` (G, N). ``gemv``: ``qweight`` (N, K / 8) holds
eight inputs in their order; ``qzeros`` (N, Z) and ``scales`` (N, 8 Z) are padded.
w[n, k] = (code - zero) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.packing import codes_of, quantized
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import FLOATS, Tensors

BITS = 4
PACKED = 8
"""Codes of a word."""
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Place in a word of each of its eight outputs."""


@dataclass(frozen=True, slots=True)
class AwqWeight:
    """The tensors ``qweight``, ``qzeros`` and ``scales`` of a layer."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        return tuple(f"{self.base}.{end}" for end in ("qweight", "qzeros", "scales"))

    @property
    def _has_inputs_first(self) -> bool:
        return self.settings.version != "gemv"

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        num_outputs, num_inputs = shape
        words, zeros, scales = self.names
        self.tensors.check(words, self._word_shapes(shape), ("I32",))
        group = self.settings.group_of(num_inputs)
        packed = num_outputs if self._has_inputs_first else num_inputs
        if num_inputs % group or packed % PACKED:
            raise self.tensors.error(
                words, f"is of a weight {shape}, which has no groups of {group} inputs"
            )
        groups = num_inputs // group
        if self._has_inputs_first:
            self.tensors.check(zeros, ((groups, num_outputs // PACKED),), ("I32",))
            self.tensors.check(scales, ((groups, num_outputs),), FLOATS)
        else:
            width = _padded_words(groups, group)
            self.tensors.check(zeros, ((num_outputs, width),), ("I32",))
            self.tensors.check(scales, ((num_outputs, width * PACKED),), FLOATS)

    def _word_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        num_outputs, num_inputs = shape
        if self._has_inputs_first:
            return ((num_inputs, num_outputs // PACKED),)
        return ((num_outputs, num_inputs // PACKED),)

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        num_inputs = shape[1]
        group = self.settings.group_of(num_inputs)
        words, zeros = (self.tensors.read(name) for name in self.names[:2])
        scales = self.tensors.read_finite(self.names[2])
        groups = num_inputs // group

        def read_gemm(first: int, end: int) -> QuantizedTensor | torch.Tensor:
            own_scales = scales[:, first:end].t()
            own_zeros = _outputs(zeros, first, end).t()
            codes = _outputs(words, first, end).t().contiguous()
            return quantized(codes, own_scales, own_zeros, BITS, group)

        def read_gemv(first: int, end: int) -> QuantizedTensor | torch.Tensor:
            own_zeros = codes_of(zeros[first:end], BITS)[:, :groups]
            codes = codes_of(words[first:end], BITS)
            return quantized(codes, scales[first:end, :groups], own_zeros, BITS, group)

        read = read_gemm if self._has_inputs_first else read_gemv
        label = f"{self.settings.label}, groups of {group}"
        return CodedWeight(shape, label, read, (words, zeros, scales))


def _outputs(words: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Return the codes (R, end - first) of some outputs of words (R, N / 8)."""
    begin = first // PACKED
    codes = codes_of(words[:, begin : -(-end // PACKED)], BITS)
    ordered: torch.Tensor = codes.unflatten(1, (-1, PACKED))[:, :, PLACES].flatten(1)
    return ordered[:, first - begin * PACKED : end - begin * PACKED]


def _padded_words(groups: int, group: int) -> int:
    """Return the words of the zero points of an output in the layout ``gemv``."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    words = -(-groups // PACKED)
    return -(-words // multiple) * multiple
