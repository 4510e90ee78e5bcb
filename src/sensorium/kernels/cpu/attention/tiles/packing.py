"""Keys and values of the cache in the order that matrix tiles read."""

from __future__ import annotations

from typing import Any

from numba import types

from sensorium.kernels.cpu.amx import BLOCK, DEPTH, TILE
from sensorium.kernels.cpu.attention.tiles.softmax import interleave16, up
from sensorium.kernels.cpu.numeric import OUTLINE, WIDTH, njit, shifted


@njit(**OUTLINE)
def pack_keys(
    k_cache: Any,
    table: Any,
    head_at: Any,
    dim: Any,
    block_size: Any,
    start: Any,
    end: Any,
    out: Any,
) -> None:
    """Pack the keys of 32 tokens from ``start`` on: pairs (depth / 2, 32), zeros from ``end`` on.

    Blocks that begin behind ``end`` are not read. head_at: (stride of a block, offset of the head
    within it) in elements.
    """
    half_depth = up(dim, DEPTH) // 2
    for half in range(2):
        token, column = start + half * TILE, half * TILE
        filled = 0
        if token < end:
            filled = dim // 2
            block = types.int64(table[token // block_size])
            keys = shifted(k_cache, block * head_at[0] + head_at[1] + token % block_size)
            for pair in range(filled):
                even = shifted(keys, 2 * pair * block_size)
                interleave16(even, shifted(even, block_size), out, pair * BLOCK + column)
        for pair in range(filled, half_depth):
            for i in range(TILE):
                out[pair * BLOCK + column + i] = types.uint32(0)


@njit(**OUTLINE)
def pack_values(
    v_cache: Any,
    table: Any,
    head_at: Any,
    dim: Any,
    block_size: Any,
    start: Any,
    end: Any,
    out: Any,
) -> None:
    """Pack the values of 32 tokens from ``start`` on: pairs (16, dim) of the tokens i and i + 16.

    Zeros from ``end`` on, which are not read.
    """
    for i in range(TILE):
        first, second = start + i, start + TILE + i
        row = shifted(out, i * dim)
        if first >= end:
            for d in range(dim):
                row[d] = types.uint32(0)
            continue
        block = types.int64(table[first // block_size])
        upper = shifted(v_cache, block * head_at[0] + head_at[1] + first % block_size * dim)
        if second >= end:
            for d in range(dim):
                row[d] = types.uint32(upper[d])
            continue
        block = types.int64(table[second // block_size])
        lower = shifted(v_cache, block * head_at[0] + head_at[1] + second % block_size * dim)
        for d in range(0, dim, WIDTH):
            interleave16(shifted(upper, d), shifted(lower, d), row, d)
