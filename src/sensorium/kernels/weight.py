"""Weights of linear layers: what every packed form offers, and the form that quantizers make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""(T, K) -> (T, N)."""

FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
"""Number formats of weights at rest."""


class PackedWeight(ABC):
    """Weight (N, K) of ``y = x W^T``, in the layout that its product reads."""

    num_outputs: int
    num_inputs: int
    dtype: torch.dtype
    """Type of the activations and the results."""
    format: str
    """Number format at rest, one of ``FORMATS``."""
    has_rows: ClassVar[bool] = True
    """``rows``, ``tensors`` and ``from_tensors`` work; they do not for opaque layouts."""
    is_copy: bool = True
    """The weight has memory of its own; else it refers to the tensor that it was packed from."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, K) of the unpacked weight."""
        return self.num_outputs, self.num_inputs

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory at rest."""

    @abstractmethod
    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        """Return ``act(x W^T + bias)`` as a function of x (T, K) -> (T, N).

        bias: (N,). act: a key of ``reference.ACTIVATIONS``, or None. A row of the result has the
        same bits for any number of rows.
        """

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows of W, dequantized: ids (T,) of 0 to N - 1 -> (T, K) in ``dtype``.

        ids may be on the CPU wherever the weight is. Raises TypeError where ``has_rows`` is false.
        """
        raise TypeError(f"{type(self).__name__} cannot be read by rows")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the packed tensors by name, as ``from_tensors`` takes them.

        Raises TypeError where ``has_rows`` is false.
        """
        raise TypeError(f"{type(self).__name__} cannot be stored")

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        """Return the weight of shape (N, K) whose ``tensors`` these are, without copying them.

        Raises TypeError where ``has_rows`` is false.
        """
        raise TypeError(f"{cls.__name__} cannot be stored")


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Weight (N, K) as small integers times a scale for each group of inputs of an output.

    With g = k // group, w[n, k] = values[n, k] * scales[n, g], or (values[n, k] - zeros[n, g]) *
    scales[n, g], or values[n, k] * scales[n, g] + minimums[n, g]. The last group of an output may
    be shorter. One scale per output (per channel): ``group`` is K.
    """

    values: torch.Tensor
    """(N, K) int8: -128 to 127 for 8 bits, -8 to 7 for 4, but 0 to 15 with zeros or minimums."""
    scales: torch.Tensor
    """(N, G) float32, G = ceil(K / group)."""
    bits: int
    """8 or 4."""
    group: int
    """Inputs that share a scale."""
    zeros: torch.Tensor | None = None
    """(N, G) int8: 0 to 16 for 4 bits, any for 8; or None."""
    minimums: torch.Tensor | None = None
    """(N, G) float32, or None."""

    def __post_init__(self) -> None:
        num_outputs, num_inputs = self.values.shape
        expected = (num_outputs, -(-num_inputs // self.group) if self.group > 0 else 0)
        if self.bits not in (4, 8) or self.values.dtype != torch.int8:
            raise ValueError(f"quantized weight of {self.bits} bits in {self.values.dtype}")
        if tuple(self.scales.shape) != expected or self.scales.dtype != torch.float32:
            raise ValueError(
                f"scales of {tuple(self.scales.shape)} {self.scales.dtype} for a weight of "
                f"{(num_outputs, num_inputs)} in groups of {self.group}"
            )
        for other, dtype in ((self.zeros, torch.int8), (self.minimums, torch.float32)):
            if other is not None and (tuple(other.shape) != expected or other.dtype != dtype):
                raise ValueError(
                    f"zero points or minimums of {tuple(other.shape)} {other.dtype} beside scales "
                    f"of {expected}"
                )
        if self.zeros is not None and self.minimums is not None:
            raise ValueError("a quantized weight has zero points or minimums, not both")

    @property
    def shape(self) -> torch.Size:
        """Shape (N, K) of the weight."""
        return self.values.shape

    @property
    def format(self) -> str:
        """Number format, one of ``FORMATS``."""
        return f"int{self.bits}"

    @property
    def nbytes(self) -> int:
        """Bytes of memory of integers, a byte each, scales and what is beside them."""
        parts = (self.values, self.scales, self.zeros, self.minimums)
        return sum(part.nbytes for part in parts if part is not None)

    def rows_of(self, ids: torch.Tensor | slice) -> QuantizedTensor:
        """Return some of the outputs, by their indexes."""
        return replace(
            self,
            values=self.values[ids],
            scales=self.scales[ids],
            zeros=None if self.zeros is None else self.zeros[ids],
            minimums=None if self.minimums is None else self.minimums[ids],
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows of the weight: ids (T,) of 0 to N - 1 -> (T, K) float32."""
        return self.rows_of(ids).dequantized()

    def dequantized(self) -> torch.Tensor:
        """Return the weight (N, K) as float32."""

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(self.group, dim=1)[:, : self.values.shape[1]]

        wide = self.values.float()
        if self.zeros is not None:
            wide -= spread(self.zeros)
        wide *= spread(self.scales)
        if self.minimums is not None:
            wide += spread(self.minimums)
        return wide
