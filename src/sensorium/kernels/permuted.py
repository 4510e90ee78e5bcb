"""Weights whose inputs lie in another order than those of the rows that they multiply.

Such are GPTQ's with act-order: inputs that share a scale are scattered over the layer. Put one
behind the other they are a weight like any other, and rows are put into the same order before the
product. An output's sum has the same terms in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch

from sensorium.kernels.cpu import elementwise
from sensorium.kernels.weight import Multiply, PackedWeight


class PermutedWeight(PackedWeight):
    """Packed weight (N, K) with column j for input ``order[j]``."""

    kinds: ClassVar[tuple[type[PackedWeight], ...]] = ()
    """Classes of weights that may be inside, for ``from_tensors``."""

    def __init__(self, inner: PackedWeight, order: torch.Tensor) -> None:
        """Wrap a weight; order: (K,) int32, each input once."""
        self.inner, self.order = inner, order
        self.num_outputs, self.num_inputs = inner.shape
        self.dtype, self.format = inner.dtype, inner.format

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self.order.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        multiply, order = self.inner.bind(bias, act), self.order

        def run(x: torch.Tensor) -> torch.Tensor:
            return multiply(elementwise.columns(x, order))

        return run

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.rows(ids)[:, self.order.long().argsort()]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self.inner.tensors(), "order": self.order}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        order = tensors["order"]
        inner = {name: tensor for name, tensor in tensors.items() if name != "order"}
        if order.dtype != torch.int32 or tuple(order.shape) != (shape[1],):
            raise ValueError(f"this is no order of {shape[1]} inputs")
        if not torch.equal(order.sort().values, torch.arange(shape[1], dtype=torch.int32)):
            raise ValueError("an order has each input once")
        for kind in cls.kinds:
            try:
                return cls(kind.from_tensors(inner, shape, dtype), order)
            except (KeyError, ValueError):
                continue
        raise ValueError(f"these are not the tensors of a weight of {shape}")
