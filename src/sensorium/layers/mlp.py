"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sensorium.kernels import ops
from sensorium.kernels.adapters import RowAdapters
from sensorium.layers.activation import activation
from sensorium.layers.linear import Linear

INNER_BYTES = 24 * 1024 * 1024
"""Largest intermediate result on the CPU. The C library returns larger ones to the system when
they are freed, and page faults of the next one cost half as much as the multiplication; smaller
parts also use the CPU's caches better."""
MIN_ROWS = 256


class GatedMLP:
    """MLP down(act(gate(x)) * up(x)) with gate and up in one projection.

    ``gate_up`` holds gate's rows first.
    """

    __slots__ = ("act", "down", "gate_up", "is_silu")

    def __init__(
        self, hidden_size: int, inner_size: int, bias: bool = False, act: str = "silu"
    ) -> None:
        self.gate_up = Linear(hidden_size, 2 * inner_size, bias)
        self.down = Linear(inner_size, hidden_size, bias)
        self.act = activation(act)
        self.is_silu = act in ("silu", "swish")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run (T, hidden_size) -> (T, hidden_size)."""
        return in_parts(self._run, x, self.gate_up.num_outputs, self.gate_up.adapters)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up.forward(x)
        if self.is_silu:
            return self.down.forward(ops.silu_mul(both))
        gate, up = both.chunk(2, dim=-1)
        return self.down.forward(self.act(gate) * up)

    __call__ = forward


class PlainMLP:
    """MLP fc2(act(fc1(x)))."""

    __slots__ = ("fc1", "fc2")

    def __init__(
        self,
        num_inputs: int,
        inner_size: int,
        num_outputs: int | None = None,
        act: str = "gelu",
        bias: bool = True,
    ) -> None:
        self.fc1 = Linear(num_inputs, inner_size, bias, act)
        self.fc2 = Linear(inner_size, num_inputs if num_outputs is None else num_outputs, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run (..., num_inputs) -> (..., num_outputs)."""
        return in_parts(self._run, x, self.fc1.num_outputs, self.fc1.adapters)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))

    __call__ = forward


def in_parts(
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    width: int,
    adapters: RowAdapters | None = None,
) -> torch.Tensor:
    """Compute ``run(x)`` in parts of rows that bound the size of the intermediate result.

    ``width``: numbers of the intermediate result per row. ``adapters``: those of the layers in
    ``run``.
    """
    num_rows = x.shape[0]
    if num_rows <= MIN_ROWS or not x.is_cpu or x.dim() != 2:
        return run(x)
    largest = max(MIN_ROWS, INNER_BYTES // (width * x.dtype.itemsize))
    num_parts = -(-num_rows // largest)
    if num_parts == 1:
        return run(x)
    parts = x.chunk(num_parts)
    if adapters is None or not adapters.active:
        return torch.cat([run(part) for part in parts])
    results, start = [], 0
    for part in parts:
        with adapters.narrowed(start, start + part.shape[0]):
            results.append(run(part))
        start += part.shape[0]
    return torch.cat(results)
