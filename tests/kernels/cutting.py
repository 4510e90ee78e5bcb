"""Steps of attention cut in other ways, and one sequence of them alone: what must have equal bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sensorium.kernels import ops, reference
from sensorium.kernels.batch import AttentionBatch, AttentionVariant, KVCacheLayout
from tests.kernels.batches import make_batch, twin


def cuts(length: int, seed: int) -> list[int]:
    """Sizes of pieces that sum to ``length``: single rows, a few, many."""
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    while length:
        most = (1, 5, 40, 300)[int(torch.randint(4, (), generator=generator))]
        size = min(length, int(torch.randint(1, most + 1, (), generator=generator)))
        sizes.append(size)
        length -= size
    return sizes


def part_of(whole: AttentionBatch, start: int, size: int) -> AttentionBatch:
    """Return the step that computes rows [start, start + size) of ``whole``'s only sequence."""
    return AttentionBatch(
        query_start=torch.tensor([0, size], dtype=torch.int32),
        kv_len=torch.tensor([start + size], dtype=torch.int32),
        block_table=whole.block_table,
        num_decodes=int(size == 1),
        max_query_len=size,
        max_kv_len=start + size,
        cos=whole.cos[start : start + size],
        sin=whole.sin[start : start + size],
        caches=whole.caches,
        query_lens=[size],
        kv_lens=[start + size],
    )


@dataclass
class CutPrompt:
    """Attention (T, heads * D) of a prompt at once, in pieces, and by the reference."""

    whole: torch.Tensor
    pieces: torch.Tensor
    reference: torch.Tensor
    keys: tuple[torch.Tensor, torch.Tensor]
    """The cache's after the whole and after the pieces."""


def attend_cut(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    length: int,
    seed: int,
    threads: int,
    normed: bool,
) -> CutPrompt:
    """Attend to a random prompt whole, and cut with another number of threads.

    heads: number, number of KV heads, dimension.
    """
    num_heads, num_kv_heads, dim = heads
    layout = KVCacheLayout(1, num_kv_heads, dim, 16, dtype)
    whole = make_batch(layout, [(length, length)], dim // 2, seed)
    whole.num_decodes = int(length == 1)
    generator = torch.Generator().manual_seed(seed)
    width = (num_heads + 2 * num_kv_heads) * dim
    qkv = torch.randn(length, width, generator=generator).to(dtype)
    norms = [torch.rand(dim, generator=generator).to(dtype) if normed else None for _ in range(2)]
    run = (0, num_heads, num_kv_heads, dim, dim**-0.5, *norms, 1e-6)
    wanted = reference.rope_attention(qkv, twin(whole), *run)
    at_once = ops.rope_attention(qkv, whole, *run).clone()
    keys = whole.caches[0].k.clone()
    pieces = in_pieces(qkv, whole, run, seed, threads)
    return CutPrompt(at_once, pieces, wanted, (keys, whole.caches[0].k))


def in_pieces(
    qkv: torch.Tensor, whole: AttentionBatch, run: Sequence[Any], seed: int, threads: int
) -> torch.Tensor:
    """Attend to a prompt cut by ``seed``, with so many threads. run: further arguments."""
    parts, start = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        for size in cuts(len(qkv), seed):
            step = part_of(whole, start, size)
            parts.append(ops.rope_attention(qkv[start : start + size], step, *run))
            start += size
    return torch.cat(parts)


def each_alone(
    batch: AttentionBatch, asked: AttentionVariant
) -> Iterator[tuple[slice, AttentionBatch, AttentionVariant]]:
    """Yield, for each sequence of a step: its rows, a step of it alone, its own variant."""
    starts = batch.query_start.tolist()
    for index, (kv_len, query_len) in enumerate(zip(batch.kv_lens, batch.query_lens, strict=True)):
        rows = slice(starts[index], starts[index + 1])
        alone = part_of(batch, kv_len - query_len, query_len)
        alone.block_table = batch.block_table[index : index + 1]
        alone.cos, alone.sin = batch.cos[rows], batch.sin[rows]
        own = asked
        if asked.bidirectional is not None:
            own = AttentionVariant(asked.window, bidirectional=asked.bidirectional[:, rows])
        yield rows, alone, own


VARIANTS = ("window", "wide window", "softcap", "sinks", "bidirectional")


def variant_of(what: str, batch: AttentionBatch) -> AttentionVariant:
    """Return a variant whose spans, if any, lie in the fourth sequence of the batch."""
    if what != "bidirectional":
        sinks = torch.linspace(-1, 2, 6)
        return {
            "window": AttentionVariant(window=24),
            "wide window": AttentionVariant(window=300),
            "softcap": AttentionVariant(softcap=3.0),
            "sinks": AttentionVariant(window=40, sinks=sinks),
        }[what]
    _, own = reference.token_positions(batch)
    spans = torch.stack((own, own))
    inside = slice(batch.query_start[3] + 5, batch.query_start[3] + 15)
    spans[:, inside] = own[inside][[0, -1]][:, None]
    return AttentionVariant(window=24, bidirectional=spans)
