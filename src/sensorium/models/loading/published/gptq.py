"""GPTQ (Frantar et al., 2022) as AutoGPTQ and GPTQModel write it: 4 or 8 bits.

``qweight`` (K / c, N) int32 holds c inputs of an output in each word, from the lowest bits on, with
c = 32 / bits; ``qzeros`` (G, N / c) likewise c outputs of a group; ``scales`` (G, N); ``g_idx`` (K)
the group of each input, which says nothing new unless the inputs were quantized in the order of
their size (act-order). w[n, k] = (code - zero) * scale.

The format ``gptq`` stores zero points less one. One is added to whole words, with carries, as
GPTQModel does: so its files with a zero point of 0 are read as it wrote them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.packing import (
    BITS,
    WORD_BITS,
    centre,
    codes_of,
    order_of,
    quantized,
    ungrouped,
)
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import FLOATS, Tensors

_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class GptqWeight:
    """The tensors ``qweight``, ``qzeros``, ``scales`` and, where it is there, ``g_idx``."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        names = [f"{self.base}.{end}" for end in ("qweight", "qzeros", "scales")]
        return (*names, self._order) if self._order in self.tensors else tuple(names)

    @property
    def _order(self) -> str:
        return f"{self.base}.g_idx"

    def _bits(self, num_inputs: int) -> int:
        """Return the bits of this layer, which may differ from the others'. Raises ConfigError."""
        words = self.names[0]
        self.tensors.check_rank(words, 2, ("I32",))
        rows = self.tensors.shape(words)[0]
        bits, rest = divmod(rows * WORD_BITS, num_inputs)
        stated = self.settings.bits
        if rest or bits not in BITS or (bits != stated and stated and not self.settings.varies):
            expected = f"{stated} bits" if stated else "4 or 8 bits"
            raise self.tensors.error(
                words, f"has {rows} rows, which are not {expected} of {num_inputs} inputs"
            )
        return bits

    def _group(self, num_inputs: int) -> int:
        """Return how many inputs share a scale. Raises ConfigError."""
        scales = self.names[2]
        self.tensors.check_rank(scales, 2, FLOATS)
        groups = self.tensors.shape(scales)[0]
        group = self.settings.group_of(num_inputs)
        if -(-num_inputs // group) == groups:
            return group
        if self.settings.varies and groups and num_inputs % groups == 0:
            return num_inputs // groups
        raise self.tensors.error(
            scales, f"has {groups} groups, where {num_inputs} inputs make groups of {group}"
        )

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        num_outputs, num_inputs = shape
        words, zeros, scales = self.names[:3]
        bits = self._bits(num_inputs)
        packed = WORD_BITS // bits
        self.tensors.check(words, ((num_inputs // packed, num_outputs),), ("I32",))
        groups = -(-num_inputs // self._group(num_inputs))
        self.tensors.check(scales, ((groups, num_outputs),), FLOATS)
        self.tensors.check(zeros, ((groups, -(-num_outputs // packed)),), ("I32",))
        if self._order in self.tensors:
            self.tensors.check(self._order, ((num_inputs,),), ("I32", "I64"))
        elif self.settings.has_act_order and groups > 1:
            raise self.tensors.error(self._order, "is missing, though desc_act is true")

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        num_outputs, num_inputs = shape
        bits, group = self._bits(num_inputs), self._group(num_inputs)
        words = self.tensors.read(self.names[0])
        scales = self.tensors.read_finite(self.names[2])
        zeros = self._zeros(bits, num_outputs)
        is_centred = bool((zeros == centre(bits)).all())
        groups = self._groups(num_inputs, group, scales.shape[0])
        order = None if groups is None else order_of(groups, group)

        def read(first: int, end: int) -> QuantizedTensor | torch.Tensor:
            codes = codes_of(words[:, first:end].t(), bits)
            own_scales, own_zeros = scales[:, first:end].t(), zeros[:, first:end].t()
            if groups is not None and order is None:
                return ungrouped(codes, own_scales, own_zeros, groups)
            if order is not None:
                codes = codes[:, order]
            return quantized(codes, own_scales, None if is_centred else own_zeros, bits, group)

        label = f"{self.settings.label}, groups of {group}"
        if groups is not None:
            label += " in act-order"
        return CodedWeight(shape, label, read, (words, scales), order)

    def _zeros(self, bits: int, num_outputs: int) -> torch.Tensor:
        """Return the zero points (G, N) int16."""
        words = self.tensors.read(self.names[1]) + self.settings.zero_shift * _ONES[bits]
        return codes_of(words, bits)[:, :num_outputs].to(torch.int16)

    def _groups(self, num_inputs: int, group: int, num_groups: int) -> torch.Tensor | None:
        """Return the group (K,) int64 of each input; None if they lie one behind the other."""
        if self._order not in self.tensors or num_groups == 1:
            return None
        groups = self.tensors.read(self._order).long()
        if not self.settings.has_act_order and not groups.any():
            return None  # it was never filled
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise self.tensors.error(self._order, f"has groups outside 0 to {num_groups - 1}")
        in_order = torch.arange(num_inputs) // group
        return None if torch.equal(groups, in_order) else groups
