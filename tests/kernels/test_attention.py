"""Paged attention against the PyTorch reference, and that against attention written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import ops, reference
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout
from sensorium.kernels.cpu.attention import pieces
from tests.kernels.batches import DTYPES, TOLERANCE, make_batch, twin


def check(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    lengths: list[tuple[int, int]],
    rotary_dim: int | None = None,
    normed: bool = False,
    seed: int = 0,
) -> AttentionBatch:
    """Run one layer by kernel and reference on equal caches; outputs and caches must agree."""
    num_heads, num_kv_heads, dim = heads
    layout = KVCacheLayout(1, num_kv_heads, dim, block_size, dtype)
    batch = make_batch(layout, lengths, rotary_dim, seed)
    other = twin(batch)
    generator = torch.Generator().manual_seed(seed + 1)
    num_tokens = sum(batch.query_lens)
    width = (num_heads + 2 * num_kv_heads) * dim
    qkv = torch.randn(num_tokens, width, generator=generator).to(dtype)
    norms = [None, None]
    if normed:
        norms = [(torch.rand(dim, generator=generator) + 0.5).to(dtype) for _ in range(2)]
    run = (0, num_heads, num_kv_heads, dim, dim**-0.5, *norms, 1e-6)
    mixed = ops.rope_attention(qkv, batch, *run)
    expected = reference.rope_attention(qkv, other, *run)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(mixed, expected, rtol=tolerance, atol=tolerance)
    for own, theirs in zip(batch.caches, other.caches, strict=True):
        # A normed key is rounded once by the kernel and twice by the reference.
        torch.testing.assert_close(own.k, theirs.k, rtol=tolerance, atol=tolerance)
        assert torch.equal(own.v, theirs.v)
    return batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "block_size", "lengths"),
    [
        ((14, 2, 64), 32, [(100, 1), (1, 1), (33, 1), (1500, 1)]),
        ((4, 4, 8), 16, [(17, 1), (5, 5), (40, 3)]),
        ((6, 2, 128), 16, [(64, 1), (80, 79), (513, 70), (90, 40)]),
        ((3, 3, 12), 16, [(64, 1), (65, 17), (65, 20)]),
        ((2, 1, 256), 32, [(2, 1), (300, 5)]),
        ((20, 1, 16), 64, [(130, 1), (70, 70), (30, 30)]),
        ((9, 1, 96), 48, [(50, 1), (100, 9)]),
    ],
)
def test_kernel_agrees_with_reference(dtype, heads, block_size, lengths):
    check(dtype, heads, block_size, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norms_and_partial_rotary(dtype):
    check(dtype, (8, 2, 80), 64, [(300, 1), (7, 7), (300, 100)], rotary_dim=40, normed=True)


@settings(max_examples=25, deadline=None)
@given(
    group=st.integers(1, 9),
    num_kv_heads=st.integers(1, 3),
    dim=st.integers(1, 20).map(lambda n: 4 * n),
    block_size=st.sampled_from((16, 32, 64)),
    lengths=st.lists(
        st.tuples(st.integers(0, 90), st.integers(1, 80)).map(lambda p: (p[0] + p[1], p[1])),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape(group, num_kv_heads, dim, block_size, lengths, seed):
    heads = (group * num_kv_heads, num_kv_heads, dim)
    check(torch.float32, heads, block_size, lengths, seed=seed)


def test_block_sizes_without_a_kernel_use_the_reference():
    check(torch.float32, (4, 2, 8), 8, [(30, 1), (9, 4)])


def test_long_contexts_are_split_and_merged(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    batch = make_batch(KVCacheLayout(1, 2, 64, 32, torch.float32), [(3000, 1)])
    table, _, num_partial, _ = pieces.plan_pieces(batch, 2, 7, 4, [None])
    assert len(table) > 2
    assert num_partial == len(table)
    covered = sorted((piece[4], piece[5]) for piece in table)
    assert covered[0][0] == 0
    assert covered[-1][1] == 3000
    assert all(a[1] == b[0] for a, b in pairwise(covered))


def test_several_layers_share_a_plan_and_leave_their_caches_apart():
    layout = KVCacheLayout(3, 2, 16, 16, torch.float32)
    batch = make_batch(layout, [(600, 1), (40, 20)])
    other = twin(batch)
    qkv = torch.randn(21, (6 + 4) * 16)
    for layer in (0, 1, 2, 0):
        mixed = ops.rope_attention(qkv * (layer + 1), batch, layer, 6, 2, 16, 0.25)
        expected = reference.rope_attention(qkv * (layer + 1), other, layer, 6, 2, 16, 0.25)
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    assert len(batch.scratch) == 1


def test_stale_numbers_in_unused_slots_do_not_matter():
    layout = KVCacheLayout(1, 2, 64, 32, torch.float32)
    clean = make_batch(layout, [(70, 1), (40, 9)])
    dirty = twin(clean)
    for s, (kv_len, query_len) in enumerate(zip(dirty.kv_lens, dirty.query_lens, strict=True)):
        used = kv_len - query_len
        for position in range(used, dirty.block_table.shape[1] * 32):
            block = int(dirty.block_table[s, position // 32])
            if position // 32 < -(-kv_len // 32):
                dirty.caches[0].k[block, :, :, position % 32] = math.nan
                dirty.caches[0].v[block, :, position % 32] = math.nan
    qkv = torch.randn(10, (4 + 4) * 64)
    mixed = [ops.rope_attention(qkv, batch, 0, 4, 2, 64, 0.125) for batch in (clean, dirty)]
    assert torch.equal(*mixed)


def test_a_chunked_prompt_gives_what_the_whole_prompt_gives():
    layout = KVCacheLayout(1, 2, 32, 16, torch.float32)
    whole = make_batch(layout, [(100, 100)])
    qkv = torch.randn(100, (6 + 4) * 32)
    expected = ops.rope_attention(qkv, whole, 0, 6, 2, 32, 0.2)
    parts = []
    start = 0
    for length in (37, 1, 10, 52):
        part = make_batch(layout, [(start + length, length)])
        rows = slice(start, start + length)
        part.caches, part.block_table = whole.caches, whole.block_table
        part.cos, part.sin = whole.cos[rows], whole.sin[rows]
        parts.append(ops.rope_attention(qkv[rows], part, 0, 6, 2, 32, 0.2))
        start += length
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)


def test_reference_is_attention_written_out():
    batch = make_batch(KVCacheLayout(1, 1, 8, 16, torch.float32), [(21, 3)])
    qkv = torch.randn(3, (2 + 2) * 8)
    mixed = reference.rope_attention(qkv, batch, 0, 2, 1, 8, 0.3).view(3, 2, 8)
    k, v = reference.gather(batch.caches[0], batch.block_table)
    q = reference.rotate(qkv.view(3, 4, 8)[:, :2], batch.cos, batch.sin)
    for row in range(3):
        seen = 21 - 3 + row + 1
        for head in range(2):
            weights = torch.softmax(k[0, 0, :seen] @ q[row, head] * 0.3, dim=0)
            torch.testing.assert_close(mixed[row, head], weights @ v[0, 0, :seen])


def test_rotation_of_heads_in_place():
    for dtype in DTYPES:
        rows = torch.randn(11, 5 * 40).to(dtype)
        angle = torch.rand(11, 10)
        expected = rows.clone()
        reference.rotate_heads(expected, angle.cos(), angle.sin(), 3, 40)
        ops.rotate_heads(rows, angle.cos(), angle.sin(), 3, 40)
        torch.testing.assert_close(
            rows, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
        )


def test_a_key_that_is_not_a_number_shows():
    batch = make_batch(KVCacheLayout(1, 1, 16, 16, torch.float32), [(40, 1), (40, 1)])
    block = int(batch.block_table[0, 1])
    batch.caches[0].k[block, 0, 3, 5] = math.nan
    mixed = ops.rope_attention(torch.randn(2, 3 * 16), batch, 0, 1, 1, 16, 0.25)
    assert mixed[0].isnan().all()
    assert mixed[1].isfinite().all()
