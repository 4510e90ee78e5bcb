"""Factors of DoRA's outputs: the formula, and weights that are on another device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sensorium.kernels.adapters import LowRank
from sensorium.kernels.reference import PlainWeight
from sensorium.layers.linear import Linear
from sensorium.models.lora import dora


@pytest.mark.parametrize("most", [1, 40, 1 << 14])
def test_factors_and_shifts_of_a_part(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(dora, "PIECE", most)
    generator = torch.Generator().manual_seed(1)
    weight, bias, a, b, magnitude = (
        torch.randn(shape, generator=generator) for shape in ((9, 16), (9,), (3, 16), (5, 3), (5,))
    )
    layer = Linear(16, 9, bias=True)
    layer.load_packed(PlainWeight(weight), bias)
    found = dora.affine(layer, LowRank(a, b, 0.7, 2), magnitude)
    factors = magnitude.double() / (weight[2:7].double() + 0.7 * b.double() @ a.double()).norm(
        dim=1
    )
    expected = torch.stack((factors, (1 - factors) * bias[2:7].double()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_on_another_device() -> None:
    """Nothing is computed here; operations of tensors on two devices fail as they would there."""
    with FakeTensorMode():
        layer = Linear(16, 9)
        layer.load_packed(PlainWeight(torch.empty(9, 16, device="cuda")))
        part = LowRank(torch.empty(3, 16), torch.empty(5, 3), 1.0, 2)
        found = dora.affine(layer, part, torch.empty(5))
    assert (found.shape, found.device.type) == ((2, 5), "cpu")
