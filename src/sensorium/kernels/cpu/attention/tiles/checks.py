"""Small random problems by which attention with matrix tiles is compared with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numba import types

from sensorium.kernels.batch import AttentionBatch, AttentionVariant, LayerCache
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.amx import BLOCK, DEPTH
from sensorium.kernels.cpu.attention import paged, varlen_vectors
from sensorium.kernels.cpu.attention.route import VECTORS, Route
from sensorium.kernels.cpu.attention.tiles import varlen
from sensorium.kernels.cpu.attention.tiles.pairs import PAIR_COLUMNS, PAIR_ROWS, multiply_pairs
from sensorium.kernels.cpu.denormals import flush_denormals, restore_denormals
from sensorium.kernels.cpu.elementwise import kernel
from sensorium.kernels.cpu.launch import pack
from sensorium.kernels.cpu.numeric import pointer, shifted
from sensorium.kernels.cpu.tile_check import RIGHT, SAME_BITS, WRONG

TOLERANCE = 0.03
"""Largest error of values about 1: some roundings to bf16."""
_HEADS, _KV_HEADS, _DIM, _BLOCK = 6, 2, 80, 16
_LENGTHS = ((300, 1), (40, 40), (530, 70))
"""KV and query lengths of the sequences."""
_ALWAYS, _NEVER = 1, 1 << 30


def _differs(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return not (found.float() - expected.float()).abs().max().item() <= TOLERANCE


def encoders(unit: amx.Unit) -> int:
    """Compare attention of encoders."""
    if products(unit) == WRONG:
        return WRONG
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(613, 3, 2, _DIM, generator=generator).bfloat16().unbind(1)
    starts = (0, 33, 613)
    found = varlen.attention_by(unit, q, k, v, starts, _DIM**-0.5)
    expected = varlen_vectors.varlen_attention(q, k, v, starts, _DIM**-0.5)
    return WRONG if _differs(found, expected) else RIGHT


def make_step(
    lengths: Sequence[tuple[int, int]], kv_heads: int, dim: int, generator: torch.Generator
) -> AttentionBatch:
    """Return a step of sequences (KV length, query length) over blocks in a random order.

    Single queries come first. Rows are not rotated, and keys and values are random.
    """
    counts = [-(-kv_len // _BLOCK) for kv_len, _ in lengths]
    order = torch.randperm(sum(counts), generator=generator).to(torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, count, own in zip(table, counts, order.split(counts), strict=True):
        row[:count] = own
    shape = (sum(counts), kv_heads)
    k = torch.randn(*shape, dim, _BLOCK, generator=generator).bfloat16()
    v = torch.randn(*shape, _BLOCK, dim, generator=generator).bfloat16()
    query_lens = [query_len for _, query_len in lengths]
    kv_lens = [kv_len for kv_len, _ in lengths]
    none = torch.empty(sum(query_lens), 0)
    return AttentionBatch(
        query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        kv_len=torch.tensor(kv_lens, dtype=torch.int32),
        block_table=table,
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        cos=none,
        sin=none,
        caches=[LayerCache(k, v)],
        query_lens=query_lens,
        kv_lens=kv_lens,
    )


def build_probe(element: Any, unit: amx.Unit) -> Callable[[Any], None]:
    """Build the kernel of one product of 32 x 32 numbers by tiles and by ``multiply_pairs``.

    args: a (32, depth), b by pairs of rows (depth / 2, 32, 2), b (depth, 32), both results (32, 32)
    float32, depth.
    """
    tiles = amx.operations(unit, amx.full_tiles())
    own_state, configure, release = tiles.state, tiles.configure, tiles.release
    multiply_block = amx.block_product(unit)

    def probe(args: Any) -> None:
        a, pairs, b = (
            pointer(args[3], element),
            pointer(args[4], element),
            pointer(args[5], element),
        )
        by_tiles, by_pairs = pointer(args[6], types.float32), pointer(args[7], types.float32)
        depth = args[8]
        state = own_state()
        before = flush_denormals()
        configure(state)
        multiply_block(state, a, depth, pairs, 2 * BLOCK, depth, by_tiles, BLOCK, True, False)
        for row in range(0, BLOCK, PAIR_ROWS):
            for d in range(0, depth, DEPTH):
                even = shifted(b, d * BLOCK)
                multiply_pairs(
                    *(min(PAIR_ROWS, BLOCK - row), shifted(a, row * depth + d), depth),
                    *(even, shifted(even, BLOCK), 2 * BLOCK, DEPTH // 2, DEPTH // 2),
                    *(shifted(by_pairs, row * BLOCK), BLOCK, PAIR_COLUMNS, d > 0, even),
                )
        release(state)
        restore_denormals(before)

    probe.__qualname__ += f"_{unit.name}"
    return probe


def products(unit: amx.Unit) -> int:
    """Compare products by tiles with the manual's order of sums, by numbers of many sizes."""
    generator = torch.Generator().manual_seed(1)
    depth, same = 8 * DEPTH, True
    for least, most in ((-4, 4), (-30, 30), (-66, -58)):
        a, b = (
            torch.randn(*shape, generator=generator).bfloat16()
            * torch.exp2(torch.randint(least, most, shape, generator=generator)).bfloat16()
            for shape in ((BLOCK, depth), (depth, BLOCK))
        )
        pairs = b.view(depth // 2, 2, BLOCK).transpose(1, 2).contiguous()
        by_tiles, by_pairs = torch.zeros(BLOCK, BLOCK), torch.zeros(BLOCK, BLOCK)
        places = [tensor.data_ptr() for tensor in (a, pairs, b, by_tiles, by_pairs)]
        kernel(amx.bound(build_probe, unit), torch.bfloat16).serial(pack(1, *places, depth))
        bound = a.double().abs() @ b.double().abs() * 2.0**-16 + 2.0**-118
        if not ((by_tiles - a.double() @ b.double()).abs() <= bound).all():
            return WRONG
        same = same and torch.equal(by_tiles.view(torch.int32), by_pairs.view(torch.int32))
    return SAME_BITS if same else RIGHT


def causal(unit: amx.Unit) -> int:
    """Compare attention of decoders: tiles and their sums in vectors with the vector kernel."""
    found = products(unit)
    if found == WRONG:
        return found
    generator = torch.Generator().manual_seed(0)
    step = make_step(_LENGTHS, _KV_HEADS, _DIM, generator)
    width = (_HEADS + 2 * _KV_HEADS) * _DIM
    qkv = torch.randn(sum(step.query_lens), width, generator=generator).bfloat16()
    for variant in (AttentionVariant(), AttentionVariant(window=270, softcap=8.0)):
        results = []
        for route in (VECTORS, Route(unit, _ALWAYS), Route(unit, _NEVER)):
            step.scratch = {}
            shape = (0, _HEADS, _KV_HEADS, _DIM, _DIM**-0.5)
            results.append(paged.rope_attention(qkv, step, *shape, variant=variant, route=route))
        vectors, tiles, pairs = results
        if _differs(tiles, vectors) or _differs(pairs, vectors):
            return WRONG
    return found
