"""Rows and columns of weights that one rank takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensorium.distributed.shard import Cut
from sensorium.kernels import ops
from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.interface import Part
from sensorium.models.loading.coded import CodedWeight, dense, pack, taken
from sensorium.models.loading.memory import extent
from sensorium.models.loading.quantize import int4, int8, int8_groups
from tests.kernels.test_grouped_weights import make as stored

SHAPE = (24, 128)
ROWS = Cut(rows=((4, 9), (20, 24)))


def coded(whole: QuantizedTensor | torch.Tensor, order: torch.Tensor | None = None) -> CodedWeight:
    def read(first: int, end: int) -> QuantizedTensor | torch.Tensor:
        if isinstance(whole, torch.Tensor):
            return whole[first:end]
        return whole.rows_of(slice(first, end))

    return CodedWeight(SHAPE, "a form", read, order=order)


def with_zeros(weight: torch.Tensor) -> QuantizedTensor:
    return stored("int4 zeros", *weight.shape)


def with_minimums(weight: torch.Tensor) -> QuantizedTensor:
    return stored("int8 minimums", *weight.shape)


def of(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    if cut.rows:
        whole = torch.cat([whole[first:end] for first, end in cut.rows])
    return whole if cut.columns is None else whole[:, slice(*cut.columns)]


@pytest.mark.parametrize("cut", [ROWS, Cut(rows=((3, 17),)), Cut(columns=(32, 96))])
@pytest.mark.parametrize(
    "make", [int8, int8_groups, int4, with_zeros, with_minimums, torch.Tensor.float]
)
def test_coded_weights_keep_their_integers(make: Any, cut: Cut) -> None:
    whole = make(torch.randn(SHAPE))
    plain = whole if isinstance(whole, torch.Tensor) else whole.dequantized()
    own = taken(coded(whole), Part("w", SHAPE, cut))
    assert isinstance(own, CodedWeight)
    assert own.shape == Part("w", SHAPE, cut).own_shape
    assert own.label == "a form"
    assert torch.equal(dense(own, torch.float32), of(plain, cut))
    assert torch.equal(own.dequantized(2, 7), of(plain, cut)[2:7])
    assert type(own.read(0, 3)) is type(whole)


def test_columns_within_a_group_become_numbers() -> None:
    whole, cut = int4(torch.randn(SHAPE)), Cut(columns=(48, 96))
    own = taken(coded(whole), Part("w", SHAPE, cut))
    assert isinstance(own, CodedWeight)
    assert own.label == "a form, split within a group"
    assert torch.equal(dense(own, torch.float32), whole.dequantized()[:, 48:96])


@pytest.mark.parametrize(
    "cut", [ROWS, Cut(columns=(32, 96)), Cut(rows=((4, 9), (20, 24)), columns=(64, 128))]
)
@pytest.mark.parametrize("make", [with_zeros, with_minimums])
def test_columns_of_another_order_are_those_of_the_inputs(make: Any, cut: Cut) -> None:
    """Rows keep integers and order; the inputs of a rank are scattered over the groups."""
    whole = make(torch.empty(SHAPE))
    order = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(5)).int()
    plain = torch.empty(SHAPE)
    plain[:, order.long()] = whole.dequantized()
    expected, is_kept = of(plain, cut), cut.columns is None
    own = taken(coded(whole, order), Part("w", SHAPE, cut))
    assert isinstance(own, CodedWeight)
    assert own.shape == Part("w", SHAPE, cut).own_shape
    assert torch.equal(dense(own, torch.float32), expected)
    assert torch.equal(own.dequantized(2, 7), expected[2:7])
    assert isinstance(own.read(0, 3), QuantizedTensor) == is_kept
    assert own.label == ("a form" if is_kept else "a form, split within a group")
    packing = pack([own], "as stored", None, torch.float32)
    assert (packing is not None) == ops.has_integer_products()
    if packing is not None:
        assert packing.is_kept == is_kept
        rows = packing.weight.rows(torch.arange(own.shape[0]))
        assert (rows - expected).norm() < 0.01 * expected.norm()


def test_plain_weights_are_views_where_that_is_possible() -> None:
    whole = torch.randn(SHAPE)
    rows = taken(whole, Part("w", SHAPE, Cut(rows=((3, 17),))))
    columns = taken(whole, Part("w", SHAPE, Cut(columns=(32, 96))))
    assert isinstance(rows, torch.Tensor)
    assert isinstance(columns, torch.Tensor)
    assert rows.data_ptr() == whole[3:].data_ptr()
    assert torch.equal(columns, whole[:, 32:96])
    start, end = extent(columns)
    assert start == whole.data_ptr() + 32 * 4
    assert end == whole.data_ptr() + whole.nbytes - 32 * 4
    several = taken(whole, Part("w", SHAPE, ROWS))
    assert isinstance(several, torch.Tensor)
    assert torch.equal(several, of(whole, ROWS))
    absent = taken(whole[:, 0], Part("b", (24,), Cut(is_absent=True)))
    assert isinstance(absent, torch.Tensor)
    assert absent.shape == (24,)
    assert not absent.any()
