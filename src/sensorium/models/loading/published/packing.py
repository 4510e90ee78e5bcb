"""Integers packed into words of 32 bits, and what makes weights of them."""

from __future__ import annotations

import torch

from sensorium.kernels.weight import QuantizedTensor

WORD_BITS = 32
BITS = (4, 8)


def codes_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words (R, W), the lowest bits first: (R, W * 32 / bits) uint8."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 0x0F, octets >> 4), dim=-1).flatten(1)


def num_words(num_codes: int, bits: int) -> int:
    """Return the number of words that hold so many codes."""
    return -(-num_codes * bits // WORD_BITS)


def centre(bits: int) -> int:
    """Return the zero point of symmetric codes."""
    return 1 << (bits - 1)


def quantized(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int
) -> QuantizedTensor:
    """Return the weight (n, K) of codes: (codes - zeros) * scales.

    codes: (n, K) uint8. scales: (n, G) of any float type. zeros: (n, G) integers; None for the
    centre.
    """
    scales = scales.float().contiguous()
    middle = centre(bits)
    if bits == 8:
        # Both move to numbers with sign.
        moved = None if zeros is None else (zeros.to(torch.int16) - middle).to(torch.int8)
        values = (codes ^ middle).view(torch.int8)
    elif zeros is None:
        moved, values = None, (codes - middle).view(torch.int8)
    else:
        moved, values = zeros.to(torch.int8), codes.view(torch.int8)
    moved = None if moved is None else moved.contiguous()
    return QuantizedTensor(values, scales, bits, group, zeros=moved)


def ungrouped(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Return (codes - zeros) * scales (n, K) as float32 for inputs that lie in any groups.

    groups: (K,) int64, the group of each input.
    """
    wide = codes.float()
    wide -= zeros.float()[:, groups]
    wide *= scales.float()[:, groups]
    return wide
