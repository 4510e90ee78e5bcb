"""Norms, SiLU, argmax and linear layers against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import ops, reference
from sensorium.kernels.cpu.linear import onednn
from tests.kernels.batches import DTYPES

STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative size of one rounding step or two."""


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(1, 1000), seed=st.integers(0, 99))
def test_norms(dtype, rows, size, seed):
    torch.manual_seed(seed)
    residual = torch.randn(rows, size).to(dtype)
    x, weight = torch.randn(rows, size).to(dtype), torch.rand(size).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected, rtol=STEP[dtype], atol=1e-6)
    summed = residual.clone()
    expected = reference.add_rms_norm(summed, x, weight, 1e-5)
    normed = ops.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(residual, summed)
    torch.testing.assert_close(normed, expected, rtol=STEP[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 20), inner=st.integers(1, 5000), scale=st.sampled_from((0.1, 4.0, 60.0)))
def test_silu_mul(dtype, rows, inner, scale):
    both = (torch.randn(rows, 2 * inner) * scale).to(dtype)
    expected = reference.silu_mul(both)
    torch.testing.assert_close(ops.silu_mul(both), expected, rtol=STEP[dtype], atol=1e-6)


def test_silu_of_extremes():
    gate = torch.tensor([-1e30, -100.0, -88.0, -0.0, 88.0, 100.0, 1e30, math.inf])
    both = torch.cat((gate, torch.ones(8)))[None].contiguous()
    torch.testing.assert_close(ops.silu_mul(both), reference.silu_mul(both), rtol=1e-6, atol=1e-30)
    nan = torch.full((1, 4), math.nan)
    assert ops.silu_mul(nan).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), vocab=st.integers(1, 9000), seed=st.integers(0, 99))
def test_argmax_takes_the_first_of_equals(dtype, rows, vocab, seed):
    torch.manual_seed(seed)
    logits = torch.randint(-50, 50, (rows, vocab)).to(dtype)
    expected = [row.index(max(row)) for row in logits.float().tolist()]
    assert ops.argmax(logits).tolist() == expected


def test_argmax_of_nothing_but_nan_is_an_index():
    logits = torch.full((2, 5000), math.nan)
    assert all(0 <= index < 5000 for index in ops.argmax(logits).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), vocab=st.integers(1, 40000), seed=st.integers(0, 99), data=st.data())
def test_doubtful_rows_are_found_wherever_the_number_is(dtype, rows, vocab, seed, data):
    torch.manual_seed(seed)
    logits, hidden = torch.randn(rows, vocab).to(dtype), torch.randn(rows, 70).to(dtype)
    logits[:, 0] = 60.0
    if vocab > 1:
        logits[:, -1] = -60.0
    for row in data.draw(st.sets(st.integers(0, rows - 1))):
        where = data.draw(st.sampled_from([logits, hidden]))
        place = data.draw(st.integers(0, where.shape[1] - 1))
        where[row, place] = data.draw(st.sampled_from([math.inf, -math.inf, math.nan]))
    assert ops.doubtful_rows(logits, hidden) == reference.doubtful_rows(logits, hidden)
    equal = torch.full((rows, vocab), 3.0).to(dtype)
    assert ops.doubtful_rows(equal, hidden) == list(range(rows))


def test_rounding_is_to_nearest_even_as_torch_does():
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int64).to(torch.int32)
    numbers = bits.view(torch.float32)
    numbers = numbers[numbers.isfinite() & (numbers.abs() < 6e4)]
    for dtype in (torch.bfloat16, torch.float16):
        # Adding zero rounds the sum of the stored numbers: exact numbers must come back.
        x = numbers.to(dtype)[None].contiguous()
        residual = torch.zeros_like(x)
        ops.add_rms_norm(residual, x, torch.ones(x.shape[1], dtype=dtype), 1e-6)
        assert torch.equal(residual, x + 0)
    a, b = torch.randn(1, 3000).bfloat16(), torch.randn(1, 3000).bfloat16()
    expected = a + b
    ops.add_rms_norm(a, b, torch.ones(3000, dtype=torch.bfloat16), 1e-6)
    assert torch.equal(a, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 896, 1152), (33, 70, 100), (5, 8, 3)])
def test_packed_linear(dtype, rows, inputs, outputs):
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    packed = ops.pack_weight(weight)
    assert packed.shape == (outputs, inputs)
    assert packed.is_copy or not onednn.packs(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for own_bias in (None, bias):
        expected = torch.nn.functional.linear(
            x.double(), weight.double(), None if own_bias is None else own_bias.double()
        )
        result = ops.linear(x, packed, own_bias)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
        bound = ops.bind_linear(packed, own_bias)(x)
        assert torch.equal(bound, result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", sorted(reference.ACTIVATIONS))
def test_linear_with_activation(dtype, act):
    x = torch.randn(7, 48).to(dtype)
    weight = (torch.randn(80, 48) * 0.3).to(dtype)
    expected = reference.ACTIVATIONS[act](x.double() @ weight.double().t())
    result = ops.linear(x, ops.pack_weight(weight), None, act)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_other_dtypes_run_the_reference():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    packed = ops.pack_weight(torch.randn(4, 8, dtype=torch.float64))
    assert isinstance(packed, reference.PlainWeight)
    assert ops.linear(x, packed).shape == (3, 4)
    assert ops.argmax(x).tolist() == x.argmax(-1).tolist()
