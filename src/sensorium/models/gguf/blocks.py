"""Blocks of quantized tensors taken apart: integers, scales and minimums.

A number is ``code * scale``, in some kinds ``code * scale + minimum``, with one scale for each
group of 16 or 32. Source: ``ggml-common.h`` and ``ggml-quants.c`` of ggml, which define the bits of
each kind; see ``docs/gguf.md`` for what becomes of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sensorium.models.gguf.kinds import KINDS

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Numbers of the sixteen codes of IQ4_NL and IQ4_XS."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Numbers of some blocks, in order.

    values: (B, n) int8. scales, minimums: (B, n / group) float32; without minimums they are 0.
    """

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None

    def floats(self) -> torch.Tensor:
        """Return the numbers (B, n) as float32."""
        group = self.values.shape[1] // self.scales.shape[1]
        groups: torch.Tensor = self.values.view(len(self.values), -1, group).float()
        groups *= self.scales[:, :, None]
        if self.minimums is not None:
            groups += self.minimums[:, :, None]
        return groups.flatten(1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers of a kind: their bits in our products, inputs per scale, minimums or none."""

    bits: int
    group: int
    has_minimums: bool
    take_apart: Callable[[torch.Tensor], Codes]
    """(B, bytes of a block) uint8 -> the codes of these blocks."""

    @property
    def has_product(self) -> bool:
        """Return whether a product may take these integers: in groups of 32."""
        return self.group == 32


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the float16 numbers at a place of each block, as (B, 1) float32."""
    halves = blocks[:, start : start + 2].contiguous()
    return halves.view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the low halves of all bytes, then the high halves: (..., n) -> (..., 2 n) int8."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """Return the bits of bytes, the lowest first: (B, n) -> (B, 8 n) uint8."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1)


def _q4_0(blocks: torch.Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 2:]) - 8, _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Codes:
    high = (_bits(blocks[:, 2:6]) << 4).view(torch.int8)
    return Codes((_nibbles(blocks[:, 6:]) | high) - 16, _half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Codes:
    high = (_bits(blocks[:, 4:8]) << 4).view(torch.int8)
    return Codes(_nibbles(blocks[:, 8:]) | high, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Codes:
    return Codes(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _quarters(packed: torch.Tensor) -> torch.Tensor:
    """Return the four pairs of bits of bytes, 32 by 32: (B, 32 n) -> (B, 128 n) uint8."""
    parts = packed.reshape(len(packed), -1, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((parts >> shifts) & 3).flatten(1)


def _q2_k(blocks: torch.Tensor) -> Codes:
    scales, values = blocks[:, :16], _quarters(blocks[:, 16:80]).view(torch.int8)
    step, least = _half(blocks, 80), _half(blocks, 82)
    return Codes(values, step * (scales & 15).float(), -least * (scales >> 4).float())


def _q3_k(blocks: torch.Tensor) -> Codes:
    high, low, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    # Bit n of the 32 bytes belongs to the n-th 32 numbers; it takes 4 off where it is not set.
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    set_bits = ((high[:, None, :] >> shifts) & 1).flatten(1)
    values = (_quarters(low) + (set_bits << 2)).view(torch.int8) - 4
    halves = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    pairs = (packed[:, None, 8:12] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3
    scales = (halves | (pairs.flatten(1) << 4)).view(torch.int8) - 32
    return Codes(values, _half(blocks, 108) * scales.float())


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eight scales and the eight minimums in the 12 bytes of Q4_K and Q5_K."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minimums.float()


def _k_steps(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minimums (B, 8) of Q4_K and Q5_K."""
    scales, minimums = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minimums


def _q4_k(blocks: torch.Tensor) -> Codes:
    values = _nibbles(blocks[:, 16:144].unflatten(1, (4, 32))).flatten(1)
    return Codes(values, *_k_steps(blocks))


def _q5_k(blocks: torch.Tensor) -> Codes:
    low = _nibbles(blocks[:, 48:176].unflatten(1, (4, 32))).flatten(1)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = ((blocks[:, None, 16:48] >> shifts) & 1).flatten(1) << 4
    return Codes(low | high.view(torch.int8), *_k_steps(blocks))


def _q6_k(blocks: torch.Tensor) -> Codes:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).flatten(1)
    high = (_quarters(blocks[:, 128:192]) << 4).view(torch.int8)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Codes((low | high) - 32, _half(blocks, 208) * scales)


def _levels(packed: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_IQ4, dtype=torch.int8)[_nibbles(packed).int()]


def _iq4_nl(blocks: torch.Tensor) -> Codes:
    return Codes(_levels(blocks[:, 2:]), _half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> Codes:
    values = _levels(blocks[:, 8:].unflatten(1, (8, 16))).flatten(1)
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    halves = torch.stack((low & 15, low >> 4), dim=2).flatten(1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    pairs = ((high[:, :, None] >> shifts) & 3).flatten(1)
    scales = (halves | (pairs << 4)).view(torch.int8) - 32
    return Codes(values, _half(blocks, 0) * scales.float())


GRIDS: dict[str, Grid] = {
    "Q4_0": Grid(4, 32, False, _q4_0),
    "Q4_1": Grid(4, 32, True, _q4_1),
    "Q5_0": Grid(8, 32, False, _q5_0),
    "Q5_1": Grid(8, 32, True, _q5_1),
    "Q8_0": Grid(8, 32, False, _q8_0),
    "Q2_K": Grid(4, 16, True, _q2_k),
    "Q3_K": Grid(4, 16, False, _q3_k),
    "Q4_K": Grid(4, 32, True, _q4_k),
    "Q5_K": Grid(8, 32, True, _q5_k),
    "Q6_K": Grid(8, 16, False, _q6_k),
    "IQ4_NL": Grid(8, 32, False, _iq4_nl),
    "IQ4_XS": Grid(8, 32, False, _iq4_xs),
}
"""Grids of the quantized kinds, by name."""
SIZES = {kind.name: kind.num_bytes for kind in KINDS.values()}
"""Bytes of a block of each kind, by its name."""
