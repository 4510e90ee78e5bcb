"""Random ragged batches with blocks scattered over the cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout, LayerCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error of attention outputs: rounding of values about 1."""


def make_batch(
    layout: KVCacheLayout,
    lengths: Sequence[tuple[int, int]],
    rotary_dim: int | None = None,
    seed: int = 0,
) -> AttentionBatch:
    """A batch of sequences given as (kv length, query length), single queries first.

    The cache is full of noise.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(lengths, key=lambda pair: pair[1] != 1)
    size = layout.block_size
    counts = [-(-kv_len // size) for kv_len, _ in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator).to(torch.int32)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    taken = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = order[taken : taken + count]
        taken += count
    caches = ops.allocate_cache(layout, sum(counts) + 2, torch.device("cpu"))
    for cache in caches:
        fill_with_noise(cache, generator)
    query_lens = [query_len for _, query_len in lengths]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    half = (layout.head_dim if rotary_dim is None else rotary_dim) // 2
    angle = torch.rand(sum(query_lens), half, generator=generator) * 6.28
    kv_lens = [kv_len for kv_len, _ in lengths]
    return AttentionBatch(
        query_start=starts,
        kv_len=torch.tensor(kv_lens, dtype=torch.int32),
        block_table=table,
        num_decodes=sum(query_len == 1 for query_len in query_lens),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        cos=angle.cos(),
        sin=angle.sin(),
        caches=caches,
        query_lens=query_lens,
        kv_lens=kv_lens,
    )


def fill_with_noise(cache: LayerCache, generator: torch.Generator) -> None:
    """Write random keys and values into every slot of a cache."""
    if cache.records is None:
        cache.k.copy_(torch.randn(cache.k.shape, generator=generator))
        cache.v.copy_(torch.randn(cache.v.shape, generator=generator))
        return
    size = cache.block_size
    slots = torch.arange(cache.k.shape[0] * size)
    shape = (len(slots), cache.num_kv_heads, cache.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    cache.records.write(k, v, cache.k, cache.v, slots // size, slots % size)


def twin(batch: AttentionBatch) -> AttentionBatch:
    """The same batch with caches of its own."""
    other = copy.deepcopy(batch)
    other.scratch = {}
    return other
