"""Products with weights at rest in bf16, fp16 and float32 by the engine's own kernels."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import reference
from sensorium.kernels.cpu.linear import epilogue, floats, levels, panels, table
from sensorium.kernels.cpu.linear import product as product_module
from sensorium.layers.embedding import Embedding, LMHead
from sensorium.processes.start import child_environment

pytestmark = pytest.mark.skipif(
    not floats.available("float16"), reason="these kernels are made for x86 with AVX2"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RESTRICTED = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}


def made(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (33, 77), (48, 600), (640, 31)])
def test_products_are_right(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = made(shape, dtype), torch.randn(shape[0]).to(dtype)
    product = floats.pack_weight(weight).bind(bias)
    for count in (0, 1, 4, 7, 30):
        x = torch.randn(count, shape[1]).to(dtype)
        found = product(x)
        assert found.dtype == dtype
        exact = x.double() @ weight.double().t() + bias.double()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", sorted(reference.ACTIVATIONS))
def test_activations_are_those_of_the_reference(act: str, dtype: torch.dtype) -> None:
    """Of sums from -12 to 12 and of the largest, in every lane, with and without bias."""
    sums = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([-3e4, -1e2, 0.0, 1e2, 3e4])))
    weight = sums[:, None].to(dtype)
    for bias in (None, torch.full((len(sums),), 0.25).to(dtype)):
        found = floats.pack_weight(weight).bind(bias, act)(torch.ones(2, 1).to(dtype))
        shifted = weight[:, 0].double() + (0 if bias is None else 0.25)
        expected = reference.ACTIVATIONS[act](shifted)
        tolerance = {torch.float32: 2e-6}.get(dtype, TOLERANCE[dtype])
        for row in found:
            torch.testing.assert_close(row.double(), expected, rtol=tolerance, atol=tolerance)


def test_every_activation_has_a_code() -> None:
    assert epilogue.CODES.keys() - {None} == reference.ACTIVATIONS.keys()


def test_undefined_numbers_stay_in_their_row() -> None:
    weight = made((40, 64), torch.bfloat16)
    x = torch.randn(9, 64).bfloat16()
    expected = floats.pack_weight(weight).bind()(x)
    x[4, 3] = float("nan")
    for act in (None, *reference.ACTIVATIONS):
        found = floats.pack_weight(weight).bind(None, act)(x)
        assert found[4].isnan().all()
        assert not found[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    found = floats.pack_weight(weight).bind()(x)
    assert torch.equal(found[5:], expected[5:])


@given(
    dtype=st.sampled_from(DTYPES),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 700),
    count=st.integers(1, 60),
    start=st.integers(0, 20),
    threads=st.integers(1, 3),
    depth_block=st.sampled_from([2, 64, 256]),
    block_rows=st.sampled_from([1, 12, 192]),
    task_panels=st.sampled_from([1, 3, 8]),
)
@settings(deadline=None, max_examples=60)
def test_a_row_has_the_same_bits_in_any_product(
    dtype: torch.dtype,
    outputs: int,
    inputs: int,
    count: int,
    start: int,
    threads: int,
    depth_block: int,
    block_rows: int,
    task_panels: int,
) -> None:
    weight = floats.pack_weight(made((outputs, inputs), dtype))
    rows = torch.randn(80, inputs).to(dtype)
    bias = made((1, outputs), dtype)[0]
    expected = weight.bind(bias, "gelu")(rows)[start : start + count]
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(threads)
        patch.setattr(floats, "SERIAL_WORK", 0)
        patch.setattr(floats, "DEPTH_BLOCK", depth_block)
        patch.setattr(floats, "BLOCK_ROWS", block_rows)
        patch.setattr(floats, "BLOCK_PANELS", task_panels)
        patch.setattr(floats, "MOST_PANELS", task_panels)
        patch.setattr(product_module, "SCRATCH_BYTES", 4 * inputs * 24)
        try:
            found = weight.bind(bias, "gelu")(rows[start : start + count])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_tensors_give_the_weight_back(dtype: torch.dtype) -> None:
    weight = made((37, 51), dtype)
    packed = floats.pack_weight(weight)
    assert packed.shape == (37, 51)
    assert packed.format == str(dtype).removeprefix("torch.")
    assert packed.nbytes == 48 * 52 * dtype.itemsize
    ids = torch.tensor([36, 0, 15, 16, 36])
    assert torch.equal(packed.rows(ids), weight[ids])
    again = floats.FloatWeight.from_tensors(packed.tensors(), packed.shape, dtype)
    x = torch.randn(3, 51).to(dtype)
    assert torch.equal(again.bind()(x), packed.bind()(x))
    with pytest.raises(ValueError, match="panels"):
        floats.FloatWeight.from_tensors(packed.tensors(), (37, 53), dtype)


def test_half_precision_at_rest_serves_float32_rows() -> None:
    weight = made((20, 30), torch.bfloat16)
    packed = floats.pack_weight(weight, torch.float32)
    assert (packed.format, packed.dtype) == ("bfloat16", torch.float32)
    x = torch.randn(5, 30)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(packed.bind()(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.rows(torch.tensor([7])), weight[[7]].float())


def test_a_tied_embedding_looks_rows_up_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "choose", lambda form: table.PANELS)
    values = made((40, 32), torch.bfloat16)
    embedding, head = Embedding(40, 32), LMHead(40, 32)
    embedding.load(values)
    head.tie(embedding)
    assert isinstance(embedding.weight, floats.FloatWeight), "no second copy of the head"
    ids = torch.tensor([39, 0, 17, 17])
    assert torch.equal(embedding(ids), values[ids])


def test_plans_are_kept_for_few_rows_and_made_anew_where_they_do_not_hold() -> None:
    weight = floats.pack_weight(made((300, 600), torch.bfloat16))
    product = weight.bind()
    assert isinstance(product, floats.FloatProduct)
    rows = torch.randn(400, 600).bfloat16()
    expected = weight.bind()(rows)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            for count in (*range(1, 50), 3, 400, 3, 1):  # 400 rows need more memory than there is
                assert torch.equal(product(rows[:count]), expected[:count])
                assert len(product.plans) <= product_module.MOST_PLANS
    finally:
        torch.set_num_threads(before)


def test_wrong_rows_are_refused() -> None:
    product = floats.pack_weight(made((20, 30), torch.bfloat16)).bind()
    with pytest.raises(ValueError, match="rows of 31"):
        product(torch.zeros(2, 31).bfloat16())
    with pytest.raises(ValueError, match=r"torch\.float32"):
        product(torch.zeros(2, 30))
    assert product(torch.zeros(2, 3, 30).bfloat16()).shape == (2, 3, 20)


def digest() -> str:
    """Digest of products with weights in each dtype, with as many rows as any code is made for.

    Rows are float32: those of bf16 use the CPU's own instruction where it has one.
    """
    found = hashlib.sha256()
    for dtype in DTYPES:
        weight = floats.pack_weight(made((100, 530), dtype), torch.float32)
        product = weight.bind(made((1, 100), torch.float32)[0])
        found.update(product(made((33, 530), torch.float32, 1)).numpy().tobytes())
    return found.hexdigest()


ALL_OF_THIS = """
import sys, pytest
status = pytest.main(["-q", "-p", "no:cacheprovider", "tests/kernels/test_floats.py"])
from tests.kernels import test_floats
from sensorium.kernels.cpu.linear import panels
print(test_floats.digest(), panels.MOST_ROWS)
sys.exit(status)
"""


def restricted(*arguments: str) -> str:
    """Run Python in a process whose kernels are compiled for AVX2."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=child_environment() | os.environ | RESTRICTED,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not levels.has_wide_registers(), reason="kernels are compiled for AVX2 already")
def test_all_of_this_with_the_registers_of_avx2() -> None:
    """The same tests pass there, and sums have the same bits as here."""
    out = restricted("-c", ALL_OF_THIS)
    assert "1 skipped" in out
    assert out.split()[-2:] == [digest(), "6"]
    assert panels.MOST_ROWS == 12
