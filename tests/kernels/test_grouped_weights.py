"""Weights as published files have them: zero points, minimums, int8 by groups."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels import ops, reference
from sensorium.kernels.cpu.linear import integers
from sensorium.kernels.cpu.linear.grouped.int4 import Int4Weight
from sensorium.kernels.cpu.linear.grouped.int8 import GroupedInt8Weight
from sensorium.kernels.weight import QuantizedTensor
from tests.kernels.test_integer_linear import expected

KINDS = {
    "int4 zeros": Int4Weight,
    "int4 minimums": Int4Weight,
    "int8": GroupedInt8Weight,
    "int8 zeros": GroupedInt8Weight,
    "int8 minimums": GroupedInt8Weight,
}
FORMS = dict.fromkeys(integers.forms()[:1] + integers.forms()[-1:])
"""The least and the best form of instructions: those between share their code."""
CASES = [
    *((kind, form) for kind in KINDS for form in integers.forms()[-1:]),
    *((kind, form) for kind in ("int4 zeros", "int8 minimums") for form in [*FORMS][:-1]),
]
"""Every kind with the best form; the least one with each number of bits and each kind of offset."""

pytestmark = pytest.mark.skipif(
    not integers.forms(), reason="this CPU has no AVX2: integer products run the reference"
)


def make(
    kind: str, num_outputs: int, num_inputs: int, group: int = 32, dtype: torch.dtype = torch.half
) -> QuantizedTensor:
    """Return a random weight, its scales and minimums in the ``dtype`` of a file."""
    generator = torch.Generator().manual_seed(num_inputs + group)
    shape = (num_outputs, -(-num_inputs // group))
    scales = (torch.rand(shape, generator=generator) / 100).to(dtype).float()
    bits = int(kind[3])
    least, end = (-128, 128) if bits == 8 else (0, 16)
    size = (num_outputs, num_inputs)
    values = torch.randint(least, end, size, generator=generator, dtype=torch.int8)
    zeros = minimums = None
    if kind.endswith("zeros"):
        zeros = torch.randint(least, end, shape, generator=generator, dtype=torch.int8)
    if kind.endswith("minimums"):
        minimums = (torch.randn(shape, generator=generator) / 10).to(dtype).float()
    return QuantizedTensor(values, scales, bits, group, zeros, minimums)


@pytest.mark.parametrize(("kind", "form"), CASES)
@pytest.mark.parametrize(
    ("shape", "group"), [((33, 896), 128), ((5, 7), 32), ((48, 588), 32), ((70, 320), 64)]
)
def test_products_are_those_of_the_definition(
    kind: str, form: str, shape: tuple[int, int], group: int
) -> None:
    weight = make(kind, *shape, group)
    multiply = KINDS[kind].pack(weight, torch.float32).bind_form(form)
    for num_rows in (1, 3, 14, 130):
        x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(num_rows)) + 0.5
        found = multiply(x)
        torch.testing.assert_close(found, expected(x, weight), rtol=1e-5, atol=1e-5)
        exact = x @ weight.dequantized().t()
        assert (found - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_one_set_of_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = KINDS[kind].pack(make(kind, 100, 416), torch.float32)
    x = torch.randn(150, 416, generator=torch.Generator().manual_seed(1))
    whole = packed.bind()(x)
    for form in (form for own, form in CASES if own == kind):
        assert torch.equal(packed.bind_form(form)(x), whole)
    multiply = packed.bind()
    for threads in (1, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=threads: number)
        for count in range(1, 40):
            assert torch.equal(multiply(x[count : 2 * count]), whole[count : 2 * count])


@pytest.mark.parametrize("group", [32, 96, 100])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_file_are_exact_at_rest(kind: str, dtype: torch.dtype, group: int) -> None:
    """Stored and restored too, also for one group for each output and tiny scales beside large."""
    weight = make(kind, 45, 100, group, dtype)
    weight.scales[3, 0] *= 2.0**-6
    weight.scales[4] *= 2.0**-30
    if weight.minimums is not None:
        weight.minimums[4] *= 2.0**-30
    weight.scales[5] = 0.0
    packed = ops.pack_weight(weight, torch.float32)
    assert isinstance(packed, ops.QUANTIZED_KINDS)
    ids = torch.tensor([44, 0, 3, 3, 4, 5, 16])
    assert torch.equal(packed.rows(ids), weight.dequantized()[ids])
    assert torch.equal(weight.rows(ids), weight.dequantized()[ids])
    assert packed.nbytes == sum(tensor.nbytes for tensor in packed.tensors().values())
    again = type(packed).from_tensors(packed.tensors(), packed.shape, torch.float32)
    assert torch.equal(again.rows(ids), packed.rows(ids))
    with pytest.raises(ValueError, match="not the panels"):
        type(packed).from_tensors(packed.tensors(), (45, 160), torch.float32)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_the_largest_sums_do_not_overflow(kind: str, form: str) -> None:
    """All numbers are multiples of 16 below 2^28, so that float32 sums of groups are exact."""
    least, most = (-128, 127) if KINDS[kind].bits == 8 else (0, 15)
    pairs = [[least, least], [most, most], [least, most], [most, least]]
    values = torch.tensor(pairs, dtype=torch.int8).repeat(5, 4096)
    x = torch.tensor([[127.0, 127.0], [-127.0, -127.0], [127.0, -127.0]]).repeat(1, 4096)
    scales = torch.ones(20, 256)
    for offset in (least, most if least else most + 1):
        zeros = minimums = None
        exact = values.double()
        if kind.endswith("zeros"):
            zeros = torch.full((20, 256), offset, dtype=torch.int8)
            exact -= offset
        if kind.endswith("minimums"):
            minimums = torch.full((20, 256), float(offset))
            exact += offset
        weight = QuantizedTensor(values, scales, KINDS[kind].bits, 32, zeros, minimums)
        found = KINDS[kind].pack(weight, torch.float32).bind_form(form)(x)
        assert torch.equal(found, (x.double() @ exact.t()).float())


def test_what_no_kernel_takes_is_refused_or_runs_the_reference() -> None:
    for kind in ("int4 zeros", "int4 minimums"):
        weight = make(kind, 16, 96, 48)
        plain = ops.pack_weight(weight, torch.float32)
        assert isinstance(plain, reference.DequantizedWeight)
        found = QuantizedTensor(bits=4, group=48, **plain.tensors())
        assert torch.equal(found.dequantized(), weight.dequantized())
    with pytest.raises(ValueError, match="groups of a multiple of 32"):
        Int4Weight.pack(weight, torch.float32)
    values, scales = torch.zeros((4, 32), dtype=torch.int8), torch.ones(4, 1)
    zeros = torch.zeros((4, 1), dtype=torch.int8)
    for others in ((zeros.float(), None), (zeros[:2], None), (None, scales.half())):
        with pytest.raises(ValueError, match="zero points or minimums of"):
            QuantizedTensor(values, scales, 4, 32, *others)
    with pytest.raises(ValueError, match="not both"):
        QuantizedTensor(values, scales, 4, 32, zeros, scales)
