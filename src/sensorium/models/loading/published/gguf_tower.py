"""Weights of a vision encoder in a GGUF file, joined as its checkpoint has them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sensorium.models.gguf.encoders.stored import TowerWeight
from sensorium.models.gguf.reader import TensorInfo

Numbers = Callable[[TensorInfo], torch.Tensor]
"""The numbers of a tensor of the file."""
_FRAMES = 2


def read_weight(weight: TowerWeight, numbers: Numbers) -> torch.Tensor:
    """Return the numbers of a weight; float32 where they are joined of several tensors."""
    if len(weight.parts) == 1:
        return numbers(weight.parts[0]).view(weight.shape)
    parts = [numbers(part).float() for part in weight.parts]
    return torch.stack(parts, dim=_FRAMES) if weight.join == "frames" else torch.cat(parts)
