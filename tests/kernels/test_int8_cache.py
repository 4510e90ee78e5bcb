"""KV cache in int8: its codes, and attention over it beside attention written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import int8_cache, ops, reference
from sensorium.kernels.batch import (
    PLAIN,
    AttentionBatch,
    AttentionVariant,
    KVCacheLayout,
    LayerCache,
)
from tests.kernels.batches import DTYPES, make_batch, twin
from tests.kernels.cutting import VARIANTS, each_alone, in_pieces, variant_of

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest error of outputs about 1, beside float32 over the same codes."""
LENGTHS = [(300, 1), (1, 1), (33, 33), (270, 40)]


def layout_of(kv_heads: int, dim: int, block_size: int = 16) -> KVCacheLayout:
    return KVCacheLayout(1, kv_heads, dim, block_size, torch.int8)


def transformed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The Hadamard transform of (..., D) by its definition: signs from the common bits of i and j."""
    size = math.gcd(x.shape[-1], 1 << 20)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return (x.reshape(*x.shape[:-1], -1, size) @ np.array(signs)).reshape(x.shape)


def stored(
    cache: LayerCache, block: int, head: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes (tokens, D) and scales of keys (transformed), and of values: by the bytes' places."""
    dim, size = cache.head_dim, cache.block_size
    keys, values = (t[block, head].numpy() for t in (cache.k, cache.v))
    d, token, width = np.arange(dim), np.arange(size)[:, None], -(-dim // 16) * 16
    key = keys[d // 2 * 2 * size + 2 * token + d % 2]
    value = values[token // 2 * 2 * width + 2 * d + token % 2]
    scales = [raw[-2 * size :].view(np.uint16).astype(np.uint32) << 16 for raw in (keys, values)]
    key_scales, value_scales = (raw.view(np.float32).astype(float) for raw in scales)
    return key.astype(float), key_scales, value.astype(float), value_scales


def written_out(
    q: torch.Tensor, batch: AttentionBatch, scale: float, variant: AttentionVariant = PLAIN
) -> torch.Tensor:
    """Attention of q (T, heads, D) to what the cache holds, a row and a head at a time, in float64."""
    cache, size = batch.caches[0], batch.caches[0].block_size
    group = q.shape[1] // cache.num_kv_heads
    sequence, place = reference.token_positions(batch)
    held: dict[tuple[int, int], Any] = {}
    for s, kv_len in enumerate(batch.kv_lens):
        blocks = batch.block_table[s, : -(-kv_len // size)].tolist()
        for head in range(cache.num_kv_heads):
            found = [stored(cache, block, head) for block in blocks]
            keys = np.concatenate([codes * scales[:, None] for codes, scales, _, _ in found])
            values = np.concatenate([codes * scales[:, None] for _, _, codes, scales in found])
            held[s, head] = transformed(keys) / math.gcd(cache.head_dim, 1 << 20), values
    out = torch.zeros(q.shape)
    for row, (s, index) in enumerate(zip(sequence.tolist(), place.tolist(), strict=True)):
        first = 0 if variant.window is None else max(0, index - variant.window + 1)
        last = index
        if variant.bidirectional is not None:
            first = min(first, int(variant.bidirectional[0, row]))
            last = max(last, int(variant.bidirectional[1, row]))
        seen = slice(first, last + 1)
        for head in range(q.shape[1]):
            keys, values = held[s, head // group]
            scores = keys[seen] @ q[row, head].double().numpy() * scale
            if variant.softcap is not None:
                scores = np.tanh(scores / variant.softcap) * variant.softcap
            weights = np.exp(scores - scores.max())
            total = weights.sum()
            if variant.sinks is not None:
                total += np.exp(float(variant.sinks[head]) - scores.max())
            out[row, head] = torch.from_numpy(weights @ values[seen] / total)
    return out


def inputs(
    batch: AttentionBatch, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num = sum(batch.query_lens)
    q, k, v = (
        torch.randn(num, count, dim, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


@pytest.mark.parametrize("backend", [ops, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dim", [64, 80, 12])
def test_keys_and_values_are_written_to_the_nearest_code(backend: Any, dim: int) -> None:
    batch = make_batch(layout_of(2, dim), [(17, 1), (40, 33)])
    q, k, v = inputs(batch, 4, 2, dim, torch.float32)
    k[3], v[3] = 0.0, 1e-35
    k[5] *= 1e20
    backend.paged_attention(q, k, v, batch, 0, 0.3)
    sequence, place = reference.token_positions(batch)
    for row, (s, index) in enumerate(zip(sequence.tolist(), place.tolist(), strict=True)):
        block = int(batch.block_table[s, index // 16])
        for head in range(2):
            key, key_scales, value, value_scales = stored(batch.caches[0], block, head)
            own = index % 16
            wanted = transformed(k[row, head].double().numpy())
            for codes, scale, exact in (
                (key[own], key_scales[own], wanted),
                (value[own], value_scales[own], v[row, head].double().numpy()),
            ):
                if abs(exact).max() < 1e-30:
                    assert scale == 0
                    continue
                assert abs(codes * scale - exact).max() <= scale * 0.501
                assert abs(codes).max() in (126, 127), "the scale is the least that will do"
    for head in range(2):
        padding = batch.caches[0].v[:, head, : -(-dim // 16) * 16 * 16].unflatten(-1, (8, -1, 2))
        assert not padding[int(batch.block_table[1, 0]), :, dim:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(6, 2, 64, 32), (9, 1, 80, 16), (4, 4, 12, 48), (7, 1, 128, 16), (20, 1, 16, 32)],
)
def test_kernel_is_attention_over_what_the_cache_holds(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, block_size: int
) -> None:
    batch = make_batch(layout_of(kv_heads, dim, block_size), LENGTHS)
    q, k, v = inputs(batch, heads, kv_heads, dim, dtype)
    found = ops.paged_attention(q, k, v, batch, 0, dim**-0.5)
    wanted = written_out(q, batch, dim**-0.5)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=TOLERANCE[dtype])


def test_rotary_positions_and_norms_of_heads() -> None:
    """The kernel and the reference, whose keys may differ by a code where they are rounded."""
    heads, kv_heads, dim = 6, 2, 64
    batch = make_batch(layout_of(kv_heads, dim), LENGTHS, rotary_dim=32)
    other = twin(batch)
    qkv = torch.cat(inputs(batch, heads, kv_heads, dim, torch.float32), dim=1).flatten(1)
    norms = [torch.rand(dim) + 0.5 for _ in range(2)]
    run = (0, heads, kv_heads, dim, dim**-0.5, *norms, 1e-6)
    found = ops.rope_attention(qkv, batch, *run)
    wanted = reference.rope_attention(qkv, other, *run)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4)
    assert (batch.caches[0].k != other.caches[0].k).float().mean() < 1e-3
    assert torch.equal(batch.caches[0].v, other.caches[0].v)


@pytest.mark.parametrize("what", VARIANTS)
@pytest.mark.parametrize("backend", [ops, reference], ids=["kernel", "reference"])
def test_variants(backend: Any, what: str) -> None:
    batch = make_batch(layout_of(2, 32), [(300, 1), (1, 1), (33, 33), (350, 30)])
    q, k, v = inputs(batch, 6, 2, 32, torch.float32)
    variant = variant_of(what, batch)
    found = backend.paged_attention(q, k, v, batch, 0, 0.25, variant)
    torch.testing.assert_close(found, written_out(q, batch, 0.25, variant), rtol=0, atol=2e-4)


@settings(max_examples=25, deadline=None)
@given(
    group=st.integers(1, 9),
    num_kv_heads=st.integers(1, 3),
    dim=st.integers(1, 40).map(lambda n: 2 * n),
    block_size=st.sampled_from((16, 32, 48)),
    lengths=st.lists(
        st.tuples(st.integers(0, 90), st.integers(1, 80)).map(lambda p: (p[0] + p[1], p[1])),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape(group, num_kv_heads, dim, block_size, lengths, seed):
    batch = make_batch(layout_of(num_kv_heads, dim, block_size), lengths, seed=seed)
    other = twin(batch)
    q, k, v = inputs(batch, group * num_kv_heads, num_kv_heads, dim, torch.float32, seed)
    found = ops.paged_attention(q, k, v, batch, 0, dim**-0.5)
    wanted = reference.paged_attention(q, k, v, other, 0, dim**-0.5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)  # a code may differ


@pytest.mark.parametrize("block_size", [1, 7, 24])
def test_block_sizes_without_a_kernel(block_size: int) -> None:
    batch = make_batch(layout_of(2, 10, block_size), [(30, 1), (19, 4)])
    q, k, v = inputs(batch, 4, 2, 10, torch.float32)
    found = ops.paged_attention(q, k, v, batch, 0, 0.3)
    keys, values = reference.gather(batch.caches[0], batch.block_table)
    query = int8_cache.hadamard(q[0, ::2]) / 2
    weights = torch.softmax(torch.einsum("hd,htd->ht", query, keys[0, :, :30]) * 0.3, -1)
    wanted = torch.einsum("ht,htd->hd", weights, values[0, :, :30])
    torch.testing.assert_close(found[0, ::2], wanted, rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([(6, 2, 64), (7, 1, 80), (2, 2, 16)]),
    dtype=st.sampled_from(DTYPES),
    length=st.sampled_from([1, 17, 130, 256, 257, 700]),
    seed=st.integers(0, 1000),
    threads=st.sampled_from([1, 2, 16]),
)
def test_a_prompt_may_be_cut_anywhere(
    heads: tuple[int, int, int], dtype: torch.dtype, length: int, seed: int, threads: int
) -> None:
    """Its own keys and values are read as later steps read them: the same bits."""
    num_heads, kv_heads, dim = heads
    whole = make_batch(layout_of(kv_heads, dim), [(length, length)], dim // 2, seed)
    whole.num_decodes = int(length == 1)
    qkv = torch.cat(inputs(whole, num_heads, kv_heads, dim, dtype, seed), dim=1).flatten(1)
    run = (0, num_heads, kv_heads, dim, dim**-0.5)
    expected = ops.rope_attention(qkv, whole, *run).clone()
    keys, values = whole.caches[0].k.clone(), whole.caches[0].v.clone()
    assert torch.equal(in_pieces(qkv, whole, run, seed, threads), expected)
    assert torch.equal(whole.caches[0].k, keys)
    assert torch.equal(whole.caches[0].v, values)


@pytest.mark.parametrize("what", ["plain", *VARIANTS])
def test_rows_do_not_depend_on_the_other_sequences(what: str) -> None:
    batch = make_batch(layout_of(2, 64, 32), [(1500, 1), (40, 1), (700, 1), (300, 40), (90, 90)])
    variant = PLAIN if what == "plain" else variant_of(what, batch)
    q, k, v = inputs(batch, 6, 2, 64, torch.bfloat16)
    together = ops.paged_attention(q, k, v, batch, 0, 0.125, variant)
    for rows, alone, own in each_alone(batch, variant):
        found = ops.paged_attention(q[rows], k[rows], v[rows], alone, 0, 0.125, own)
        assert torch.equal(found, together[rows])


def test_a_later_layer_and_another_place_of_blocks_make_no_difference() -> None:
    layout = KVCacheLayout(3, 2, 64, 16, torch.int8)
    batch = make_batch(layout, [(600, 1), (40, 20)])
    q, k, v = inputs(batch, 6, 2, 64, torch.float32)
    first = ops.paged_attention(q, k, v, batch, 0, 0.125)
    moved = torch.randperm(batch.caches[0].k.shape[0])
    for name in ("k", "v"):
        own = getattr(batch.caches[0], name)
        getattr(batch.caches[2], name)[moved] = own
    batch.block_table = moved[batch.block_table.long()].to(torch.int32)
    batch.scratch = {}
    assert torch.equal(ops.paged_attention(q, k, v, batch, 2, 0.125), first)


@pytest.mark.parametrize("backend", [ops, reference], ids=["kernel", "reference"])
def test_what_others_left_behind_the_end_is_not_seen(backend: Any) -> None:
    batch = make_batch(layout_of(2, 16), [(70, 1), (1, 1), (33, 33), (50, 12)])
    qkv = inputs(batch, 4, 2, 16, torch.float32)
    wanted = backend.paged_attention(*qkv, twin(batch), 0, 0.25)
    records, cache = batch.caches[0].records, batch.caches[0]
    assert records is not None
    held = torch.zeros(cache.v.shape[0], 16, dtype=torch.bool)
    for row, length in zip(batch.block_table.tolist(), batch.kv_lens, strict=True):
        for place in range(length):
            held[row[place // 16], place % 16] = True
    block, offset = (~held).nonzero().unbind(1)
    nothing = torch.full((len(block), 2, 16), torch.nan)
    records.write(nothing, nothing, cache.k, cache.v, block, offset)
    assert torch.equal(backend.paged_attention(*qkv, batch, 0, 0.25), wanted)


@pytest.mark.parametrize("backend", [ops, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_numbers_that_are_none_show(backend: Any, where: str, what: float) -> None:
    batch = make_batch(layout_of(1, 16), [(40, 1), (40, 1)])
    qkv = dict(zip("qkv", inputs(batch, 2, 1, 16, torch.float32), strict=True))
    qkv[where][0, 0, 3] = what
    mixed = backend.paged_attention(*qkv.values(), batch, 0, 0.25)
    assert not mixed[0, 0].isfinite().any()
    assert mixed[1].isfinite().all()


def test_large_channels_do_not_spoil_the_others() -> None:
    """Keys as Qwen2 has them: two channels a hundred times larger than the rest."""
    keys = torch.randn(500, 128)
    keys[:, [7, 71]] += 200.0
    query = torch.randn(128)
    exact = keys @ query
    errors = []
    for transform, size in ((lambda x: x, 1), (int8_cache.hadamard, 128)):
        codes, scales = int8_cache.quantized(transform(keys))
        found = codes.float() * scales.float()[:, None] @ transform(query) / size
        errors.append((found - exact).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 3


def test_it_takes_half_the_memory_of_sixteen_bits() -> None:
    for dim, most in ((64, 0.516), (128, 0.508), (80, 0.513)):
        half = KVCacheLayout(2, 4, dim, 32, torch.bfloat16)
        own = KVCacheLayout(2, 4, dim, 32, torch.int8)
        assert own.bytes_per_block <= most * half.bytes_per_block
        caches = ops.allocate_cache(own, 10, torch.device("cpu"))
        assert sum(c.k.nbytes + c.v.nbytes for c in caches) == 10 * own.bytes_per_block
