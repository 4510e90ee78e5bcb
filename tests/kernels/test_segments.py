"""Attention of encoders: written out, and the matrix tiles' kernel against plain torch."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import cpu_amx, cpu_segments, ops, reference

needs_tiles = pytest.mark.skipif(
    not cpu_amx.available(), reason="this CPU has no matrix tiles (AMX)"
)


def projected(rows: int, heads: int, dim: int, scale: float = 2.0) -> list[torch.Tensor]:
    """q, k, v as views of one projection, in bf16."""
    return list((torch.randn(rows, 3, heads, dim) * scale).bfloat16().unbind(1))


def test_written_out():
    q, k, v = torch.randn(3, 4, 2, 8).unbind(0)
    mixed = ops.segment_attention(q, k, v, [0, 4], 0.4)
    weights = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) * 0.4, dim=-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@needs_tiles
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from((1, 2, 16, 31, 32, 33, 100, 511, 512, 513, 700, 1100)),
                     min_size=1, max_size=4),
    heads=st.integers(1, 3),
    dim=st.sampled_from((2, 16, 30, 32, 64, 72, 80, 88, 128)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tiles_equal_float32_to_the_rounding_of_bf16(lengths, heads, dim, seed):
    torch.manual_seed(seed)
    starts = list(accumulate(lengths, initial=0))
    q, k, v = projected(starts[-1], heads, dim)
    assert cpu_segments.fits(q, k, v)
    mixed = ops.segment_attention(q, k, v, starts, dim**-0.5)
    expected = reference.segment_attention(q.float(), k.float(), v.float(), starts, dim**-0.5)
    # Weights are rounded to bf16 before the sum, the sum is once more: two half steps of the largest value.
    torch.testing.assert_close(mixed.float(), expected, rtol=2**-7, atol=2**-8 * v.abs().max())


@needs_tiles
def test_tiles_do_not_change_with_the_company():
    q, k, v = projected(700, 2, 80)
    together = ops.segment_attention(q, k, v, [0, 33, 600, 700], 0.1)
    alone = ops.segment_attention(q[33:600], k[33:600], v[33:600], [0, 567], 0.1)
    assert torch.equal(together[33:600], alone)


@needs_tiles
@pytest.mark.parametrize("size", [0.01, 30.0, 3000.0])
def test_tiles_with_sharp_and_flat_weights(size):
    q, k, v = projected(600, 1, 64, size)
    v = (v / size).contiguous()
    k = k.contiguous()
    mixed = ops.segment_attention(q.contiguous(), k, v, [0, 600], 0.125)
    expected = reference.segment_attention(q.float(), k.float(), v.float(), [0, 600], 0.125)
    torch.testing.assert_close(mixed.float(), expected, rtol=2**-7, atol=2**-6)


@needs_tiles
def test_tiles_keep_nan_where_it_is():
    q, k, v = projected(80, 2, 32)
    q[5, 1, 3] = float("nan")
    mixed = ops.segment_attention(q, k, v, [0, 40, 80], 0.2)
    assert mixed[5, 1].isnan().all()
    mixed[5, 1] = 0
    assert mixed.isfinite().all()


@needs_tiles
def test_other_layouts_take_plain_torch():
    q, k, v = projected(8, 2, 32)
    assert cpu_segments.fits(q, k, v)
    assert not cpu_segments.fits(q.float(), k.float(), v.float())
    assert not cpu_segments.fits(q, k, v.contiguous())
    odd = [t[..., :31] for t in (q, k, v)]
    assert not cpu_segments.fits(*odd)
    expected = reference.segment_attention(*odd, [0, 8], 0.2)
    assert torch.equal(ops.segment_attention(*odd, [0, 8], 0.2), expected)


@needs_tiles
def test_onednn_still_multiplies_afterwards():
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(48, 96).bfloat16()
    packed = ops.pack_weight(weight)
    before = ops.linear(x, packed)
    ops.segment_attention(*projected(100, 2, 80), [0, 100], 0.1)
    assert torch.equal(ops.linear(x, packed), before)
