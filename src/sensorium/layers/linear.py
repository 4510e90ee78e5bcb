"""Linear layers, built without weights and loaded later."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sensorium.kernels import ops
from sensorium.kernels.weight import PackedWeight, QuantizedTensor
from sensorium.layers.activation import activation


class Linear:
    """Linear layer ``y = act(x W^T + b)``.

    ``act`` names an activation, which is fused where the device can; None for none. The layer has
    no weight until ``load``; fused projections are loaded with the concatenated tensor.
    """

    __slots__ = (
        "act",
        "bias",
        "forward",
        "has_bias",
        "num_inputs",
        "num_outputs",
        "quantize",
        "weight",
    )

    weight: PackedWeight | None
    bias: torch.Tensor | None
    forward: Callable[[torch.Tensor], torch.Tensor]
    """(T, num_inputs) -> (T, num_outputs)."""
    quantize: Callable[[torch.Tensor], QuantizedTensor] | None
    """Quantizes the weight that ``load`` is given, where the loader has set it."""

    def __init__(
        self, num_inputs: int, num_outputs: int, bias: bool = False, act: str | None = None
    ) -> None:
        if act is not None:
            activation(act)  # an unknown name fails here
        self.act = act
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self.has_bias = bias
        self.weight = None
        self.bias = None
        self.quantize = None
        self.forward = _not_loaded

    def load(
        self,
        weight: torch.Tensor | QuantizedTensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Set the weight (num_outputs, num_inputs) and, if there is one, the bias (num_outputs,).

        dtype: that of inputs and results; the weight's where it is not quantized already. Raises
        ValueError for other shapes or when a bias is missing or unexpected.
        """
        self._check(weight.shape, bias)
        if isinstance(weight, torch.Tensor):
            dtype = weight.dtype if dtype is None else dtype
            if self.quantize is not None:
                self._set(ops.quantize_and_pack(weight, self.quantize, dtype), bias)
                return
        self._set(ops.pack_weight(weight, dtype), bias)

    def load_packed(self, weight: PackedWeight, bias: torch.Tensor | None = None) -> None:
        """Set a weight that is packed already, and the bias; otherwise as ``load``."""
        self._check(weight.shape, bias)
        self._set(weight, bias)

    def _set(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self.forward = ops.bind_linear(weight, self.bias, self.act)

    def _check(self, shape: Sequence[int], bias: torch.Tensor | None) -> None:
        if tuple(shape) != (self.num_outputs, self.num_inputs):
            raise ValueError(
                f"linear weight has shape {tuple(shape)}, expected ({self.num_outputs}, "
                f"{self.num_inputs})"
            )
        if (bias is not None) != self.has_bias:
            raise ValueError(f"linear layer {'needs' if self.has_bias else 'takes no'} bias")
        if bias is not None and tuple(bias.shape) != (self.num_outputs,):
            raise ValueError(
                f"linear bias has shape {tuple(bias.shape)}, expected ({self.num_outputs},)"
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


def _not_loaded(*tensors: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("a layer was used before its weight was loaded")
