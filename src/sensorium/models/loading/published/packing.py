"""Integers packed into words of 32 bits, and what makes weights of them."""

from __future__ import annotations

import numpy as np
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


def order_of(groups: torch.Tensor, group: int) -> torch.Tensor | None:
    """Return the inputs by their groups (K,) int32, so that groups lie one behind the other.

    groups: (K,) int64, the group of each input. None where these are not of one size.
    """
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], torch.arange(len(groups)) // group):
        return None
    return order.int()


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


def bit_stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack words of 32 bits (R, W) whose codes lie one behind the other: (R, W * 32 / bits).

    They may run across the ends of words. Returns uint8.
    """
    if bits in BITS:
        return codes_of(words, bits)
    octets = words.contiguous().view(torch.uint8).numpy()
    by_code = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(octets), -1, bits)
    codes = np.packbits(by_code, axis=2, bitorder="little")
    return torch.from_numpy(codes.squeeze(2))
