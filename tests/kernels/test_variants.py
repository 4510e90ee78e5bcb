"""Paged attention of q, k, v that carry their positions.

The kernel against the reference, and what is not plain against attention written out over whole
sequences.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from sensorium.kernels import ops, reference
from sensorium.kernels.batch import PLAIN, AttentionBatch, AttentionVariant, KVCacheLayout
from tests.kernels.batches import DTYPES, TOLERANCE, make_batch, twin

LENGTHS = [(100, 1), (1, 1), (33, 33), (70, 20), (120, 90)]


def inputs(
    batch: AttentionBatch, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    num = sum(batch.query_lens)
    return [
        torch.randn(num, count, dim, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 32), (4, 4, 20)])
def test_kernel_agrees_with_reference(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    layout = KVCacheLayout(2, kv_heads, dim, 16, dtype)
    batch = make_batch(layout, LENGTHS)
    other = twin(batch)
    q, k, v = inputs(batch, heads, kv_heads, dim, dtype)
    for layer in range(2):
        found = ops.paged_attention(q, k, v, batch, layer, 0.3)
        wanted = reference.paged_attention(q, k, v, other, layer, 0.3)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for own, theirs in zip(batch.caches, other.caches, strict=True):
        assert torch.equal(own.k, theirs.k)
        assert torch.equal(own.v, theirs.v)


def spans(batch: AttentionBatch) -> torch.Tensor:
    """Return spans (2, T) of the computed tokens from index 10 to 24 of every sequence."""
    _, place = reference.token_positions(batch)
    last = torch.minimum(
        torch.tensor(24), batch.kv_len.long()[reference.token_positions(batch)[0]] - 1
    )
    inside = (place >= 10) & (place <= 24)
    return torch.stack((torch.where(inside, 10, place), torch.where(inside, last, place)))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("what", ["plain", "softcap", "sinks", "bidirectional", "all"])
def test_variants_are_attention_written_out(
    dtype: torch.dtype, window: int | None, what: str
) -> None:
    heads, kv_heads, dim = 4, 2, 16
    layout = KVCacheLayout(1, kv_heads, dim, 16, dtype)
    batch = make_batch(layout, [(70, 1), (1, 1), (33, 33), (50, 12)])
    q, k, v = inputs(batch, heads, kv_heads, dim, dtype)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype)
    variant = AttentionVariant(
        window,
        1.5 if what in ("softcap", "all") else None,
        sinks if what in ("sinks", "all") else None,
        spans(batch) if what in ("bidirectional", "all") else None,
    )
    found = ops.paged_attention(q, k, v, batch, 0, 0.25, variant)
    wanted = written_out(q, batch, 0.25, variant)
    torch.testing.assert_close(found.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def written_out(
    q: torch.Tensor, batch: AttentionBatch, scale: float, variant: AttentionVariant
) -> torch.Tensor:
    """One token and head at a time, over what the cache holds."""
    cache = batch.caches[0]
    group = q.shape[1] // cache.k.shape[1]
    sequence, place = reference.token_positions(batch)
    rows = []
    for row, (seq, index) in enumerate(zip(sequence.tolist(), place.tolist(), strict=True)):
        keys, values = reference.gather(cache, batch.block_table[seq : seq + 1])
        at = torch.arange(keys.shape[2])
        seen = at <= index
        if variant.window is not None:
            seen &= at > index - variant.window
        if variant.bidirectional is not None:
            first, last = variant.bidirectional[:, row].tolist()
            seen |= (at >= first) & (at <= last)
        heads = []
        for head in range(q.shape[1]):
            k, v = keys[0, head // group, seen].float(), values[0, head // group, seen].float()
            scores = k @ q[row, head].float() * scale
            if variant.softcap is not None:
                scores = torch.tanh(scores / variant.softcap) * variant.softcap
            total = scores.exp().sum()
            if variant.sinks is not None:
                total = total + variant.sinks[head].float().exp()
            heads.append(scores.exp() @ v / total)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def test_plain_is_what_makes_no_difference() -> None:
    assert PLAIN.is_plain(10**6)
    assert AttentionVariant(window=8).is_plain(8)
    assert not AttentionVariant(window=8).is_plain(9)
    assert not AttentionVariant(softcap=1.0).is_plain(1)


VARIANTS = {
    "plain": PLAIN,
    "window": AttentionVariant(window=7),
    "softcap": AttentionVariant(softcap=1.5),
    "sinks": AttentionVariant(sinks=torch.zeros(4)),
    "bidirectional": None,
}


@pytest.mark.parametrize("backend", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("what", VARIANTS)
def test_what_others_left_behind_the_end_is_not_seen(what: str, backend: ModuleType) -> None:
    """NaN times a weight of zero is NaN."""
    layout = KVCacheLayout(1, 2, 16, 16, torch.float32)
    batch = make_batch(layout, [(70, 1), (1, 1), (33, 33), (50, 12)])
    q, k, v = inputs(batch, 4, 2, 16, torch.float32)
    variant = VARIANTS[what] or AttentionVariant(bidirectional=spans(batch))
    clean, dirty = twin(batch), twin(batch)
    wanted = backend.paged_attention(q, k, v, clean, 0, 0.25, variant)
    (cache,) = dirty.caches
    held = torch.zeros(cache.v.shape[0], layout.block_size, dtype=torch.bool)
    for row, length in zip(dirty.block_table.tolist(), dirty.kv_lens, strict=True):
        for place in range(length):
            held[row[place // 16], place % 16] = True
    cache.k.masked_fill_(~held[:, None, None, :], torch.nan)
    cache.v.masked_fill_(~held[:, None, :, None], torch.nan)
    assert torch.equal(backend.paged_attention(q, k, v, dirty, 0, 0.25, variant), wanted)
