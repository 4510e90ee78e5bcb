"""Weight of a linear layer in the layout that its kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Weight of ``y = x W^T`` with N outputs and K inputs, packed for its kernel or plain.

    ``data`` is the plain (N, K) tensor when ``packed`` is false, else an opaque oneDNN tensor that
    only ``kernels.cpu.linear`` may read. ``row_multiple``: products of fewer than
    ``cpu.linear.FREE_ROWS`` rows are padded to a multiple of this many rows, so that a row has the
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
        """Shape (N, K) of the unpacked weight."""
        return self.num_outputs, self.num_inputs
