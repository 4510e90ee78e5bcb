"""Products with weights whose inputs lie in another order than those of the rows."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.adapters import RowAdapters
from sensorium.kernels.cpu.linear import integers
from sensorium.kernels.cpu.linear.permuted import PermutedWeight
from sensorium.kernels.weight import PackedWeight
from sensorium.layers.linear import Linear
from tests.kernels.test_adapters import CPU, LANES, filled, mixed_runs
from tests.kernels.test_grouped_weights import make

pytestmark = pytest.mark.skipif(
    not integers.forms(), reason="this CPU has no AVX2: integer products run the reference"
)
NUM_OUTPUTS, NUM_INPUTS = 100, 416


def permuted(kind: str, dtype: torch.dtype) -> tuple[PackedWeight, PackedWeight, torch.Tensor]:
    """A weight in another order, the same as it lies, and the order."""
    inner = ops.pack_weight(make(kind, NUM_OUTPUTS, NUM_INPUTS), dtype)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(NUM_INPUTS, generator=generator).int()
    return ops.permuted(inner, order), inner, order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4 zeros", "int8", "int8 zeros"])
def test_products_and_rows_are_those_of_inputs_in_order(kind: str, dtype: torch.dtype) -> None:
    weight, inner, order = permuted(kind, dtype)
    bias = torch.randn(NUM_OUTPUTS).to(dtype)
    for num_rows in (1, 3, 40):
        x = torch.randn(num_rows, NUM_INPUTS).to(dtype)
        expected = inner.bind(bias, "silu")(x[:, order.long()])
        assert torch.equal(weight.bind(bias, "silu")(x), expected)
        strided = torch.randn(NUM_INPUTS, num_rows).to(dtype).t()
        assert torch.equal(weight.bind()(strided), inner.bind()(strided[:, order.long()]))
    ids = torch.tensor([99, 0, 7, 7])
    assert torch.equal(weight.rows(ids)[:, order.long()], inner.rows(ids))
    assert (weight.shape, weight.format, weight.dtype) == (inner.shape, inner.format, dtype)


def test_a_row_has_one_set_of_bits() -> None:
    weight, _, _ = permuted("int4 zeros", torch.bfloat16)
    x = torch.randn(70, NUM_INPUTS).bfloat16()
    multiply = weight.bind()
    whole = multiply(x)
    for count in (1, 2, 5, 16, 33):
        assert torch.equal(multiply(x[count : 2 * count]), whole[count : 2 * count])


@pytest.mark.parametrize("kind", ["int4 zeros", "int8"])
def test_tensors_are_kept_and_restored(kind: str) -> None:
    weight, inner, order = permuted(kind, torch.float32)
    again = PermutedWeight.from_tensors(weight.tensors(), weight.shape, torch.float32)
    x = torch.randn(2, NUM_INPUTS)
    assert torch.equal(again.bind()(x), weight.bind()(x))
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    twice = order.clone()
    twice[0] = twice[1]
    for changed in (
        inner.tensors(),
        {"order": order},
        weight.tensors() | {"order": order.long()},
        weight.tensors() | {"order": order[1:]},
        weight.tensors() | {"order": twice},
        weight.tensors() | {"order": order - 1},
        weight.tensors() | {"Plain.weight": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="order"):
            PermutedWeight.from_tensors(changed, weight.shape, torch.float32)


def test_adapters_take_the_inputs_as_they_lie() -> None:
    weight, _, _ = permuted("int4 zeros", torch.float32)
    layer = Linear(NUM_INPUTS, NUM_OUTPUTS)
    layer.load_packed(weight)
    x, rows, num_rows = torch.randn(23, NUM_INPUTS), RowAdapters(), 23
    expected = layer.forward(x).clone()
    sizes = NUM_INPUTS, NUM_OUTPUTS
    product = filled(ops.adapted_product(*sizes, LANES, torch.float32, CPU), *sizes, torch.float32)
    layer.adapt(product, rows)
    with rows.using(mixed_runs(num_rows), num_rows):
        product.add(x, expected, rows)
        assert torch.equal(layer.forward(x), expected)


def test_rows_of_another_width_or_type_are_refused() -> None:
    """Before they are put in order: that reads them by their address."""
    weight, _, _ = permuted("int4 zeros", torch.float32)
    multiply = weight.bind()
    for wrong in (
        torch.zeros(2, NUM_INPUTS - 32),
        torch.zeros(NUM_INPUTS, 2),
        torch.zeros(2, NUM_INPUTS).bfloat16(),
        torch.zeros(2, NUM_INPUTS).double(),
    ):
        with pytest.raises(ValueError, match=f"for an order of {NUM_INPUTS} columns"):
            multiply(wrong)
