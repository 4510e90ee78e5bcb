"""Products with int8 and int4 weights: exact sums, one set of bits, hostile numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels import ops, reference
from sensorium.kernels.cpu.linear import integers, levels
from sensorium.kernels.cpu.linear import product as products
from sensorium.kernels.cpu.linear.grouped.int4 import Int4Weight
from sensorium.kernels.cpu.linear.int8 import Int8Weight
from sensorium.kernels.weight import QuantizedTensor

FORMATS: dict[str, type[Int8Weight] | type[Int4Weight]] = {"int8": Int8Weight, "int4": Int4Weight}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = [
    *((torch.float32, form) for form in integers.forms() or ("none",)),
    *((dtype, (integers.forms() or ("none",))[-1]) for dtype in DTYPES[:2]),
]
"""Every form with one dtype, and every dtype with the best form: neither knows the other."""
LONGEST = 18944
"""Inputs of the widest layer of a supported checkpoint (Qwen2-VL-7B)."""

pytestmark = pytest.mark.skipif(
    not integers.forms(), reason="this CPU has no AVX2: integer products run the reference"
)


def make(name: str, num_outputs: int, num_inputs: int, seed: int = 0) -> QuantizedTensor:
    """Return a random quantized weight."""
    generator = torch.Generator().manual_seed(seed)
    bits, least, most = (8, -127, 127) if name == "int8" else (4, -8, 7)
    group = num_inputs if name == "int8" else 32
    values = torch.randint(least, most + 1, (num_outputs, num_inputs), generator=generator)
    scales = torch.rand(num_outputs, -(-num_inputs // group), generator=generator) + 0.1
    return QuantizedTensor(values.to(torch.int8), scales.bfloat16().float() / most, bits, group)


def per_output(weight: QuantizedTensor) -> bool:
    """Return whether a weight takes the kernel for one scale per output, not those for groups."""
    symmetric = weight.zeros is None and weight.minimums is None
    return weight.bits == 8 and weight.scales.shape[1] == 1 and symmetric


def rounded(weight: QuantizedTensor) -> QuantizedTensor:
    """Return the weight with the numbers that are stored: those for groups have 11 bits."""

    def stored(values: torch.Tensor) -> torch.Tensor:
        mantissas, exponents = torch.frexp(values)
        return torch.ldexp((mantissas * 2048).round() / 2048, exponents)

    if per_output(weight):
        return weight
    minimums = None if weight.minimums is None else stored(weight.minimums)
    return dataclasses.replace(weight, scales=stored(weight.scales), minimums=minimums)


def expected(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """Return the product by its definition: int64 sums of groups, float32 sums over groups."""
    weight = rounded(weight)
    group = 64 if per_output(weight) else 32
    num_rows, num_inputs = x.shape
    num_groups = -(-num_inputs // group)
    padding = (0, num_groups * group - num_inputs)
    rows = torch.nn.functional.pad(x.float(), padding).view(num_rows, num_groups, group)
    values = torch.nn.functional.pad(weight.values, padding).view(-1, num_groups, group).long()
    peaks = rows.abs().amax(-1)
    zero = peaks < 2.0**-119
    # not ``127 / peaks``, for which torch multiplies by the reciprocal
    factors = torch.where(zero, 0.0, torch.full_like(peaks, 127.0) / peaks)
    scales = torch.where(zero, 0.0, peaks / 127.0)
    q = (rows * factors[..., None]).round().long()
    total = torch.zeros(num_rows, weight.shape[0])
    for g in range(num_groups):
        own = g * group // weight.group
        sums, activations = (q[:, g, None] * values[:, g]).sum(-1), q[:, g].sum(-1)[:, None]
        if weight.zeros is not None:
            sums = sums - activations * weight.zeros[None, :, own].long()
        scale = scales[:, g, None]
        if not per_output(weight):
            scale = scale * weight.scales[None, :, own]
        total = (total.double() + sums.double() * scale.double()).float()
        if weight.minimums is not None:
            least = scales[:, g, None] * weight.minimums[None, :, own]
            total = (total.double() + activations.double() * least.double()).float()
    return total * weight.scales[:, 0] if per_output(weight) else total


def product(
    name: str, weight: QuantizedTensor, dtype: torch.dtype, form: str | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the kernel's product in one form of instructions."""
    packed = FORMATS[name].pack(weight, dtype)
    packed.form = form or packed.form
    return packed.bind()


@pytest.mark.parametrize("form", integers.forms())
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 32), (33, 896), (5, 7), (48, 588), (200, 4304)])
def test_products_are_those_of_the_definition(name: str, form: str, shape: tuple[int, int]) -> None:
    weight = make(name, *shape)
    multiply = product(name, weight, torch.float32, form)
    for num_rows in (1, 3, 14, 130):
        x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(num_rows))
        torch.testing.assert_close(multiply(x), expected(x, weight), rtol=1e-6, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    kernel=st.sampled_from(KERNELS),
    num_outputs=st.integers(1, 70),
    num_inputs=st.integers(1, 400),
    num_rows=st.integers(0, 40),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e3]),
)
def test_any_shape_and_size_of_numbers(
    name: str,
    kernel: tuple[torch.dtype, str],
    num_outputs: int,
    num_inputs: int,
    num_rows: int,
    seed: int,
    size: float,
) -> None:
    dtype, form = kernel
    weight = make(name, num_outputs, num_inputs, seed)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(num_rows, num_inputs, generator=generator) * size).to(dtype)
    result = product(name, weight, dtype, form)(x)
    assert (result.dtype, result.shape) == (dtype, (num_rows, num_outputs))
    exact = expected(x, weight)
    bound = exact.abs().max().item() if num_rows else 0.0
    # the last rounding may go either way where the float32 numbers differ by their last bit
    least = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    atol = 1e-6 * bound + least
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_one_set_of_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make(name, 500, 900)
    x = torch.randn(150, 900, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = [product(name, weight, torch.bfloat16, form)(x) for form in integers.forms()]
    whole = results[0]
    for other in results[1:]:
        assert torch.equal(other, whole)
    multiply, plainest = (product(name, weight, torch.bfloat16, form) for form in (None, "avx2"))
    for threads in (1, 2, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=threads: number)
        assert torch.equal(multiply(x), whole)
        for count in range(1, 71):
            assert torch.equal(multiply(x[count : 2 * count]), whole[count : 2 * count])
            if threads == 2:
                assert torch.equal(plainest(x[:count]), whole[:count])


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_go_in_blocks_whose_memory_is_bounded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make(name, 40, 300)
    x = torch.randn(1000, 300, generator=torch.Generator().manual_seed(1))
    whole = product(name, weight, torch.float32)(x)
    monkeypatch.setattr(products, "SCRATCH_BYTES", 100_000)
    sizes: list[int] = []

    def scratch(size: int) -> tuple[int, int]:
        sizes.append(size)
        return products.scratch(size)

    monkeypatch.setattr("sensorium.kernels.cpu.linear.integer.kernel.scratch", scratch)
    assert torch.equal(product(name, weight, torch.float32)(x), whole)
    assert len(sizes) > 1
    assert max(sizes) < 120_000


@pytest.mark.parametrize("form", integers.forms())
@pytest.mark.parametrize(
    ("name", "value"), [("int8", 127), ("int8", -127), ("int8", -128), ("int4", 7), ("int4", -8)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_do_not_overflow(name: str, form: str, value: int, sign: float) -> None:
    values = torch.full((16, LONGEST), value, dtype=torch.int8)
    group = LONGEST if name == "int8" else 32
    scales = torch.ones(16, -(-LONGEST // group))
    weight = QuantizedTensor(values, scales, int(name[-1]), group)
    multiply = product(name, weight, torch.float32, form)
    for rows in (1, 2, 21):
        torch.testing.assert_close(
            multiply(torch.full((rows, LONGEST), sign)),
            torch.full((rows, 16), sign * value * LONGEST),
            rtol=1e-5,
            atol=0.0,
        )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stay_in_their_row(name: str, hostile: float) -> None:
    multiply = product(name, make(name, 40, 300), torch.float32)
    x = torch.randn(9, 300)
    clean = multiply(x)
    x[4, 290] = hostile
    result = multiply(x)
    assert not result[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_the_least_numbers_give_zero(name: str) -> None:
    multiply = product(name, make(name, 40, 300), torch.float32)
    assert torch.equal(multiply(torch.zeros(3, 300)), torch.zeros(3, 40))
    assert torch.equal(multiply(torch.full((3, 300), 1e-40)), torch.zeros(3, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_bias_and_activation_functions(name: str, dtype: torch.dtype) -> None:
    weight = make(name, 37, 64)
    bias = torch.randn(37).to(dtype)
    x = torch.randn(7, 64).to(dtype)
    sums = expected(x, weight) + bias.float()
    packed = ops.pack_weight(weight, dtype)
    for act in (None, *reference.ACTIVATIONS):
        activated = reference.ACTIVATIONS[act](sums) if act else sums
        result = packed.bind(bias, act)(x)
        torch.testing.assert_close(
            result, activated.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=5e-6
        )


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "silu"])
def test_activation_functions_keep_nan_and_end_in_their_limits(act: str) -> None:
    weight = make("int8", 16, 32)
    packed = ops.pack_weight(weight, torch.float32)
    bias = torch.tensor([float("nan"), 1e30, -3e38, 80.0, -80.0, math.inf, -math.inf, *[0.0] * 9])
    result = packed.bind(bias, act)(torch.zeros(1, 32))[0]
    assert result[0].isnan()
    limits = [1e30, 0.0, 80.0, 0.0, math.inf, 0.0]
    assert result[1:7].tolist() == pytest.approx(limits, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_and_stored_tensors(name: str) -> None:
    weight = make(name, 45, 100)
    packed = ops.pack_weight(weight, torch.float32)
    assert isinstance(packed, FORMATS[name])
    assert packed.shape == (45, 100)
    ids = torch.tensor([44, 0, 7, 7, 16])
    assert torch.equal(packed.rows(ids), rounded(weight).dequantized()[ids])
    assert packed.nbytes == sum(tensor.nbytes for tensor in packed.tensors().values())
    again = type(packed).from_tensors(packed.tensors(), packed.shape, torch.float32)
    x = torch.randn(3, 100)
    assert torch.equal(again.bind()(x), packed.bind()(x))


def test_rows_need_not_be_contiguous_or_two_dimensional() -> None:
    packed = ops.pack_weight(make("int8", 20, 64), torch.float32)
    multiply = packed.bind()
    x = torch.randn(2, 3, 128)[..., ::2]
    assert torch.equal(multiply(x).flatten(0, 1), multiply(x.flatten(0, 1).contiguous()))


def test_weights_that_no_kernel_takes_run_the_reference() -> None:
    values = torch.randint(-127, 128, (16, 64)).to(torch.int8)
    with pytest.raises(ValueError, match="int8 products"):
        Int8Weight.pack(QuantizedTensor(values, torch.ones(16, 2), 8, 32), torch.float32)
    odd = QuantizedTensor(values, torch.ones(16, 4), 4, 16)
    assert isinstance(ops.pack_weight(odd, torch.float32), reference.DequantizedWeight)
    with pytest.raises(ValueError, match="int4 products"):
        Int4Weight.pack(odd, torch.float32)


DIGEST = """
from tests.kernels import test_integer_linear as t
print(t.integers.forms()[-1], t.digest())
"""


def digest() -> str:
    """Return a digest of products of both formats on this CPU's level."""
    found = hashlib.sha256()
    x = torch.randn(33, 300, generator=torch.Generator().manual_seed(5)).bfloat16()
    for name in FORMATS:
        packed = ops.pack_weight(make(name, 50, 300), torch.bfloat16)
        result = packed.bind(None, "gelu" if name == "int8" else "silu")(x)
        found.update(result.view(torch.int16).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.skipif(levels.level() == "avx2", reason="kernels are compiled for AVX2 already")
def test_a_cpu_with_avx2_alone_gives_the_same_bits() -> None:
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["avx2", digest()]
