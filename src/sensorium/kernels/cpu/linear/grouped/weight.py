"""Weights with scales by groups of inputs at rest: packing, reading rows, storing."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch

from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.cpu.launch import Launcher
from sensorium.kernels.cpu.linear.grouped.tile import (
    GROUP,
    MINIMUMS,
    OFFSET_BYTES,
    SYMMETRIC,
    ZEROS,
    GroupLayout,
    compiled,
)
from sensorium.kernels.cpu.linear.integer.kernel import IntegerProduct, ManyRows
from sensorium.kernels.cpu.linear.integers import forms
from sensorium.kernels.cpu.numeric import WIDTH
from sensorium.kernels.weight import Multiply, PackedWeight, QuantizedTensor

PACK_VALUES = 4 * 1024 * 1024
"""Weights that are packed at once: bounds temporary memory."""
TOP_EXPONENT = 8
"""The largest scale of an output is kept as a float16 below 2 to this power. So those of its other
groups may be a million times smaller before they lose bits."""


def offsets_of(weight: QuantizedTensor) -> str:
    """Return the kind of offsets that a weight has, a key of ``OFFSET_BYTES``."""
    if weight.zeros is not None:
        return ZEROS
    return SYMMETRIC if weight.minimums is None else MINIMUMS


@functools.cache
def kernel(layout: GroupLayout, dtype: torch.dtype, form: str) -> Launcher:
    """Return the kernel of vectors for activations of ``dtype``."""
    return compiled(layout, dtype, form)


class GroupedWeight(PackedWeight):
    """Weight of small integers with scales by groups of 32 inputs, in panels of sixteen outputs.

    Scales and minimums are float16 times a power of two of their output, so that those of a
    checkpoint in float16 or bfloat16 are exact at rest.
    """

    bits: ClassVar[int]

    def __init__(
        self,
        packed: torch.Tensor,
        factors: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        offsets: str = SYMMETRIC,
        form: str | None = None,
    ) -> None:
        """Wrap ``packed`` (N/16, K/32, bytes of a group) and the outputs' powers of two, (N,).

        Both sizes are rounded up. offsets: what the groups have beside scales.
        """
        self.packed, self.factors, self.dtype = packed, factors, dtype
        self.num_outputs, self.num_inputs = shape
        self.layout = GroupLayout(self.bits, offsets)
        self.form = form or forms()[-1]

    @classmethod
    def takes(cls, weight: QuantizedTensor) -> bool:
        """Return whether ``pack`` takes a weight: its bits, groups of a multiple of 32 inputs."""
        return weight.bits == cls.bits and (
            weight.scales.shape[1] == 1 or weight.group % GROUP == 0
        )

    @classmethod
    def pack(cls, weight: QuantizedTensor, dtype: torch.dtype) -> Self:
        """Pack a quantized weight for activations of ``dtype``.

        Raises ValueError for other bits or groups than it ``takes``.
        """
        num_outputs, num_inputs = weight.shape
        if not cls.takes(weight):
            raise ValueError(
                f"int{cls.bits} products take {cls.bits} bits and groups of a multiple of 32 inputs"
            )
        layout = GroupLayout(cls.bits, offsets_of(weight))
        panels, groups = -(-num_outputs // WIDTH), -(-num_inputs // GROUP)
        packed = huge_pages.shared_zeros((panels, groups, layout.num_bytes), torch.uint8)
        factors = torch.ones(panels * WIDTH)
        factors[:num_outputs] = _powers(weight)
        band = max(1, PACK_VALUES // (WIDTH * num_inputs))
        for first in range(0, panels, band):
            rows = slice(first * WIDTH, min((first + band) * WIDTH, num_outputs))
            cls._pack_band(packed[first : first + band], weight.rows_of(rows), factors[rows])
        return cls(packed, factors, (num_outputs, num_inputs), dtype, layout.offsets)

    @classmethod
    def _pack_band(
        cls, panels: torch.Tensor, weight: QuantizedTensor, factors: torch.Tensor
    ) -> None:
        """Write outputs into panels (P, G, bytes); those that lack to whole ones are zeros."""
        layout = GroupLayout(cls.bits, offsets_of(weight))
        num_panels, groups, _ = panels.shape
        num_rows, num_inputs = weight.shape
        codes = torch.full((num_panels * WIDTH, groups * GROUP), layout.bias, dtype=torch.uint8)
        # Bytes wrap around, so that adding the bias takes the sign off.
        codes[:num_rows, :num_inputs] = weight.values.view(torch.uint8) + layout.bias
        cls._place(panels, codes.view(num_panels, WIDTH, groups, GROUP))

        def place(values: torch.Tensor, dtype: torch.dtype, start: int) -> None:
            spread = weight.group // GROUP if values.shape[1] > 1 else groups
            values = values.repeat_interleave(spread, dim=1)[:, :groups]
            padded = torch.zeros((num_panels * WIDTH, groups), dtype=dtype)
            padded[:num_rows] = values.to(dtype)
            by_group = padded.view(num_panels, WIDTH, groups).transpose(1, 2).contiguous()
            own = by_group.view(torch.uint8)
            panels[:, :, start : start + own.shape[2]] = own

        place(weight.scales / factors[:, None], torch.float16, layout.weight_bytes)
        if weight.zeros is not None:
            place(weight.zeros.view(torch.uint8) + layout.bias, torch.uint8, layout.offsets_at)
        if weight.minimums is not None:
            place(-weight.minimums / factors[:, None], torch.float16, layout.offsets_at)

    @staticmethod
    @abstractmethod
    def _place(panels: torch.Tensor, codes: torch.Tensor) -> None:
        """Write codes (P, 16, G, 32) into the first bytes of groups (P, G, bytes)."""

    @abstractmethod
    def _codes(self, panel: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        """Return the codes (T, G, 32) uint8 of some outputs, those of ``lane`` of ``panel``."""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.factors.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        return self.bind_form(self.form, bias, act)

    def bind_form(
        self,
        form: str,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        many: ManyRows | None = None,
    ) -> Multiply:
        """Return ``bind`` in one form of instructions, with ``many`` for many rows."""
        own, rows = self.kernel(form), self.layout.rows(form)
        return IntegerProduct(
            *(own, rows, self.shape, self.packed, self.factors, bias, act, self.dtype), many=many
        )

    def kernel(self, form: str) -> Launcher:
        """Return the kernel in one form of instructions, compiled or loaded at first use."""
        return kernel(self.layout, self.dtype, form)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        layout, panel, lane = self.layout, ids // WIDTH, ids % WIDTH
        codes, halves = self._codes(panel, lane).float(), self.packed.view(torch.float16)
        if layout.offsets == ZEROS:
            codes.sub_(self.packed[panel, :, layout.offsets_at + lane].float()[:, :, None])
        else:
            codes.sub_(layout.bias)
        wide = codes.mul_(halves[panel, :, layout.weight_bytes // 2 + lane].float()[:, :, None])
        if layout.offsets == MINIMUMS:
            wide.sub_(halves[panel, :, layout.offsets_at // 2 + lane].float()[:, :, None])
        wide = wide.flatten(1).mul_(self.factors[ids][:, None])
        return wide[:, : self.num_inputs].to(self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        name = "_".join(filter(None, ("packed", self.layout.offsets)))
        return {name: self.packed, "factors": self.factors}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        (name,) = tensors.keys() - {"factors"}
        offsets, factors, packed = name[len("packed_") :], tensors["factors"], tensors[name]
        panels = -(-shape[0] // WIDTH)
        if (
            offsets not in OFFSET_BYTES
            or (packed.dtype, factors.dtype) != (torch.uint8, torch.float32)
            or tuple(factors.shape) != (panels * WIDTH,)
            or tuple(packed.shape)
            != (panels, -(-shape[1] // GROUP), GroupLayout(cls.bits, offsets).num_bytes)
            or not (packed.is_contiguous() and factors.is_contiguous())
        ):
            raise ValueError(f"these are not the panels of a weight of {shape}")
        return cls(packed, factors, shape, dtype, offsets)


def _powers(weight: QuantizedTensor) -> torch.Tensor:
    """Return the power of two of each output (N,) that its scales and minimums are divided by."""
    peaks = weight.scales.abs().amax(dim=1)
    if weight.minimums is not None:
        peaks = torch.maximum(peaks, weight.minimums.abs().amax(dim=1))
    exponents = torch.frexp(peaks).exponent - TOP_EXPONENT
    usable = peaks.isfinite() & (peaks > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(peaks), exponents.clamp(-126, 127)), 1.0)
