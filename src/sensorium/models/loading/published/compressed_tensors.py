"""Formats of the package compressed-tensors (llm-compressor).

``pack-quantized``: ``weight_packed`` (N, ceil(K / c)) int32 holds c = 32 / bits inputs of an output
in each word, from the lowest bits on, each plus half the range; ``weight_shape`` (2) holds N and
K; ``weight_scale`` (N, G); without symmetry ``weight_zero_point`` (ceil(N / c), G) holds c outputs
in each word in the same way, or as int8 (N, G); with act-order ``weight_g_idx`` (K) the group of
each input. ``int-quantized`` and ``naive-quantized``: ``weight`` (N, K) int8 and ``weight_scale``
for the whole, for each output or each group. w[n, k] = (code - zero) * scale.

``float-quantized`` is read as other FP8 is. What the configuration ignores has a plain weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.packing import (
    BITS,
    centre,
    codes_of,
    num_words,
    order_of,
    quantized,
    ungrouped,
)
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import FLOATS, Tensors


@dataclass(frozen=True, slots=True)
class CompressedWeight:
    """The tensors ``weight_packed`` or ``weight`` (int8) of a layer, and those that scale them."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        more = (self._shape, self._zero, self._order)
        return (self._words, self._scale, *(name for name in more if name in self.tensors))

    @property
    def _is_packed(self) -> bool:
        return f"{self.base}.weight_packed" in self.tensors

    @property
    def _words(self) -> str:
        return f"{self.base}.weight_packed" if self._is_packed else f"{self.base}.weight"

    @property
    def _scale(self) -> str:
        return f"{self.base}.weight_scale"

    @property
    def _zero(self) -> str:
        return f"{self.base}.weight_zero_point"

    @property
    def _shape(self) -> str:
        return f"{self.base}.weight_shape"

    @property
    def _order(self) -> str:
        return f"{self.base}.weight_g_idx"

    def _bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of this layer. Raises ConfigError."""
        if not self._is_packed:
            return 8
        self.tensors.check_rank(self._words, 2, ("I32",))
        found = self.tensors.shape(self._words)
        for bits in BITS:
            if found == (shape[0], num_words(shape[1], bits)):
                return bits
        raise self.tensors.error(self._words, f"is {found}, not 4 or 8 bits of a weight {shape}")

    def _num_groups(self, shape: tuple[int, int]) -> int:
        """Return the number of scales of an output. Raises ConfigError."""
        if self._scale not in self.tensors:
            raise self.tensors.error(self._scale, "is missing")
        found = self.tensors.shape(self._scale)
        if found in ((), (1,), (1, 1), (shape[0],)):
            return 1
        if len(found) == 2 and found[0] == shape[0]:
            return found[1]
        raise self.tensors.error(self._scale, f"is {found}, which does not scale a weight {shape}")

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        num_outputs, num_inputs = shape
        bits = self._bits(shape)
        if not self._is_packed:
            self.tensors.check(self._words, (shape,), ("I8",))
        groups = self._num_groups(shape)
        self.tensors.check(self._scale, (self.tensors.shape(self._scale),), FLOATS)
        if self.settings.compressed_group(num_inputs, groups) == 0:
            raise self.tensors.error(
                self._scale, f"has {groups} groups, which {num_inputs} inputs cannot be cut into"
            )
        if self._shape in self.tensors:
            self.tensors.check(self._shape, ((2,),), ("I64", "I32"))
        if self._order in self.tensors:
            self.tensors.check(self._order, ((num_inputs,),), ("I32", "I64"))
        if self._zero in self.tensors:
            own = self.tensors.dtype(self._zero)
            plain = (num_outputs, groups), self.tensors.shape(self._scale)
            packed = (num_words(num_outputs, bits), groups)
            self.tensors.check(self._zero, (packed,) if own == "I32" else plain, ("I32", "I8"))

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        num_outputs, num_inputs = shape
        bits, num_groups = self._bits(shape), self._num_groups(shape)
        if self._shape in self.tensors and self.tensors.read(self._shape).tolist() != list(shape):
            raise self.tensors.error(self._shape, f"says another shape than {shape}")
        group = self.settings.compressed_group(num_inputs, num_groups)
        words = self.tensors.read(self._words)
        scales = self.tensors.read_finite(self._scale).reshape(-1, num_groups)
        scales = scales.expand(num_outputs, num_groups)
        zeros = self._zeros(num_outputs, num_groups, bits)
        groups = self._groups(num_inputs, group, num_groups)
        order = None if groups is None else order_of(groups, group)

        def read(first: int, end: int) -> QuantizedTensor | torch.Tensor:
            if self._is_packed:
                codes = codes_of(words[first:end], bits)[:, :num_inputs]
            else:
                codes = words[first:end].view(torch.uint8) ^ centre(bits)
            own_zeros = None if zeros is None else zeros[first:end]
            if groups is not None and order is None:
                middle = torch.full_like(scales[first:end], centre(bits))
                own_zeros = middle if own_zeros is None else own_zeros
                return ungrouped(codes, scales[first:end], own_zeros, groups)
            if order is not None:
                codes = codes[:, order]
            return quantized(codes.contiguous(), scales[first:end], own_zeros, bits, group)

        label = self._label(bits, group, num_inputs)
        return CodedWeight(shape, label, read, (words, scales), order)

    def _label(self, bits: int, group: int, num_inputs: int) -> str:
        groups = "a scale per output" if group == num_inputs else f"groups of {group}"
        order = " in act-order" if self._order in self.tensors else ""
        return f"{self.settings.method}, {bits} bits, {groups}{order}"

    def _zeros(self, num_outputs: int, num_groups: int, bits: int) -> torch.Tensor | None:
        """Return the zero points (N, G) of codes without sign; None if all are the centre."""
        if self._zero not in self.tensors:
            return None
        stored = self.tensors.read(self._zero)
        if stored.dtype == torch.int32:
            zeros = codes_of(stored.t(), bits)[:, :num_outputs].t().to(torch.int16)
        else:
            zeros = stored.to(torch.int16).reshape(-1, num_groups) + centre(bits)
            zeros = zeros.expand(num_outputs, num_groups)
        if int(zeros.min()) < 0 or int(zeros.max()) >= 1 << bits:
            raise self.tensors.error(self._zero, f"has zero points outside {bits} bits")
        return None if bool((zeros == centre(bits)).all()) else zeros

    def _groups(self, num_inputs: int, group: int, num_groups: int) -> torch.Tensor | None:
        """Return the group (K,) int64 of each input; None if they lie one behind the other."""
        if self._order not in self.tensors or num_groups == 1:
            return None
        groups = self.tensors.read(self._order).long()
        if bool((groups == -1).any()):
            return None  # it was never filled
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise self.tensors.error(self._order, f"has groups outside 0 to {num_groups - 1}")
        in_order = torch.arange(num_inputs) // group
        return None if torch.equal(groups, in_order) else groups
