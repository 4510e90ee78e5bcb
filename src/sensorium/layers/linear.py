"""Linear layers, built without weights and loaded later."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sensorium.kernels import ops
from sensorium.kernels.adapters import AdaptedProduct, RowAdapters
from sensorium.kernels.weight import Multiply, PackedWeight, QuantizedTensor
from sensorium.layers.activation import activation


class Linear:
    """Linear layer ``y = act(x W^T + b)``.

    ``act`` names an activation, which is fused where the device can; None for none. The layer has
    no weight until ``load``; fused projections are loaded with the concatenated tensor.
    """

    __slots__ = (
        "act",
        "adapters",
        "bias",
        "forward",
        "has_bias",
        "num_inputs",
        "num_outputs",
        "quantize",
        "reduce",
        "weight",
    )

    weight: PackedWeight | None
    bias: torch.Tensor | None
    forward: Callable[[torch.Tensor], torch.Tensor]
    """(T, num_inputs) -> (T, num_outputs)."""
    quantize: Callable[[torch.Tensor], QuantizedTensor] | None
    """Quantizes the weight that ``load`` is given, where the loader has set it."""
    adapters: RowAdapters | None
    """Lanes of the rows, for a layer that takes adapters."""
    reduce: Callable[[torch.Tensor], torch.Tensor] | None
    """Sums the results (T, num_outputs) of all ranks, where each has some of the inputs alone.

    Is set before the layer is loaded, which has no activation then."""

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
        self.adapters = None
        self.reduce = None
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
        product = ops.bind_linear(weight, self.bias, self.act)
        self.forward = product if self.reduce is None else _summed(product, self.reduce)

    def adapt(self, product: AdaptedProduct, adapters: RowAdapters) -> None:
        """Add what ``product`` holds to the results of rows with adapters, before the activation.

        The layer is loaded; others give the lanes of its rows through ``adapters``.
        """
        if self.weight is None:
            raise RuntimeError("a layer is adapted after it was loaded")
        plain, linear, reduce = self.forward, self.forward, self.reduce
        act = None if self.act is None else activation(self.act)
        if act is not None or reduce is not None:
            linear = ops.bind_linear(self.weight, self.bias)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not adapters.active:
                return plain(x)
            rows = x.flatten(0, -2) if x.dim() != 2 else x
            rows = rows.contiguous()
            y = linear(rows)
            product.add(rows, y, adapters)
            y = y if reduce is None else reduce(y)
            y = y if act is None else act(y)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], self.num_outputs)

        self.adapters = adapters
        self.forward = forward

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


def _summed(product: Multiply, reduce: Multiply) -> Multiply:
    """Return the sum of a product over all ranks as one function."""
    return lambda x: reduce(product(x))


def _not_loaded(*tensors: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("a layer was used before its weight was loaded")
