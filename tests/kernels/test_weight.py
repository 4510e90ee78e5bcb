"""Weights of linear layers in their plain and quantized forms."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels import ops, reference
from sensorium.kernels.weight import QuantizedTensor


def quantized(num_outputs: int, num_inputs: int, bits: int, group: int) -> QuantizedTensor:
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    values = torch.randint(least, most + 1, (num_outputs, num_inputs)).to(torch.int8)
    scales = torch.rand(num_outputs, -(-num_inputs // group)) / most
    if bits == 4:
        scales = scales.bfloat16().float()  # as kernels store them
    return QuantizedTensor(values, scales, bits, group)


@pytest.mark.parametrize(("bits", "group"), [(8, 70), (4, 32), (4, 64)])
def test_a_quantized_weight_multiplies_like_its_numbers(bits: int, group: int) -> None:
    own = quantized(48, 70, bits, group)
    exact = own.values.double() * own.scales.double()[:, torch.arange(70) // group]
    torch.testing.assert_close(own.dequantized(), exact.float())
    packed = ops.pack_weight(own, torch.float32)
    assert (packed.format, packed.dtype, packed.shape) == (f"int{bits}", torch.float32, (48, 70))
    x, bias = torch.randn(5, 70), torch.randn(48)
    torch.testing.assert_close(
        reference.quantized_linear(x, own, bias), (x.double() @ exact.t() + bias).float()
    )
    error = packed.bind(bias)(x).double() - (x.double() @ exact.t() + bias)
    # kernels quantize the rows to 8 bits as well
    assert error.abs().max() < 0.15
    ids = torch.tensor([3, 0, 47, 3])
    torch.testing.assert_close(packed.rows(ids), exact[ids].float())


def test_a_quantized_weight_needs_the_dtype_of_its_activations() -> None:
    with pytest.raises(ValueError, match="dtype"):
        ops.pack_weight(quantized(16, 32, 8, 32))


@pytest.mark.parametrize(
    ("values", "scales", "bits", "group"),
    [
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 2), 8, 32),
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1), 5, 32),
        (torch.zeros(4, 32), torch.ones(4, 1), 8, 32),
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1).bfloat16(), 8, 32),
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1), 8, 0),
    ],
)
def test_shapes_are_checked(
    values: torch.Tensor, scales: torch.Tensor, bits: int, group: int
) -> None:
    with pytest.raises(ValueError, match="weight"):
        QuantizedTensor(values, scales, bits, group)


def test_plain_weights_are_stored_and_read_by_rows() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    packed = ops.pack_weight(weight)
    assert torch.equal(packed.rows(torch.tensor([5, 2])), weight[[5, 2]])
    again = type(packed).from_tensors(packed.tensors(), packed.shape, packed.dtype)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(again.bind(None, "relu")(x), packed.bind(None, "relu")(x))
    with pytest.raises(ValueError, match="plain"):
        reference.PlainWeight.from_tensors(packed.tensors(), (6, 4), packed.dtype)
