"""DoRA (Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024) as a factor of each output.

A layer with the weight W (N, K) and an adapter's A and B computes with ``m / |W + s B A|`` times
``W + s B A``, where the norm is that of each row and m (N,) is trained. With the factor
``g = m / |W + s B A|`` its result is ``g (x W^T + s x A^T B^T) + bias``, which is
``g (y + s x A^T B^T) + (1 - g) bias`` of the plain layer's result y. As in PEFT, the norm is taken
of the weights that the layer computes with.
"""

from __future__ import annotations

import torch

from sensorium.kernels.adapters import LowRank
from sensorium.layers.linear import Linear
from sensorium.models.lora.file import PIECE


def affine(layer: Linear, part: LowRank, magnitude: torch.Tensor) -> torch.Tensor:
    """Return factors and shifts (2, N) float32 of a part of a layer.

    magnitude: m (N,), in the layer's order of rows. All is computed in pieces of few numbers, so
    that torch wakes no other threads for them: these may be running the model.
    """
    assert layer.weight is not None
    num_outputs = part.b.shape[0]
    a = torch.empty(part.a.shape)
    for wide, row in zip(a, part.a, strict=True):
        wide.copy_(row)
    norms = torch.empty(num_outputs)
    num_rows = max(1, PIECE // layer.num_inputs)
    for start in range(0, num_outputs, num_rows):
        stop = min(start + num_rows, num_outputs)
        ids = torch.arange(part.first + start, part.first + stop)
        rows = layer.weight.rows(ids).float().cpu()
        added = part.scale * part.b[start:stop].float() @ a
        norms[start:stop] = torch.linalg.vector_norm(rows + added, dim=1)
    factors = magnitude.float() / norms
    shifts = torch.zeros(num_outputs)
    if layer.bias is not None:
        bias = layer.bias[part.first : part.first + num_outputs].float().cpu()
        shifts = (1 - factors) * bias
    return torch.stack((factors, shifts))
