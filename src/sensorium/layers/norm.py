"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sensorium.kernels import ops


class RMSNorm:
    """Root-mean-square norm (Zhang and Sennrich, 2019) over the last axis.

    ``weight`` (size,) is set by ``load``.
    """

    __slots__ = ("eps", "forward", "forward_add", "size", "weight")

    forward: Callable[[torch.Tensor], torch.Tensor]
    """(T, size) -> (T, size)."""
    forward_add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(residual, x): ``residual += x`` in place; the norm of the sum. All (T, size)."""

    def __init__(self, size: int, eps: float) -> None:
        self.size = size
        self.eps = eps
        self.weight = torch.empty(0)
        self.forward = self.forward_add = _not_loaded

    def load(self, weight: torch.Tensor) -> None:
        """Set the weight (size,). Raises ValueError for another shape."""
        self.weight = checked_vector(weight, self.size, "RMS norm weight")
        self.forward, self.forward_add = ops.bind_norm(self.weight, self.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


def _not_loaded(*tensors: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("a norm was used before its weight was loaded")


class LayerNorm:
    """Layer norm over the last axis with weight and optional bias, both (size,)."""

    __slots__ = ("bias", "eps", "has_bias", "size", "weight")

    bias: torch.Tensor | None

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        self.size = size
        self.eps = eps
        self.has_bias = bias
        self.weight = torch.empty(0)
        self.bias = None

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Set weight and bias (size,).

        Raises ValueError for other shapes or a missing or unexpected bias.
        """
        if (bias is not None) != self.has_bias:
            raise ValueError(f"layer norm {'needs' if self.has_bias else 'takes no'} bias")
        self.weight = checked_vector(weight, self.size, "layer norm weight")
        self.bias = None if bias is None else checked_vector(bias, self.size, "layer norm bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., size) -> (..., size)."""
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)

    __call__ = forward


def checked_vector(tensor: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """Return the tensor, contiguous. Raises ValueError unless its shape is (size,)."""
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({size},)")
    return tensor.contiguous()
