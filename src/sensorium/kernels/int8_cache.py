"""KV cache in int8: its layout, and the plain torch that writes and reads it.

Each key and each value of a head is a vector of int8 codes with a scale of its own: code c stands
for c * scale. Before it is quantized, a key goes through a Hadamard transform, and so do queries:
that changes no score, and spreads the few channels in which keys are many times larger than in
others (the outliers of Qwen2, for example) over all, where they would make the codes of the others
coarse (Ashkboos et al., QuaRot, 2024).

A tensor of the cache is (blocks, KV heads, bytes of a record). The record of a block's keys holds
the codes as (D / 2, tokens, 2) - pairs of channels, which integer instructions multiply at once -
and then the scales of the tokens in bf16. That of its values holds (tokens / 2, D padded to 16, 2),
pairs of tokens, and the scales.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

LIMIT = 127
"""Largest code."""
LEAST = 2.0**-100
"""Vectors without a larger number count as zeros."""
SCALE_BYTES = 2
LANES = 16
"""Channels of values are padded to a multiple of it."""


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Records:
    """Layout of the records of one block and head."""

    head_dim: int
    block_size: int

    @property
    def key_depth(self) -> int:
        """Channels of a key with its padding: even."""
        return _up(self.head_dim, 2)

    @property
    def value_width(self) -> int:
        """Channels of a value with its padding."""
        return _up(self.head_dim, LANES)

    @property
    def key_codes(self) -> int:
        """Bytes of the codes of a block's keys; its scales follow."""
        return self.key_depth * self.block_size

    @property
    def value_codes(self) -> int:
        """Bytes of the codes of a block's values; its scales follow."""
        return self.value_width * _up(self.block_size, 2)

    @property
    def key_bytes(self) -> int:
        """Bytes of a record of keys."""
        return self.key_codes + SCALE_BYTES * self.block_size

    @property
    def value_bytes(self) -> int:
        """Bytes of a record of values."""
        return self.value_codes + SCALE_BYTES * self.block_size

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: torch.Tensor,
        offset: torch.Tensor,
    ) -> None:
        """Quantize keys and values (T, heads, D) into token ``offset`` of ``block`` (T,) each.

        k, v: the tensors of the cache.
        """
        codes, scales = quantized(hadamard(keys.float()))
        padded = torch.nn.functional.pad(codes, (0, self.key_depth - self.head_dim))
        key_codes, key_scales = self._keys(k)
        key_codes[block, :, :, offset] = padded.unflatten(-1, (-1, 2))
        key_scales[block, :, offset] = scales
        codes, scales = quantized(values.float())
        padded = torch.nn.functional.pad(codes, (0, self.value_width - self.head_dim))
        value_codes, value_scales = self._values(v)
        value_codes[block, :, offset // 2, :, offset % 2] = padded
        value_scales[block, :, offset] = scales

    def read(
        self, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys, still transformed, and values (B, heads, tokens, D) of blocks (B,)."""
        dim, size = self.head_dim, self.block_size
        codes, scales = self._keys(k[blocks])
        keys = codes.permute(0, 1, 3, 2, 4).flatten(-2)[..., :dim].to(dtype)
        keys = keys * scales.to(dtype)[..., None]
        codes, scales = self._values(v[blocks])
        values = codes.permute(0, 1, 2, 4, 3).flatten(2, 3)[:, :, :size, :dim].to(dtype)
        return keys, values * scales.to(dtype)[..., None]

    def for_scores(self, q: torch.Tensor) -> torch.Tensor:
        """Return queries (..., D) whose products with transformed keys are those of q with keys."""
        return (hadamard(q.float()) / transform_size(self.head_dim)).to(q.dtype)

    def _keys(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the codes (B, heads, D / 2, tokens, 2) and scales (B, heads, tokens)."""
        codes = k[..., : self.key_codes].unflatten(-1, (self.key_depth // 2, self.block_size, 2))
        return codes, k[..., self.key_codes :].view(torch.bfloat16)

    def _values(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the codes (B, heads, tokens / 2, D, 2) and scales (B, heads, tokens)."""
        pairs = _up(self.block_size, 2) // 2
        codes = v[..., : self.value_codes].unflatten(-1, (pairs, self.value_width, 2))
        return codes, v[..., self.value_codes :].view(torch.bfloat16)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes (..., D) and scales (...) in bf16 of vectors (..., D) in float32.

    The scale is the largest magnitude / 127, rounded up. A vector with a number that is not finite
    has NaN as its scale.
    """
    peak = x.abs().amax(-1)
    bits = (peak / LIMIT).view(torch.int32)
    scale = ((bits + 0xFFFF) >> 16 << 16).view(torch.float32)
    scale = torch.where(peak < LEAST, 0.0, scale)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    finite = torch.isfinite(x).all(-1)
    codes = torch.where(finite[..., None], x * inverse[..., None], 0.0).round()
    scale = torch.where(finite, scale, torch.nan)
    return codes.to(torch.int8), scale.to(torch.bfloat16)


def transform_size(head_dim: int) -> int:
    """Return the size of the Hadamard transform: the largest power of two that divides D."""
    return head_dim & -head_dim


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Transform (..., D) float32 in parts of ``transform_size``; twice is times that size."""
    size = transform_size(x.shape[-1])
    matrix = _matrix(size, x.device)
    return torch.matmul(x.unflatten(-1, (-1, size)), matrix).flatten(-2)


@functools.cache
def _matrix(size: int, device: torch.device) -> torch.Tensor:
    """Return Sylvester's matrix of a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
