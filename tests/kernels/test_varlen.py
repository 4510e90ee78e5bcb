"""Attention of encoders: written out, and the kernels against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import ops, reference
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.attention import varlen_vectors
from sensorium.kernels.cpu.attention.tiles import varlen
from tests.kernels.batches import DTYPES
from tests.kernels.tiles import UNITS

with_tiles = pytest.mark.usefixtures("tiles")


@pytest.fixture(params=UNITS)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of this CPU, and emulated ones."""
    monkeypatch.setattr(amx, "unit", lambda: request.param)


def projected(rows: int, heads: int, dim: int, scale: float = 2.0) -> list[torch.Tensor]:
    """q, k, v as views of one projection, in bf16."""
    return list((torch.randn(rows, 3, heads, dim) * scale).bfloat16().unbind(1))


def test_written_out():
    q, k, v = torch.randn(3, 4, 2, 8).unbind(0)
    mixed = ops.varlen_attention(q, k, v, [0, 4], 0.4)
    weights = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) * 0.4, dim=-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@with_tiles
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
    assert varlen.fits(q, k, v)
    mixed = ops.varlen_attention(q, k, v, starts, dim**-0.5)
    expected = reference.varlen_attention(q.float(), k.float(), v.float(), starts, dim**-0.5)
    # Weights are rounded to bf16 before the sum, the sum is once more: two half steps of the
    # largest value.
    torch.testing.assert_close(mixed.float(), expected, rtol=2**-7, atol=2**-8 * v.abs().max())


@with_tiles
def test_tiles_do_not_change_with_the_company():
    q, k, v = projected(700, 2, 80)
    together = ops.varlen_attention(q, k, v, [0, 33, 600, 700], 0.1)
    alone = ops.varlen_attention(q[33:600], k[33:600], v[33:600], [0, 567], 0.1)
    assert torch.equal(together[33:600], alone)


@with_tiles
@pytest.mark.parametrize("size", [0.01, 30.0, 3000.0, 1e5, 1e9])
def test_tiles_with_sharp_and_flat_weights(size):
    torch.manual_seed(1)
    q, k, v = (t.contiguous() for t in projected(600, 1, 64))
    mixed = ops.varlen_attention((q * size).bfloat16(), k, v, [0, 600], 0.125)
    expected = reference.varlen_attention(
        (q * size).bfloat16().double(), k.double(), v.double(), [0, 600], 0.125
    )
    torch.testing.assert_close(
        mixed.double(), expected, rtol=2**-7, atol=2**-8 * expected.abs().max().item()
    )


@with_tiles
def test_tiles_keep_nan_where_it_is():
    q, k, v = projected(80, 2, 32)
    q[5, 1, 3] = float("nan")
    mixed = ops.varlen_attention(q, k, v, [0, 40, 80], 0.2)
    assert mixed[5, 1].isnan().all()
    mixed[5, 1] = 0
    assert mixed.isfinite().all()


@with_tiles
def test_other_layouts_do_without_tiles():
    q, k, v = projected(8, 2, 32)
    assert varlen.fits(q, k, v)
    assert not varlen.fits(q.float(), k.float(), v.float())
    assert not varlen.fits(q, k.float(), v.float())
    assert not varlen.fits(q, k[:, :1], v[:, :1])
    assert not varlen.fits(q, k, v.contiguous())
    odd = (q[..., :31], k[..., :31], v[..., :31])
    assert not varlen.fits(*odd)
    row = torch.randn(8, 3 * 2 * 32 + 1).bfloat16()[:, 1:].view(8, 3, 2, 32)
    assert not varlen.fits(*row.unbind(1)), "rows of an odd length, from an odd address"
    expected = varlen_vectors.varlen_attention(*odd, [0, 8], 0.2)
    assert torch.equal(ops.varlen_attention(*odd, [0, 8], 0.2), expected)


@with_tiles
@pytest.mark.parametrize("dim", [130, 192, 256])
def test_tiles_with_wide_heads(dim):
    torch.manual_seed(dim)
    q, k, v = projected(70, 2, dim)
    mixed = ops.varlen_attention(q, k, v, [0, 33, 70], dim**-0.5)
    expected = reference.varlen_attention(q.float(), k.float(), v.float(), [0, 33, 70], dim**-0.5)
    torch.testing.assert_close(mixed.float(), expected, rtol=2**-7, atol=2**-8 * v.abs().max())
    assert not varlen.fits(*projected(2, 1, 258))


@with_tiles
def test_tiles_on_any_number_of_threads():
    q, k, v = projected(700, 4, 80)
    before = torch.get_num_threads()
    try:
        found = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(ops.varlen_attention(q, k, v, [0, 300, 700], 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@with_tiles
def test_tiles_in_several_runs_of_segments(monkeypatch):
    q, k, v = projected(400, 2, 64)
    starts = [0, 10, 10, 150, 160, 400]
    at_once = ops.varlen_attention(q, k, v, starts, 0.1)
    monkeypatch.setattr(varlen, "PACKED_BYTES", 40_000)
    assert list(varlen.segment_runs([0, 40, 80, 300], 500)) == [(0, 40), (40, 80), (80, 300)]
    assert torch.equal(ops.varlen_attention(q, k, v, starts, 0.1), at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_must_cover_the_rows(dtype):
    q = torch.randn(8, 2, 16).to(dtype)
    for starts in ([], [0], [0, 7], [0, 9], [1, 8], [0, 5, 4, 8]):
        with pytest.raises(ValueError, match="do not cover 8 rows"):
            ops.varlen_attention(q, q, q, starts, 0.1)
    nothing = q[:0]
    assert ops.varlen_attention(nothing, nothing, nothing, [0], 0.1).shape == (0, 2, 16)
    assert ops.varlen_attention(nothing, nothing, nothing, [0, 0], 0.1).shape == (0, 2, 16)


LENGTHS = (1, 2, 15, 16, 17, 33, 95, 96, 97, 255, 256, 257, 300, 520)
EXACT = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest error beside a computation in float64, relative and of values of about 2."""


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    dim=st.sampled_from((1, 2, 15, 16, 31, 64, 72, 80, 88, 128)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_vectors_equal_attention_in_float64(lengths, heads, dim, dtype, seed):
    torch.manual_seed(seed)
    starts = list(accumulate(lengths, initial=0))
    q, k, v = (t.to(dtype) for t in torch.randn(starts[-1], 3, heads, dim).mul(2).unbind(1))
    mixed = varlen_vectors.varlen_attention(q, k, v, starts, dim**-0.5)
    expected = reference.varlen_attention(q.double(), k.double(), v.double(), starts, dim**-0.5)
    tolerance = EXACT[dtype]
    torch.testing.assert_close(mixed.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_do_not_change_with_the_company(dtype, monkeypatch):
    """Nor with the number of threads, nor with how much is packed at a time."""
    q, k, v = torch.randn(900, 3, 2, 80).to(dtype).unbind(1)
    starts = [0, 33, 33, 600, 664, 700, 900]
    together = varlen_vectors.varlen_attention(q, k, v, starts, 0.1)
    for start, end in pairwise(starts):
        rows = slice(start, end)
        alone = varlen_vectors.varlen_attention(q[rows], k[rows], v[rows], [0, end - start], 0.1)
        assert torch.equal(together[start:end], alone)
    monkeypatch.setattr(varlen_vectors, "PACKED_BYTES", 40_000)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found = varlen_vectors.varlen_attention(q, k, v, starts, 0.1)
            assert torch.equal(found, together)
    finally:
        torch.set_num_threads(before)


def test_runs_hold_every_head_of_every_segment():
    runs = list(varlen_vectors.head_runs([0, 40, 40, 80, 500], 2, 100, 10_000))
    assert [length for run in runs for _, length, _ in run] == [40, 40, 40, 40, 420, 420]
    rows = varlen_vectors.padded_length(40)
    assert len(runs[0]) == min(10_000 // (rows * 100), 4)
    assert [len(run) for run in runs[-2:]] == [1, 1], "too long for a run with others"


@pytest.mark.parametrize("size", [0.01, 30.0, 3000.0, 1e5, 1e9])
def test_vectors_with_sharp_and_flat_weights(size):
    torch.manual_seed(1)
    q, k, v = torch.randn(600, 3, 1, 64).unbind(1)
    mixed = varlen_vectors.varlen_attention(q * size, k, v, [0, 600], 0.125)
    expected = reference.varlen_attention(
        (q * size).double(), k.double(), v.double(), [0, 600], 0.125
    )
    error = (mixed.double() - expected).abs().max().item()
    assert error < 1e-5 + 1e-5 * min(size, 3000.0), error
    assert mixed.isfinite().all()


def test_vectors_keep_nan_where_it_is():
    q, k, v = torch.randn(80, 3, 2, 32).unbind(1)
    q[5, 1, 3] = float("nan")
    mixed = varlen_vectors.varlen_attention(q, k, v, [0, 40, 80], 0.2)
    assert mixed[5, 1].isnan().all()
    mixed[5, 1] = 0
    assert mixed.isfinite().all()


def test_without_tiles_vectors_run_and_plain_torch_for_the_rest(monkeypatch):
    monkeypatch.setattr(amx, "unit", lambda: None)
    q, k, v = projected(40, 2, 32)
    found = ops.varlen_attention(q, k, v, [0, 40], 0.2)
    assert torch.equal(found, varlen_vectors.varlen_attention(q, k, v, [0, 40], 0.2))
    few = (q, k[:, :1], v[:, :1])
    apart = (q, k, v.contiguous())
    wide = (q.double(), k.double(), v.double())
    assert not any(varlen_vectors.fits(*own) for own in (few, apart, wide))
    assert torch.equal(
        ops.varlen_attention(*wide, [0, 40], 0.2),
        reference.varlen_attention(*wide, [0, 40], 0.2),
    )


def test_no_tiles_when_compiling_for_another_cpu():
    """Numba would end the process at an instruction that its CPU does not have."""
    code = (
        "import torch; from sensorium.kernels import ops; from sensorium.kernels.cpu import amx\n"
        "assert not amx.available()\n"
        "q = torch.randn(8, 2, 16).bfloat16()\n"
        "ops.varlen_attention(q, q, q, [0, 8], 0.1)"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NUMBA_CPU_NAME": "generic"}, check=True
    )
