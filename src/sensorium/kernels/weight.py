"""The form in which a linear layer's weight waits for its multiplications."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Weight of ``y = x W^T`` with N outputs and K inputs, in whatever order the multiplication likes best.

    ``data`` is the plain (N, K) tensor when ``packed`` is false, else an opaque oneDNN tensor that
    only ``kernels.cpu.linear`` may read. ``row_multiple``: the number of rows of a product with
    fewer than ``cpu.linear.FREE_ROWS`` of them must be a multiple of this, so that each row is the
    same bits in any product.
    """

    data: torch.Tensor
    num_outputs: int
    num_inputs: int
    dtype: torch.dtype
    packed: bool
    row_multiple: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), whatever the packing."""
        return self.num_outputs, self.num_inputs
