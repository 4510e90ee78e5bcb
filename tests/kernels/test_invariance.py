"""A row's numbers are the same bits whatever is computed beside it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import ops, reference
from sensorium.kernels.batch import PLAIN, AttentionVariant, KVCacheLayout
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.attention import pieces
from sensorium.kernels.cpu.linear import onednn
from tests.kernels.batches import DTYPES, TOLERANCE, make_batch, twin
from tests.kernels.cutting import VARIANTS, attend_cut, cuts, each_alone, part_of, variant_of

HEADS = ((14, 2, 64), (4, 4, 24), (3, 1, 128))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    dtype=st.sampled_from(DTYPES),
    length=st.sampled_from([1, 17, 130, 256, 257, 700]),
    seed=st.integers(0, 1000),
    threads=st.sampled_from([1, 2, 16]),
    normed=st.booleans(),
)
def test_attention_does_not_depend_on_how_a_prompt_is_cut(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    length: int,
    seed: int,
    threads: int,
    normed: bool,
) -> None:
    found = attend_cut(heads, dtype, length, seed, threads, normed)
    assert torch.equal(found.pieces, found.whole)
    assert torch.equal(*found.keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_the_other_sequences(dtype: torch.dtype) -> None:
    layout = KVCacheLayout(1, 2, 64, 32, dtype)
    lengths = [(1500, 1), (40, 1), (700, 1), (300, 40), (90, 90)]
    batch = make_batch(layout, lengths)
    qkv = torch.randn(sum(batch.query_lens), (6 + 4) * 64).to(dtype)
    together = ops.rope_attention(qkv, batch, 0, 6, 2, 64, 0.125)
    for rows, alone, _ in each_alone(batch, PLAIN):
        assert torch.equal(ops.rope_attention(qkv[rows], alone, 0, 6, 2, 64, 0.125), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", VARIANTS)
def test_variants_do_not_depend_on_the_other_sequences(dtype: torch.dtype, what: str) -> None:
    layout = KVCacheLayout(1, 2, 64, 32, dtype)
    batch = make_batch(layout, [(20, 1), (1500, 1), (24, 9), (700, 60), (17, 17)])
    q, k, v = (torch.randn(sum(batch.query_lens), heads, 64).to(dtype) for heads in (6, 2, 2))
    asked = variant_of(what, batch)
    expected = reference.paged_attention(q, k, v, twin(batch), 0, 0.125, asked)
    together = ops.paged_attention(q, k, v, batch, 0, 0.125, asked)
    torch.testing.assert_close(together, expected, rtol=0, atol=TOLERANCE[dtype])
    for rows, alone, own in each_alone(batch, asked):
        for threads in (1, 16):
            alone.scratch = {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "get_num_threads", lambda count=threads: count)
                found = ops.paged_attention(q[rows], k[rows], v[rows], alone, 0, 0.125, own)
            assert torch.equal(found, together[rows]), (rows, threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", VARIANTS[:-1])
def test_variants_do_not_depend_on_how_a_prompt_is_cut(dtype: torch.dtype, what: str) -> None:
    layout = KVCacheLayout(1, 2, 64, 16, dtype)
    whole = make_batch(layout, [(900, 900)])
    q, k, v = (torch.randn(900, heads, 64).to(dtype) for heads in (6, 2, 2))
    asked = variant_of(what, whole)
    expected = ops.paged_attention(q, k, v, whole, 0, 0.125, asked)
    for seed in range(3):
        start = 0
        for size in cuts(900, seed):
            rows = slice(start, start + size)
            step = part_of(whole, start, size)
            found = ops.paged_attention(q[rows], k[rows], v[rows], step, 0, 0.125, asked)
            assert torch.equal(found, expected[rows]), (start, size)
            start += size


@pytest.mark.parametrize("window", [1, 30, 256, 300])
def test_blocks_behind_the_window_are_not_read(window: int) -> None:
    """Not-a-number in any of them would show, as it does with a weight of zero."""
    layout = KVCacheLayout(1, 2, 64, 16, torch.float32)
    batch = make_batch(layout, [(1500, 1), (40, 1), (700, 5)])
    q, k, v = (torch.randn(sum(batch.query_lens), heads, 64) for heads in (6, 2, 2))
    asked = AttentionVariant(window=window)
    other = twin(batch)
    expected = ops.paged_attention(q, k, v, batch, 0, 0.125, asked)
    lengths = zip(other.block_table, other.kv_lens, other.query_lens, strict=True)
    for table, kv_len, query_len in lengths:
        read = max(0, kv_len - query_len - window + 1) // 32 * 2  # whole steps of 32 tokens
        other.caches[0].k[table[:read].long()] = math.nan
        other.caches[0].v[table[:read].long()] = math.nan
    found = ops.paged_attention(q, k, v, other, 0, 0.125, asked)
    assert torch.equal(found, expected)


def test_few_rows_over_many_tokens_are_tasks_by_parts_and_many_rows_are_not() -> None:
    """Both ways are taken in these tests, as their results must agree."""
    layout = KVCacheLayout(1, 2, 64, 32, torch.float32)
    table, _, num_partial, num_done = pieces.plan_pieces(
        make_batch(layout, [(3000, 1), (700, 700)]), 2, 7, 64, [None, None]
    )
    assert num_done == 1
    assert num_partial == math.ceil(3000 / 256)
    assert len(table) == num_partial + math.ceil(700 / 9)


def test_flash_attention_takes_over_only_where_the_batch_may_vary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(amx, "available", lambda: True)
    monkeypatch.setattr(amx, "unit", lambda: None)
    layout = KVCacheLayout(1, 2, 64, 32, torch.bfloat16)
    qkv = torch.randn(130, (6 + 4) * 64).to(torch.bfloat16)
    invariant, free = (make_batch(layout, [(400, 130)]) for _ in range(2))
    free.invariant = False
    results = [ops.rope_attention(qkv, b, 0, 6, 2, 64, 0.125) for b in (invariant, free)]
    spans = [len(next(iter(b.scratch.values())).spans) for b in (invariant, free)]
    assert spans == [0, 1]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_soft_caps_and_sinks_decide_which_rows_go_through_flash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers of one step that differ in them share no plan."""
    monkeypatch.setattr(amx, "available", lambda: True)
    monkeypatch.setattr(amx, "unit", lambda: None)
    layout = KVCacheLayout(1, 2, 64, 32, torch.bfloat16)
    qkv = torch.randn(130, (6 + 4) * 64).to(torch.bfloat16)
    variants = (PLAIN, AttentionVariant(softcap=2.0), AttentionVariant(sinks=torch.ones(6)), PLAIN)
    shared = make_batch(layout, [(400, 130)])
    shared.invariant = False
    for variant in variants:
        alone = make_batch(layout, [(400, 130)])
        alone.invariant = False
        expected = ops.rope_attention(qkv, alone, 0, 6, 2, 64, 0.125, variant=variant)
        found = ops.rope_attention(qkv, shared, 0, 6, 2, 64, 0.125, variant=variant)
        assert torch.equal(found, expected)


def test_a_plan_runs_on_no_more_threads_than_it_has_scratch_for() -> None:
    """The number of threads may grow between two layers of a step."""
    layout = KVCacheLayout(2, 2, 64, 32, torch.float32)
    qkv = torch.randn(203, (6 + 4) * 64)
    lengths = [(400, 1), (500, 1), (900, 1), (700, 200)]
    batch = make_batch(layout, lengths)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ops.rope_attention(qkv, batch, 0, 6, 2, 64, 0.125)
        [plan] = batch.scratch.values()
        size = plan.scratch.numel()
        plan.scratch = torch.full((9 * size,), 7.0)
        plan.args[14] = plan.scratch.data_ptr()
        torch.set_num_threads(8)
        expected = ops.rope_attention(qkv, make_batch(layout, lengths), 1, 6, 2, 64, 0.125)
        for _ in range(5):
            assert torch.equal(ops.rope_attention(qkv, batch, 1, 6, 2, 64, 0.125), expected)
    finally:
        torch.set_num_threads(before)
    assert bool((plan.scratch[size:] == 7.0).all()), "memory behind the scratch was written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(128, 128), (96, 64), (448, 64), (4304, 1152), (256, 4864), (33, 77)]
)
def test_a_product_does_not_depend_on_the_other_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = ops.pack_weight((torch.randn(shape) / math.sqrt(shape[1])).to(dtype))
    product = ops.bind_linear(weight, None)
    rows = torch.randn(70, shape[1]).to(dtype)
    expected = product(rows)
    for count in (*range(1, 20), 31, 33, 64, 65):
        for start in (0, 70 - count):
            own = slice(start, start + count)
            assert torch.equal(product(rows[own].contiguous()), expected[own]), (count, start)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu"])
def test_activations_neither(act: str) -> None:
    weight = ops.pack_weight(torch.randn(96, 1152) / 30)
    rows = torch.randn(40, 1152)
    product = ops.bind_linear(weight, None, act)
    expected = product(rows)
    for count in (1, 2, 3, 5, 17):
        assert torch.equal(product(rows[-count:].contiguous()), expected[-count:])


def test_products_that_differ_for_few_rows_get_more_rows() -> None:
    """A product that sums less than four rows in another order is padded to four of them.

    One that is never the same has no multiple.
    """
    weight = torch.randn(64, 8)
    sizes: list[int] = []

    def like_a_library(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        terms = (x[:, :, None] * weight).unbind(1)
        return functools.reduce(torch.add, terms if len(x) >= 4 else terms[::-1])

    assert onednn.row_multiple(like_a_library, 64, torch.float32) == 4
    padded = onednn.pad_rows(like_a_library, 4)
    rows = torch.randn(20, 64)
    sizes.clear()
    for count in (1, 3, 5, 17):
        assert torch.equal(padded(rows[:count]), like_a_library(rows)[:count])
    assert sizes[::2] == [4, 4, 8, 17]
    calls = iter(range(10_000))
    assert onednn.row_multiple(lambda x: x + next(calls), 64, torch.float32) is None


@pytest.mark.parametrize("multiple", onednn.ROW_MULTIPLES)
def test_packed_products_run_with_few_numbers_of_rows(multiple: int) -> None:
    """Each of them is a compiled primitive; zeros are added, a quarter at most from 16 rows on."""
    sizes = {n: onednn.padded_rows(n, multiple, onednn.ROW_STEPS) for n in range(1, 129)}
    assert len(set(sizes.values())) <= 17
    assert all(size >= n and (size % multiple == 0 or n >= 16) for n, size in sizes.items())
    assert all(size <= 1.25 * n for n, size in sizes.items() if n >= 16)
    assert onednn.padded_rows(129, multiple, onednn.ROW_STEPS) == 129


@pytest.mark.skipif(not onednn.packs(torch.float32), reason="this torch packs no weights")
def test_padded_products_have_the_bits_of_whole_ones() -> None:
    weight = onednn.pack_weight(torch.randn(96, 128))
    product, rows = weight.bind(torch.randn(96), "silu"), torch.randn(140, 128)
    whole = product(rows)
    for count in (1, 2, 3, 13, 17, 33, 50, 70, 128, 129):
        assert torch.equal(product(rows[-count:].contiguous()), whole[-count:])
    cube = rows[:30].view(2, 15, 128)
    assert torch.equal(product(cube).flatten(0, 1), whole[:30])
