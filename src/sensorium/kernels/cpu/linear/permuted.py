"""Products with weights whose inputs lie in another order than those of the rows they multiply.

Such are GPTQ's with act-order: the inputs that share a scale are scattered over the layer. One
behind the other they make a weight like any other, and rows are put into the same order before the
product. A sum has the same terms in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch

from sensorium.kernels.cpu import elementwise
from sensorium.kernels.cpu.linear.grouped.int4 import Int4Weight
from sensorium.kernels.cpu.linear.grouped.int8 import GroupedInt8Weight
from sensorium.kernels.weight import Multiply, PackedWeight

KINDS: dict[str, type[PackedWeight]] = {
    kind.__name__: kind for kind in (Int4Weight, GroupedInt8Weight)
}
"""Classes of weights whose inputs may be in another order, by name."""
_ORDER = "order"


class PermutedWeight(PackedWeight):
    """Packed weight (N, K) whose column j belongs to input ``order[j]``."""

    def __init__(self, inner: PackedWeight, order: torch.Tensor) -> None:
        """Wrap a weight of one of ``KINDS``. order: (K,) int32, each input once.

        Raises ValueError for another order.
        """
        self.num_outputs, self.num_inputs = inner.shape
        if order.dtype != torch.int32 or tuple(order.shape) != (self.num_inputs,):
            raise ValueError(f"this is no order of {self.num_inputs} inputs")
        places = torch.arange(self.num_inputs, dtype=torch.int32)
        if not torch.equal(order.sort().values, places):
            raise ValueError("an order has each input once")
        self.inner, self.order = inner, order.contiguous()
        self.dtype, self.format = inner.dtype, inner.format

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self.order.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        multiply = self.inner.bind(bias, act)
        ordered = elementwise.bind_columns(self.order, self.dtype)
        return lambda x: multiply(ordered(x))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.rows(ids)[:, self.order.long().argsort()]

    def tensors(self) -> dict[str, torch.Tensor]:
        kind = type(self.inner).__name__
        own = {f"{kind}.{name}": tensor for name, tensor in self.inner.tensors().items()}
        return {**own, _ORDER: self.order}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        kinds = {name.partition(".")[0] for name in tensors if name != _ORDER}
        if len(kinds) != 1 or _ORDER not in tensors or not kinds <= KINDS.keys():
            raise ValueError(f"these are not the tensors of a weight of {shape} in another order")
        (kind,) = kinds
        inner = {name.partition(".")[2]: own for name, own in tensors.items() if name != _ORDER}
        return cls(KINDS[kind].from_tensors(inner, shape, dtype), tensors[_ORDER])
